"""What the kernels are compared with: eager expressions, and Flower's aggregation.

Letters: B queries, N keys, D feature width, S clients, P size of a flat vector.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

EAGER = "eager, client by client"
COPY = "device copy"
PRODUCT = "weights @ params"
ON_THE_HOST = ", on the host"


def eager_info_nce(
    queries_BD: torch.Tensor, keys_ND: torch.Tensor, labels_B: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The mean loss as the expression itself: the logits are stored."""
    logits_BN = F.normalize(queries_BD, dim=-1) @ F.normalize(keys_ND, dim=-1).mT
    if logits_BN.dtype != torch.float64:
        logits_BN = logits_BN.float()  # half precision over a small temperature has too few digits
    return F.cross_entropy(logits_BN / temperature, labels_B)


def compiled(function: Callable, rehearse: bool) -> Callable:
    """`torch.compile(function)`; in a rehearsal the function itself, since compiling takes longer
    than all the rest."""
    if rehearse:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def eager_average(params_SP: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
    """The average [P] in fp64, rounded once: what the kernel computes, but with a copy of all
    parameters in fp64."""
    shares_S = weights_S.double() / weights_S.double().sum()
    return (shares_S @ params_SP.double()).to(params_SP.dtype)


def one_product(params_SP: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
    """`weights @ params` [P]: one matrix product in the parameters' dtype, in no fixed order of
    summation."""
    return (weights_S / weights_S.sum()).to(params_SP.dtype) @ params_SP


def flower() -> tuple[str, Callable]:
    """Its name, and Flower's `aggregate` of [(layers, examples)].

    Where Flower is not installed, its arithmetic in NumPy; the name says so.
    """
    try:
        from flwr.server.strategy.aggregate import aggregate
    except Exception:  # an installation that lacks a requirement raises more than ImportError
        return "NumPy, Flower's arithmetic", numpy_average
    return "Flower's aggregate", aggregate


def numpy_average(clients: list[tuple[list[np.ndarray], int]]) -> list[np.ndarray]:
    """Layer by layer, every client's layer times its examples, added client by client, over the
    total number of examples; in the layers' dtype."""
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
    """A flat vector as Flower sees a model: one NumPy array per layer."""
    return [layer.numpy() for layer in params_P.cpu().split(sizes)]
