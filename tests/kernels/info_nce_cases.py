"""What the tests of InfoNCE share: the loss written out in eager torch, draws of inputs, gradients
of a scalar of it, and the rule for errors.
"""

import torch
import torch.nn.functional as F

NAMES = ("loss", "d queries", "d keys", "d temperature")


def eager(
    queries,
    keys,
    labels=None,
    temperature=0.05,
    normalize=True,
    weights=None,
    reduction="mean",
    symmetric=False,
):
    """The expression that info_nce equals, in the inputs' dtype."""
    if queries.ndim == 3:
        of_client = [
            (q, keys[g] if keys.ndim == 3 else keys, None if labels is None else labels[g])
            for g, q in enumerate(queries)
        ]
        losses = [
            eager(
                *given,
                temperature,
                normalize,
                None if weights is None else weights[g],
                reduction,
                symmetric,
            )
            for g, given in enumerate(of_client)
        ]
        return torch.stack(losses)
    if normalize:
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    logits = queries @ keys.T / temperature
    labels = torch.arange(len(queries), device=queries.device) if labels is None else labels
    losses = F.cross_entropy(logits, labels, reduction="none")
    if symmetric:
        losses = (losses + F.cross_entropy(logits.T, labels, reduction="none")) / 2
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    return {
        "mean": (weights * losses).sum() / weights.sum(),
        "sum": (weights * losses).sum(),
        "none": weights * losses,
    }[reduction]


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .to(device)
    )


def inputs(shape, dtype=torch.float32, device="cpu", shared=True, seed=0):
    """Queries, keys and labels of (G or None, B, N, D)."""
    G, B, N, D = shape
    lead = () if G is None else (G,)
    labels = torch.randint(N, (*lead, B), generator=torch.Generator().manual_seed(seed + 2))
    return (
        draw(*lead, B, D, seed=seed, dtype=dtype, device=device),
        draw(*(() if shared else lead), N, D, seed=seed + 1, dtype=dtype, device=device),
        labels.to(device),
    )


def derive(loss_of, *tensors):
    """The loss of these tensors, and the gradients of a sum of its entries times factors other than
    1 ... for every tensor that is given.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    return loss.detach(), *torch.autograd.grad((loss * factors_of(loss)).sum(), leaves)


def factors_of(loss):
    """The upstream gradient of each entry of a loss."""
    return torch.linspace(0.5, 2.5, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)[
        : loss.numel()
    ].view(loss.shape)


def assert_as_exact_as_eager(ours, eagers, exacts, names=NAMES, scales=None):
    """The largest error against float64 is at most 1.5 times that of the eager expression in the
    same dtype, or 2 units in the last place.

    scales: what a unit in the last place is of, where a result is a sum that cancels: the sum of
        its terms' magnitudes.
    """
    for name, our, eager_one, exact in zip(names, ours, eagers, exacts, strict=True):
        assert our.shape == exact.shape and not our.isnan().any(), name
        error, allowed = (
            (our.double() - exact).abs().max().item(),
            1.5 * (eager_one.double() - exact).abs().max().item(),
        )
        scale = (scales or {}).get(name, exact.abs().max().item())
        floor = 2 * torch.finfo(our.dtype).eps * scale
        assert error <= max(allowed, floor), (
            f"{name}: error {error:.2e}, 1.5x eager's is {allowed:.2e}, two units in the last place are {floor:.2e}"
        )
