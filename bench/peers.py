"""What the kernels are compared with: plain expressions, the usual ways round their memory, and
other people's kernels where they are installed.

Letters: B queries, N keys, D feature width, K clients, P entries of a row.
Every InfoNCE peer is `(queries_BD, keys_ND, labels_B, temperature) -> mean loss`, normalises both
sides, and is differentiable."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def eager_info_nce(
    queries_BD: torch.Tensor, keys_ND: torch.Tensor, labels_B: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The expression itself: the matrix of similarities is stored, several times over in training."""
    similarities_BN = F.normalize(queries_BD, dim=-1) @ F.normalize(keys_ND, dim=-1).mT
    return F.cross_entropy(_at_least_fp32(similarities_BN) / temperature, labels_B)


def chunked_info_nce(
    queries_BD: torch.Tensor,
    keys_ND: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: float,
    rows: int = 2048,
) -> torch.Tensor:
    """The same over chunks of queries, each checkpointed: the similarities of one chunk at a time,
    computed again in the backward pass.
    """
    queries_BD, keys_ND = F.normalize(queries_BD, dim=-1), F.normalize(keys_ND, dim=-1)

    def part(chunk_BD: torch.Tensor, keys_ND: torch.Tensor, chunk_B: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            _at_least_fp32(chunk_BD @ keys_ND.mT) / temperature, chunk_B, reduction="sum"
        )

    chunks = zip(queries_BD.split(rows), labels_B.split(rows), strict=True)
    return sum(
        checkpoint(part, chunk_BD, keys_ND, chunk_B, use_reentrant=False, preserve_rng_state=False)
        for chunk_BD, chunk_B in chunks
    ) / len(labels_B)


def inf_cl() -> Callable | None:
    """Inf-CL's Triton kernels (`pip install inf_cl`), which want a width that 256 divides and
    compute in fp32; None where they are not installed.
    """
    try:
        from inf_cl import cal_inf_loss
    except Exception:  # it may be installed and not importable, for want of what it needs in turn
        return None

    def loss(queries_BD, keys_ND, labels_B, temperature):
        return cal_inf_loss(
            F.normalize(queries_BD, dim=-1) / temperature, F.normalize(keys_ND, dim=-1), labels_B
        )

    return loss


def liger() -> Callable | None:
    """Liger-Kernel's linear layer fused with cross-entropy: with the keys as its weights it is
    InfoNCE, in chunks; None where it is not installed.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except Exception:
        return None
    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(queries_BD, keys_ND, labels_B, temperature):
        return fused(
            F.normalize(keys_ND, dim=-1), F.normalize(queries_BD, dim=-1) / temperature, labels_B
        )

    return loss


def compiled(function: Callable, rehearse: bool) -> Callable:
    """`torch.compile(function)`; in a rehearsal the function itself, because compiling takes longer
    than all the rest.
    """
    if rehearse:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def eager_average(rows_KP: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """The average in fp64, rounded once: what the kernel computes, at the price of a copy of the
    rows in fp64.
    """
    return ((weights_K.double() / weights_K.double().sum()) @ rows_KP.double()).to(rows_KP.dtype)


def one_product(rows_KP: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """`weights @ rows`: one call of the matrix library, in the rows' dtype."""
    return (weights_K / weights_K.sum()).to(rows_KP.dtype) @ rows_KP


def flower() -> tuple[str, Callable]:
    """Its name and Flower's `aggregate` of [(layers, examples)]; where Flower is not installed, the
    same arithmetic in NumPy, and the name says so.
    """
    try:
        from flwr.server.strategy.aggregate import aggregate
    except Exception:
        return "NumPy, Flower's arithmetic", numpy_average
    return "Flower's aggregate", aggregate


def numpy_average(clients: list[tuple[list[np.ndarray], int]]) -> list[np.ndarray]:
    """Layer by layer: every client's layers times its examples, added client after client, over the
    number of all examples; in the layers' dtype.
    """
    scaled = [[layer * examples for layer in layers] for layers, examples in clients]
    total = sum(examples for _, examples in clients)
    averages = []
    for layer, first in enumerate(scaled[0]):
        accumulated = first
        for layers in scaled[1:]:
            accumulated = np.add(accumulated, layers[layer])
        averages.append(accumulated / total)
    return averages


def as_layers(params_P: torch.Tensor, sizes: list[int]) -> list[np.ndarray]:
    """A row as Flower sees a model: one NumPy array per layer."""
    return [layer.numpy() for layer in params_P.cpu().split(sizes)]


def _at_least_fp32(similarities: torch.Tensor) -> torch.Tensor:
    """Half-precision similarities over a small temperature need more digits than they have."""
    return similarities if similarities.dtype == torch.float64 else similarities.float()
