"""The federated average of clients' parameters, summed in float64 in ascending client number.

    average_p = sum_s w_s params_sp / sum_s w_s

A product of a float32 entry (24 bits) and a weight that is an integer below 2**29, as a number of
samples is, is exact in float64. Rounding happens in the sum (in the order of s), in the division,
and once when the result is stored (in 16 bits: by way of float32). A weight of 0 means that the
client is absent, even if its parameters are NaN. There is no gradient.

The same pass may compare every client with the parameters that the clients started from: how many
of its entries are NaN or infinite, and |params - start|^2. And it may continue an earlier pass: K
clients in cohorts of S take O(S P) memory and give, bit for bit, the result of one pass over all K.

One program owns a block of columns and adds the clients in order: nothing depends on timing. Its
comparisons are partial sums, which a second, tiny launch adds in a fixed order. Bytes of device
memory for S clients, e to an entry:

    reads     S P e                              + P e with the start, + 8 P to continue
    writes    P e, or 8 P if more cohorts follow + 12 S per KiB of a row with the start

Each thread loads 128 bits at a time where addresses allow it: give rows a stride that is a multiple
of 16 bytes. Never allocated: parameters in float64, a mask [S, P].

Letters: K clients of a round, S clients of a cohort, P parameters.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from semanticfl_ref.kernels.checks import require_floating, require_tensors
from semanticfl_ref.kernels.dispatch import implementation, on_device, tl, triton, with_fallback

INTEGERS = ["P", "S", "row_stride"]  # one compiled kernel for all their values


class Average(NamedTuple):
    """A weighted average, or the running sum of one.

    Attributes:
        values_P: the average [P] in the parameters' dtype; of a pass that is not final, float64
            [P], the sum of weight * parameters so far.
        weight: float64 [], the sum of the weights so far.
        non_finite_S: int64 [S], each client's entries that are NaN or infinite; None without start.
        squared_norm_S: float64 [S], |params - start|^2 of each client, not finite for a client that
            is not; None without start.
        final: whether the sum was divided by the weights; if so, it cannot be continued.
    """

    values_P: Tensor
    weight: Tensor
    non_finite_S: Tensor | None
    squared_norm_S: Tensor | None
    final: bool


def weighted_average_reference(
    params_SP: Tensor,
    weights_S: Tensor,
    start_P: Tensor | None,
    sums_P: Tensor | None,
    weight: Tensor | None,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in plain torch, which reads values on the host.

    Args:
        params_SP, weights_S, start_P, final: as `weighted_average` has them.
        sums_P, weight: of the pass to continue.

    Returns:
        The tensors of `Average`; without `start_P` the last two are empty.
    """
    (S, P), device = params_SP.shape, params_SP.device
    weights, total = weights_S.tolist(), 0.0 if weight is None else weight.item()
    for w in weights:
        total += w  # one after another: Python's `sum` compensates
    total = torch.tensor(total, dtype=torch.float64, device=device)
    values_P = params_SP.new_empty(P, dtype=params_SP.dtype if final else torch.float64)
    non_finite, squared_norm = [0] * S, [0.0] * S
    for p in _column_slices(params_SP):
        added_P = torch.zeros_like(values_P[p], dtype=torch.float64)
        if sums_P is not None:
            added_P.copy_(sums_P[p])
        for s, w in enumerate(weights):
            if w != 0:
                added_P.add_(params_SP[s, p], alpha=w)
        values_P[p] = added_P.div_(total) if final else added_P
        if start_P is None:
            continue
        for s in range(S):
            update_P = params_SP[s, p].to(torch.float64, copy=True).sub_(start_P[p])
            square = update_P.dot(update_P).item()
            squared_norm[s] += square
            if not math.isfinite(square):
                non_finite[s] += int((~torch.isfinite(params_SP[s, p])).sum())
    compared = S if start_P is not None else 0
    non_finite_S = torch.tensor(non_finite[:compared], dtype=torch.int64, device=device)
    squared_norm_S = torch.tensor(squared_norm[:compared], dtype=torch.float64, device=device)
    return values_P, total, non_finite_S, squared_norm_S


@triton.jit(do_not_specialize=INTEGERS)
def weighted_average_kernel(
    rows, weights, start, sums, weight, values, total, non_finite, squared_norm, P, S,
    row_stride, FINAL: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of the average, and its part of each client's comparison; `start`, or
    `sums` and `weight`, may be None. Grid (blocks,).
    """
    # Whole blocks take a path without masks: a mask that ends inside a vector splits it.
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= P:
        average_block(
            rows, weights, start, sums, weight, values, total, non_finite, squared_norm, P, S,
            row_stride, FINAL, ALIGNMENT, BLOCK, False,
        )  # fmt: skip
    else:
        average_block(
            rows, weights, start, sums, weight, values, total, non_finite, squared_norm, P, S,
            row_stride, FINAL, ALIGNMENT, BLOCK, True,
        )  # fmt: skip


@triton.jit
def average_block(
    rows, weights, start, sums, weight, values, total, non_finite, squared_norm, P, S,
    row_stride, FINAL: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.num_programs(0)
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride = tl.cast(row_stride, tl.int64)
    added = tl.zeros((BLOCK,), tl.float64)
    weight_sum = tl.zeros((), tl.float64)
    if sums is not None:
        added = load(sums, p, P, MASKED)
        weight_sum = tl.load(weight)
    start_row = tl.zeros((BLOCK,), tl.float64)
    if start is not None:
        start_row = load(start, p, P, MASKED).to(tl.float64)
    for s in tl.range(0, S, loop_unroll_factor=4):  # four rows are under way at once
        row = load(tl.multiple_of(rows + s * stride, ALIGNMENT), p, P, MASKED)
        w = tl.load(weights + s)
        weight_sum += w
        with_row = tl.fma(tl.broadcast_to(w, (BLOCK,)), row.to(tl.float64), added)
        added = tl.where(w == 0, added, with_row)
        if start is not None:
            update = row.to(tl.float64) - start_row
            is_finite = tl.abs(row.to(tl.float32)) < float("inf")
            place = tl.cast(s, tl.int64) * blocks + block
            tl.store(non_finite + place, tl.sum(tl.where(is_finite, 0, 1)))
            tl.store(squared_norm + place, tl.sum(update * update))
    if block == 0:
        tl.store(total, weight_sum)
    if FINAL:
        average = added / tl.broadcast_to(weight_sum, (BLOCK,))
        result = round_to(average, values.dtype.element_ty)
    else:
        result = added
    if MASKED:
        tl.store(values + p, result, mask=p < P)
    else:
        tl.store(values + p, result)


@triton.jit
def load(begin, p, P, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(begin + p, mask=p < P, other=0.0)
    else:
        return tl.load(begin + p)


@triton.jit
def round_to(values, element: tl.constexpr):
    """float64 to the nearest of a dtype, a 16-bit one by way of float32, as torch does it."""
    single = values.to(tl.float32)
    if element == tl.bfloat16:
        # Triton's interpreter truncates: add half of the last place, ties to even, to the bits.
        bits = single.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(single == single, nearest, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return single.to(element)


@triton.jit(do_not_specialize=["blocks"])
def add_blocks_kernel(
    non_finite, squared_norm, non_finite_S, squared_norm_S, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of a client's partials, always in the same order. Grid (clients,)."""
    s = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.int64)
    square = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        count += tl.load(non_finite + s * blocks + block, mask=block < blocks, other=0)
        square += tl.load(squared_norm + s * blocks + block, mask=block < blocks, other=0.0)
    tl.store(non_finite_S + s, tl.sum(count))
    tl.store(squared_norm_S + s, tl.sum(square))


ADD_BLOCKS = {"BLOCK": 1024, "num_warps": 4}


def block_sizes(dtype: torch.dtype, compared: bool) -> dict[str, int]:
    """32 bytes of a row for each thread. A comparison takes one warp: its sums need no barrier.
    Products are fused with sums where the kernel says so, not where the compiler would."""
    warps = 1 if compared else 4
    sizes = {"BLOCK": warps * 1024 // dtype.itemsize, "num_warps": warps}
    return sizes | {"enable_fp_fusion": False}


def launch(
    params_SP: Tensor,
    weights_S: Tensor,
    start_P: Tensor | None,
    sums_P: Tensor | None,
    weight: Tensor | None,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and result as `weighted_average_reference` has them; weights float64."""
    params_SP = params_SP if params_SP.stride(1) == 1 else params_SP.contiguous()
    (S, P), compared, new = params_SP.shape, start_P is not None, params_SP.new_empty
    sizes = block_sizes(params_SP.dtype, compared)
    blocks = triton.cdiv(P, sizes["BLOCK"])
    partials, totals = ((S, blocks), S) if compared else (0, 0)
    non_finite = new(partials, dtype=torch.int32)
    squared_norm = new(partials, dtype=torch.float64)
    values_P = new(P, dtype=params_SP.dtype if final else torch.float64)
    total = new((), dtype=torch.float64)
    non_finite_S, squared_norm_S = new(totals, dtype=torch.int64), new(totals, dtype=torch.float64)
    row_bytes = params_SP.stride(0) * params_SP.element_size()
    with on_device(params_SP):
        weighted_average_kernel[(blocks,)](
            rows=params_SP,
            weights=weights_S.contiguous(),
            start=start_P.contiguous() if compared else None,
            sums=None if sums_P is None else sums_P.contiguous(),
            weight=weight,
            values=values_P,
            total=total,
            non_finite=non_finite,
            squared_norm=squared_norm,
            P=P,
            S=S,
            row_stride=params_SP.stride(0),
            FINAL=final,
            # The largest power of two up to 16 that divides the address of every row.
            ALIGNMENT=math.gcd(16, params_SP.data_ptr(), row_bytes),
            **sizes,
        )
        if compared:
            add_blocks_kernel[(S,)](
                non_finite=non_finite,
                squared_norm=squared_norm,
                non_finite_S=non_finite_S,
                squared_norm_S=squared_norm_S,
                blocks=blocks,
                **ADD_BLOCKS,
            )
    return values_P, total, non_finite_S, squared_norm_S


@torch.library.custom_op("semanticfl_ref::weighted_average", mutates_args=())
def weighted_average_operator(
    params_SP: Tensor,
    weights_S: Tensor,
    start_P: Tensor | None,
    sums_P: Tensor | None,
    weight: Tensor | None,
    final: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chosen implementation as a torch operator, which `torch.compile` knows. No gradient."""
    arguments = (params_SP, weights_S, start_P, sums_P, weight, final)
    reference = partial(weighted_average_reference, *arguments)
    obstacle = "no parameters" if params_SP.numel() == 0 else None
    if implementation(impl, params_SP, obstacle=obstacle) == "torch":
        return reference()
    return with_fallback(partial(launch, *arguments), reference, impl)


@weighted_average_operator.register_fake
def _(params_SP, weights_S, start_P, sums_P, weight, final, impl):
    (S, P), new = params_SP.shape, params_SP.new_empty
    values_P = new(P, dtype=params_SP.dtype if final else torch.float64)
    totals = S if start_P is not None else 0
    total, norms = new((), dtype=torch.float64), new(totals, dtype=torch.float64)
    return values_P, total, new(totals, dtype=torch.int64), norms


def weighted_average(
    params_SP: Tensor,
    weights_S: Tensor,
    start_P: Tensor | None = None,
    earlier: Average | None = None,
    *,
    final: bool = True,
    impl: str = "auto",
    validate: bool = False,
) -> Average:
    """Average clients' parameters by weights, one cohort after another.

    Equals `(weights.double() @ params.double() / weights.double().sum()).to(params.dtype)`, summed
    in the order of the clients, without a client's parameters in float64. Has no gradient.

    Equation (weighted-average) [FedAvg, Alg. 1]: average_p = sum_s w_s params_sp / sum_s w_s
    Test: tests/kernels/test_weighted_average.py::test_on_paper

    Args:
        params_SP: float32, bfloat16, float16 or float64 (torch only) [S, P], in ascending client
            number. Rows may lie apart; a matrix whose rows are not contiguous is copied.
        weights_S: [S], real, not negative; normalised here. 0: the client is absent, even with NaN.
        start_P: [P], of params' dtype, the parameters that the clients started from, with which
            every client is compared, those of weight 0 too.
        earlier: the result of an earlier cohort, which was not final, to be continued.
        final: divide by the weights. Otherwise the result is the sum so far, for `earlier`.
        impl: "auto" (the kernel for CUDA tensors where it takes the call, else torch), "torch", or
            "triton" (the kernel or an error); see `dispatch`.
        validate: check the weights' values too, which waits for the device. Unchecked, weights that
            sum to zero give NaN.

    Returns:
        The average, or the sum so far, with the comparison of this cohort's clients.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes, dtypes or devices that do not fit; a tensor that wants a gradient; a
            final average as `earlier`; with `validate`, weights that are negative, not finite, or
            sum to zero; an unknown `impl`; `impl="triton"` where the kernel cannot run.

    Source: FedAvg (McMahan et al. 2017, Algorithm 1); weights by sample count.
    """
    _check(params_SP, weights_S, start_P, earlier)
    if validate:
        _check_values(weights_S, earlier)
    before = (None, None) if earlier is None else earlier[:2]
    weights_S = weights_S.to(torch.float64)
    average = weighted_average_operator(params_SP, weights_S, start_P, *before, final, impl)
    return Average(*average[:2], *(average[2:] if start_P is not None else (None, None)), final)


def _column_slices(params_SP: Tensor) -> Iterator[slice]:
    """All columns, on a CPU in chunks: short enough for float64 sums to stay in the cache, and long
    enough for every thread, of which torch gives each 32 768 entries."""
    P = params_SP.shape[1]
    # One core, 4.9 M entries: 19.7 ms for all columns at once, 3.1 ms in chunks of 131 072.
    size = P if params_SP.is_cuda else 32_768 * max(4, torch.get_num_threads())
    for start in range(0, P, max(size, 1)):
        yield slice(start, min(start + size, P))


def _check(
    params_SP: Tensor, weights_S: Tensor, start_P: Tensor | None, earlier: Average | None
) -> None:
    """Shapes, dtypes and devices: all that can be checked without looking at values."""
    vectors = {} if start_P is None else {"start": start_P}
    vectors |= {} if earlier is None else {"earlier": earlier.values_P}
    given = {"params": params_SP, "weights": weights_S, **vectors}
    require_tensors(**given)
    require_floating(params=params_SP, **vectors)
    shape = tuple(params_SP.shape)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"params {shape}: expected [S, P], at least one client")
    if tuple(weights_S.shape) != shape[:1] or weights_S.dtype.is_complex:
        weights = f"weights {tuple(weights_S.shape)} {weights_S.dtype}"
        raise ValueError(f"{weights}, params {shape}: expected one real number per client")
    if earlier is not None and (earlier.final or earlier.values_P.dtype != torch.float64):
        raise ValueError(
            f"earlier of {earlier.values_P.dtype}, final = {earlier.final}: a final average cannot "
            "be continued; pass final=False to every cohort but the last"
        )
    for name, tensor in vectors.items():
        if tuple(tensor.shape) != shape[1:]:
            raise ValueError(f"{name} {tuple(tensor.shape)}, params {shape}: expected [P]")
        # Else the compiler would add a comparison's entries in another order in every form.
        if name == "start" and tensor.dtype != params_SP.dtype:
            raise ValueError(f"start of {tensor.dtype}: expected params' {params_SP.dtype}")
    for name, tensor in given.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} with requires_grad = True: the average has no gradient; use "
                "torch.no_grad() or .detach()"
            )


def _check_values(weights_S: Tensor, earlier: Average | None) -> None:
    total = 0.0 if earlier is None else earlier.weight.item()
    for s, w in enumerate(weights_S.tolist()):
        if not 0 <= w < math.inf:
            raise ValueError(f"weights[{s}] = {w}: must be finite and not negative")
        total += w
    if not 0 < total < math.inf:
        raise ValueError(f"weights sum to {total}: must be positive and finite")
