"""The federated average of clients' parameters, accumulated in fp64 in ascending client number.

    average_p = sum_s w_s params_sp / sum_s w_s

Letters: S clients of a cohort, P size of a flat vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Average(NamedTuple):
    """A weighted average, or the running sum of one.

    Attributes:
        values_P: the average [P] in the parameters' dtype; of a pass that is not final, float64 [P],
            the sum of weight * parameters so far.
        weight: float64 [], the sum of the weights so far.
        non_finite_S: int64 [S], entries of each client that are NaN or infinite; None without a
            reference.
        squared_norm_S: float64 [S], |params - reference|^2 of each client; None without a reference.
    """

    values_P: torch.Tensor
    weight: torch.Tensor
    non_finite_S: torch.Tensor | None
    squared_norm_S: torch.Tensor | None


def weighted_average(
    params_SP: torch.Tensor,
    weights_S: torch.Tensor,
    reference_P: torch.Tensor | None = None,
    earlier: Average | None = None,
    *,
    final: bool = True,
    impl: str = "auto",
) -> Average:
    """Average clients' parameters by weights, one cohort after another.

    Equals `(weights.double() @ params.double() / weights.double().sum()).to(params.dtype)`, summed in
    the order of the clients, without a client's parameters in fp64. A weight of 0 means that the
    client is absent, whatever its parameters are. Has no gradient.

    Equation (weighted-average) [FedAvg, Alg. 1]: average_p = sum_s w_s params_sp / sum_s w_s
    Test: tests/kernels/test_weighted_average.py::test_on_paper
    """
    clients, entries = params_SP.shape
    device = params_SP.device
    weights = weights_S.tolist()
    total = earlier.weight.item() if earlier is not None else 0.0
    for w in weights:
        total += w
    out_P = torch.empty(entries, dtype=params_SP.dtype if final else torch.float64, device=device)
    counts, norms = [0] * clients, [0.0] * clients
    rows = [_chunks(row) for row in params_SP.unbind()]
    for n, out in enumerate(_chunks(out_P)):
        chunk = [row[n] for row in rows]
        if earlier is None:
            sums = torch.zeros(out.shape, dtype=torch.float64, device=device)
        else:
            sums = _chunks(earlier.values_P)[n].clone()
        for row, w in zip(chunk, weights, strict=True):
            if w != 0:
                sums.add_(row, alpha=w)
        out.copy_(
            sums.div_(torch.tensor(total, dtype=torch.float64, device=device)) if final else sums
        )
        if reference_P is not None:
            origin = _chunks(reference_P)[n].double()
            for s, row in enumerate(chunk):
                update = row.to(torch.float64, copy=True).sub_(origin)
                norms[s] += update.dot(update).item()
                counts[s] += int((~torch.isfinite(row)).sum())
    diagnostics = (None, None)
    if reference_P is not None:
        diagnostics = (
            torch.tensor(counts, device=device),
            torch.tensor(norms, dtype=torch.float64, device=device),
        )
    return Average(out_P, torch.tensor(total, dtype=torch.float64, device=device), *diagnostics)


def _chunks(tensor_P: torch.Tensor) -> Sequence[torch.Tensor]:
    size = 32_768 * max(4, torch.get_num_threads())
    whole = tensor_P.is_cuda or tensor_P.numel() <= size
    return (tensor_P,) if whole else tensor_P.split(size)
