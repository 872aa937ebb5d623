"""The federated average of clients' rows, accumulated in fp64 in ascending client number.

    average_gp = sum_k w_gk rows_kp / sum_k w_gk

A product of a float32 entry (24 bits) and a weight that is an integer below 2**29, as a count of
samples is, is exact in fp64; what is rounded then is the sum, in the order of k, the division, and
once the result. A 16-bit result is rounded from fp32, so 16-bit rows lose nothing against averaging
in fp32 and rounding once. A weight of 0 means that the row is absent, even when it holds NaN.

What is moved, in bytes, with rows of s bytes per entry (the weights are nothing beside it):

    average              reads K P s             writes G P s    (rows are read once per 4 groups)
    ... with diagnostics reads K P s + P s       writes P s + 24 K per block of columns; a block's
    rows are read a second time, from the cache while they fit streaming, per row   reads 2 P s + 8
    P       writes 8 P      (+ P s for a reference on the CPU as on the GPU): the row is examined
    before it is added

Never allocated: the rows in fp64, a matrix out of a list of rows, a mask of [K, P]. On the CPU the
fp64 sums and products live in chunks that stay in the cache. `weights @ rows` is one library call
that moves the same K P s bytes; it sums in fp32, in an order of its own, and says nothing about the
clients.

Letters: K clients, P entries of a row, G groups of weights.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from semanticfl_ref.kernels.dispatch import implementation, with_fallback

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Diagnostics(NamedTuple):
    """What one pass over the rows says of each client; a streaming average returns the same of one
    row, without [K].
    """

    non_finite: torch.Tensor  # int64 [K]: entries that are NaN or infinite
    squared_update_norm: (
        torch.Tensor | None
    )  # float64 [K]: |row - reference|^2; not finite for a row that is not
    dot_with_average: (
        torch.Tensor | None
    )  # float64 [K]: <row - reference, average - reference>; NaN where the average has one


def weighted_average(
    rows: torch.Tensor | Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    reference: torch.Tensor | None = None,
    diagnostics: bool = False,
    validate: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, Diagnostics]:
    """Average rows by weights.

    Equals `(weights.double() @ rows.double() / weights.double().sum()).to(rows.dtype)`, summed in
    row order, without a row in fp64. Has no gradient.

    Equation (weighted-average) [FedAvg, Alg. 1]: average_p = sum_k w_k rows_kp / sum_k w_k
    Test: tests/kernels/test_weighted_average.py::test_on_paper

    Args:
        rows: float32, bfloat16 or float16 (float64: torch only) [K, P], or K tensors [P] of one
            dtype, which are not copied into a matrix; in ascending client number. A row whose
            entries do not lie side by side is copied. A list cannot be captured in a CUDA graph.
        weights: [K], or [G, K] for G averages of the same rows; real, not negative, in each group
            at least one positive; normalised here.
        reference: floating [P], the row that every client started from; None stands for zero, so
            that the rows are the updates.
        diagnostics: also return what the pass saw of each client; for weights [K].
        validate: check the weights' values on a GPU too, which waits for it; on the CPU they always
            are. Unchecked, weights that sum to zero give NaN.
        impl: "auto", "torch" or "triton"; see `dispatch`.

    Returns:
        [P] or [G, P], of the rows' dtype; with `diagnostics` a pair of it and `Diagnostics`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; rows that ask for a gradient; weights
            that are negative, not finite, or sum to zero.

    Source: FedAvg (McMahan et al. 2017, Algorithm 1); weights by sample count.
    """
    matrices = [rows] if isinstance(rows, torch.Tensor) else list(rows)
    _check(rows, matrices, weights, reference, diagnostics)
    weights_GK = weights.detach().to(torch.float64).reshape(-1, weights.shape[-1])
    plain = not torch.compiler.is_compiling() and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (*matrices, weights)
    )
    average = (
        _average if plain else _average_operator
    )  # an operator's dispatch costs more than the average of a short row; tracing needs it
    average_GP, statistics = average(matrices, weights_GK, reference, diagnostics, validate, impl)
    result = average_GP[0] if weights.ndim == 1 else average_GP
    if not diagnostics:
        return result
    return result, Diagnostics(statistics[0].to(torch.int64), statistics[1], statistics[2])


class RunningAverage:
    """The same average while rows arrive one after another: O(P) memory however many clients there
    are.

    Rows must come in ascending client number: the order of the sum is the order of the calls. The
    result is that of `weighted_average`, bit for bit."""

    def __init__(self, entries: int, device: torch.device | str = "cpu", impl: str = "auto"):
        self._sum_P = torch.zeros(entries, dtype=torch.float64, device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._impl = implementation(impl, torch.empty(0, device=device))

    @torch.no_grad()
    def add(
        self, row_P: torch.Tensor, weight: float, reference_P: torch.Tensor | None = None
    ) -> Diagnostics:
        """Examine a row, and add it if all of it is finite; the host waits for no GPU, unless the
        torch implementation runs there.

        Args:
            row_P: [P], a floating dtype, on the average's device.
            weight: finite, not negative, relative to the other rows' weights.
            reference_P: [P], the row that the client started from.

        Returns:
            Diagnostics of this row: `non_finite` int64 []; `squared_update_norm` float64 [], or
            None without a reference; `dot_with_average` None. A row with `non_finite` > 0 was not
            added, nor its weight: the caller stops, or goes on without that client.

        Raises:
            ValueError: a weight that is negative or not finite; a row or reference of another
                length or device, or not of a floating dtype.
        """
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight = {weight}: must be finite and not negative")
        for name, tensor in (("row", row_P), ("reference", reference_P)):
            if tensor is not None and (
                tensor.shape != self._sum_P.shape
                or tensor.dtype not in DTYPES
                or tensor.device != self._sum_P.device
            ):
                raise ValueError(
                    f"{name} {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: expected {tuple(self._sum_P.shape)}, floating, on {self._sum_P.device}"
                )
        if self._impl == "torch" or row_P.dtype == torch.float64:
            return self._add_torch(row_P, weight, reference_P)

        def fall_back() -> Diagnostics:
            self._impl = "torch"
            return self._add_torch(row_P, weight, reference_P)

        return with_fallback(lambda: self._add_triton(row_P, weight, reference_P), fall_back)

    def finish(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The average [P]; raises ValueError when no weight was added (on a GPU: NaN, so that the
        host need not wait).
        """
        if not self._sum_P.is_cuda and self._total == 0:
            raise ValueError("the weights sum to zero: nothing to average")
        average_P = torch.empty(self._sum_P.shape, dtype=dtype, device=self._sum_P.device)
        for out, total in zip(_chunks(average_P), _chunks(self._sum_P), strict=True):
            out.copy_(total / self._total)
        return average_P

    def _add_torch(
        self, row_P: torch.Tensor, weight: float, reference_P: torch.Tensor | None
    ) -> Diagnostics:
        non_finite = _count_non_finite(row_P)
        added = weight > 0 and non_finite == 0
        if added:
            self._total += weight
        if reference_P is None:
            if added:
                for sums, row in zip(_chunks(self._sum_P), _chunks(row_P), strict=True):
                    sums.add_(row, alpha=weight)
            return Diagnostics(torch.tensor(non_finite, device=row_P.device), None, None)
        squared_norm = 0.0
        for sums, row, reference in zip(
            _chunks(self._sum_P), _chunks(row_P), _chunks(reference_P), strict=True
        ):
            update = row.to(torch.float64, copy=True)
            if added:
                sums.add_(update, alpha=weight)
            update.sub_(reference)
            squared_norm += update.dot(update).item()
        return Diagnostics(
            torch.tensor(non_finite, device=row_P.device),
            torch.tensor(squared_norm, dtype=torch.float64, device=row_P.device),
            None,
        )

    def _add_triton(
        self, row_P: torch.Tensor, weight: float, reference_P: torch.Tensor | None
    ) -> Diagnostics:
        from semanticfl_ref.kernels.weighted_average_triton import launch_add

        statistics = torch.zeros(2, dtype=torch.float64, device=row_P.device)
        launch_add(
            self._sum_P,
            self._total,
            row_P,
            torch.full_like(self._total, weight),
            reference_P,
            statistics,
        )
        return Diagnostics(
            statistics[0].to(torch.int64), None if reference_P is None else statistics[1], None
        )


def weighted_average_reference(
    matrices: Sequence[torch.Tensor],
    weights_GK: torch.Tensor,
    reference_P: torch.Tensor | None,
    diagnostics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain torch, chunk by chunk of columns: the average [G, P], and float64 [3,
    K] (or [0]) of counts, squared norms and dot products.
    """
    rows = matrices if matrices[0].ndim == 1 else matrices[0].unbind()
    (groups, clients), entries, device = weights_GK.shape, rows[0].numel(), rows[0].device
    weights = weights_GK.tolist()
    average_GP = torch.empty(groups, entries, dtype=rows[0].dtype, device=device)
    counts, squared_norms, dots = [0] * clients, [0.0] * clients, [0.0] * clients
    totals_G = [
        torch.tensor(_in_order(group), dtype=torch.float64, device=device) for group in weights
    ]
    sources = [_chunks(row) for row in rows]
    for number, out_G in enumerate(
        zip(*(_chunks(average_P) for average_P in average_GP), strict=True)
    ):
        chunk_K = [source[number] for source in sources]
        for out, group, total in zip(out_G, weights, totals_G, strict=True):
            sums = torch.zeros(out.shape, dtype=torch.float64, device=device)
            for row, weight in zip(chunk_K, group, strict=True):
                if weight != 0:
                    sums.add_(row, alpha=weight)
            out.copy_(sums.div_(total))
        if diagnostics:
            origin = (
                torch.zeros_like(sums)
                if reference_P is None
                else _chunks(reference_P)[number].double()
            )
            drift = sums - origin
            for k, row in enumerate(chunk_K):
                update = row.to(torch.float64, copy=True).sub_(origin)
                squared_norm = update.dot(update).item()
                counts[k] += 0 if math.isfinite(squared_norm) else _count_non_finite(row)
                squared_norms[k] += squared_norm
                dots[k] += update.dot(drift).item()
    statistics = torch.tensor(
        [counts, squared_norms, dots] if diagnostics else [], dtype=torch.float64, device=device
    )
    return average_GP, statistics


def _average(
    matrices: Sequence[torch.Tensor],
    weights_GK: torch.Tensor,
    reference_P: torch.Tensor | None,
    diagnostics: bool,
    validate: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix [K, P] or K rows [P] -> the average [G, P], and float64 [3, K] (or [0])."""
    if validate or not weights_GK.is_cuda:
        _check_values(weights_GK)

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        return weighted_average_reference(matrices, weights_GK, reference_P, diagnostics)

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        from semanticfl_ref.kernels.weighted_average_triton import average

        return average(matrices, weights_GK, reference_P, diagnostics)

    return (
        with_fallback(launch, reference)
        if implementation(impl, *matrices) == "triton"
        else reference()
    )


_average_operator = torch.library.custom_op(
    "semanticfl_ref::weighted_average", _average, mutates_args=()
)


@_average_operator.register_fake
def _(matrices, weights_GK, reference_P, diagnostics, validate, impl):
    groups, clients = weights_GK.shape
    return matrices[0].new_empty(groups, matrices[0].shape[-1]), weights_GK.new_empty(
        (3, clients) if diagnostics else 0
    )


def _check(
    rows,
    matrices: list[torch.Tensor],
    weights: torch.Tensor,
    reference: torch.Tensor | None,
    diagnostics: bool,
) -> None:
    """Shapes, dtypes and devices: all that can be checked without looking at values."""
    if not matrices or not isinstance(weights, torch.Tensor):
        raise ValueError(
            f"rows: {len(matrices)} of them, weights: {type(weights).__name__}; expected at least one row, and a tensor"
        )
    clients = (
        matrices[0].shape[0] if isinstance(rows, torch.Tensor) and rows.ndim == 2 else len(matrices)
    )
    if matrices[0].ndim != (2 if isinstance(rows, torch.Tensor) else 1) or any(
        tensor.shape != matrices[0].shape for tensor in matrices
    ):
        raise ValueError(
            f"rows {_shapes(matrices)}: expected one tensor [K, P], or K tensors [P] of one length"
        )
    if weights.ndim not in (1, 2) or weights.shape[-1] != clients or 0 in weights.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} and {clients} rows {_shapes(matrices)}: expected weights [K] or [G, K], with K and G at least 1"
        )
    if weights.dtype.is_complex:
        raise ValueError(f"weights of {weights.dtype}: expected real numbers")
    if diagnostics and weights.ndim == 2:
        raise ValueError(
            f"diagnostics = True with weights {tuple(weights.shape)}: they belong to one average. Pass weights [K]"
        )
    if reference is not None and reference.shape != matrices[0].shape[-1:]:
        raise ValueError(
            f"reference {tuple(reference.shape)} and rows {_shapes(matrices)}: expected [P], the length of a row"
        )
    first = matrices[0]
    for name, tensor in [("rows", tensor) for tensor in matrices] + (
        [] if reference is None else [("reference", reference)]
    ):
        if tensor.dtype not in DTYPES or (name == "rows" and tensor.dtype != first.dtype):
            raise ValueError(
                f"{name} of {tensor.dtype}, first row of {first.dtype}: expected floating, and one dtype for all rows. Convert with .to(dtype)"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires_grad = True, and the average has no gradient. Use torch.no_grad() or .detach()"
            )
    for name, tensor in (
        ("weights", weights),
        ("reference", reference),
        *(("rows", tensor) for tensor in matrices),
    ):
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{name} on {tensor.device}, first row on {first.device}: expected one device. Move with .to(device)"
            )


def _shapes(tensors: list[torch.Tensor]) -> str:
    return " and ".join(sorted({str(tuple(tensor.shape)) for tensor in tensors}))


def _check_values(weights_GK: torch.Tensor) -> None:
    for group, values in enumerate(weights_GK.tolist()):
        where = f"weights[{group}]" if len(weights_GK) > 1 else "weights"
        for k, weight in enumerate(values):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{where}[{k}] = {weight}: must be finite and not negative")
        if not 0 < _in_order(values) < float("inf"):
            raise ValueError(
                f"{where} = {values}: they sum to zero, or above what fp64 holds; at least one must be positive"
            )


def _in_order(values: Iterable[float]) -> float:
    """Their sum one after another. Python's `sum` compensates from 3.12 on, which a running sum
    does not.
    """
    total = 0.0
    for value in values:
        total += value
    return total


def _chunks(tensor_P: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of a row: on the CPU as long as a chunk in fp64 stays in the cache and every thread has
    enough of it; elsewhere the whole row.
    """
    # torch splits work among threads by 32 768 entries. Measured on one core, 4.9 M entries: 19.7
    # ms for the whole row, 4.2 ms in chunks of 65 536, 3.1 ms of 131 072.
    size = 32_768 * max(4, torch.get_num_threads())
    return (tensor_P,) if tensor_P.is_cuda or tensor_P.numel() <= size else tensor_P.split(size)


def _count_non_finite(row_P: torch.Tensor) -> int:
    """Entries that are NaN or infinite."""
    # A sum is finite only if every entry is: one reading at memory speed. It can overflow without
    # them, so only a sum that is not finite needs the count.
    if math.isfinite(
        row_P.sum(dtype=torch.float64 if row_P.dtype == torch.float64 else torch.float32).item()
    ):
        return 0
    return sum(int((~torch.isfinite(chunk)).sum()) for chunk in _chunks(row_P))
