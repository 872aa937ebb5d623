"""The federated average of clients' rows, accumulated in fp64 in ascending client number.

    average_p = sum_k w_k rows_kp / sum_k w_k

Letters: K clients, P entries of a row.
"""

import torch


def weighted_average(rows_KP: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """Average rows by weights.

    Equals `(weights @ rows.double() / weights.sum()).to(rows.dtype)`, summed in row order.

    Args:
        rows_KP: float32, bfloat16 or float16 [K, P], in ascending client number.
        weights_K: [K], not negative, at least one positive; normalised here.

    Returns:
        [P], of the rows' dtype: one rounding.

    Raises:
        ValueError: shapes that do not fit; weights that are negative, not finite, or sum to zero.

    Source: FedAvg (McMahan et al. 2017, Algorithm 1); weights by sample count.
    """
    if rows_KP.ndim != 2 or weights_K.shape != rows_KP.shape[:1]:
        raise ValueError(f"rows {tuple(rows_KP.shape)} and weights {tuple(weights_K.shape)}: expected [K, P] and [K]")
    average = RunningAverage(rows_KP.shape[1], rows_KP.device)
    for row_P, weight in zip(rows_KP, weights_K.tolist(), strict=True):
        average.add(row_P, weight)
    return average.finish(rows_KP.dtype)


class RunningAverage:
    """The same average while rows arrive one after another: O(P) memory however many clients there are.

    Rows must come in ascending client number: the order of the sum is the order of the calls.
    """

    def __init__(self, entries: int, device: torch.device | str = "cpu"):
        self._sum_P = torch.zeros(entries, dtype=torch.float64, device=device)
        self._weight = 0.0

    def add(self, row_P: torch.Tensor, weight: float) -> None:
        """Add one row [P]; raises ValueError for a weight that is negative or not finite, or a row of another length."""
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight = {weight}: must be finite and not negative")
        if row_P.shape != self._sum_P.shape:
            raise ValueError(f"row {tuple(row_P.shape)}: expected {tuple(self._sum_P.shape)}")
        self._sum_P.add_(row_P, alpha=weight)
        self._weight += weight

    def finish(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The average [P]; raises ValueError when no weight was added."""
        if self._weight == 0:
            raise ValueError("the weights sum to zero: nothing to average")
        return (self._sum_P / self._weight).to(dtype)
