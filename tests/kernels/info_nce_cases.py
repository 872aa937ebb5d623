"""What the tests of InfoNCE share: the loss in eager torch, inputs, and gradients."""

import torch
import torch.nn.functional as F


def eager(queries, keys, labels, temperature=0.05):
    """The expression that info_nce equals, in the inputs' dtype."""
    if queries.ndim == 3:
        keys = keys.expand(len(queries), *keys.shape[-2:])
        clients = zip(queries, keys, labels, strict=True)
        return torch.stack([eager(*client, temperature) for client in clients])
    cosine = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(cosine / temperature, labels)


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """A normal sample."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype).to(device)


def inputs(shape, dtype=torch.float32, device="cpu", shared=True, seed=0):
    """Queries, keys and labels of (G or None, B, N, D)."""
    G, B, N, D = shape
    clients = () if G is None else (G,)
    queries = draw(*clients, B, D, seed=seed, dtype=dtype, device=device)
    own = () if shared else clients
    keys = draw(*own, N, D, seed=seed + 1, dtype=dtype, device=device)
    source = torch.Generator().manual_seed(seed + 2)
    return queries, keys, torch.randint(N, (*clients, B), generator=source).to(device)


def derive(loss_of, *tensors):
    """The loss of these tensors, and the gradients of a sum of its entries times factors other than
    1, for every tensor that is given.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    return loss.detach(), *torch.autograd.grad((loss * factors_of(loss)).sum(), leaves)


def factors_of(loss):
    """The upstream gradient of each entry of a loss."""
    factors = torch.linspace(0.5, 2.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    return factors.view(loss.shape)
