"""Triton kernels of the weighted average: the matrix or a table of pointers, groups, diagnostics,
and the streaming form.

Each thread loads 128 bits at a time wherever the address allows it. A row of the matrix begins at a
multiple of its stride, so a stride that is a multiple of 16 bytes is worth having; rows that are
tensors of their own are aligned whatever their length. Whole blocks take a path without masks,
because a mask that ends inside a vector splits it; only the ragged end takes the other.

Order: one program owns a block of columns and adds the rows in ascending number by fp64 `fma`; no
    atomics. Sums over columns (the diagnostics) leave one partial per
program, and a second launch adds those in a fixed order.

Letters: K clients, P entries of a row, G groups of weights.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from semanticfl_ref.kernels.dispatch import Variant, on_device, variant

SPECIALIZE_NOT = ["P", "K", "G", "row_stride", "programs"]


@triton.jit(do_not_specialize=SPECIALIZE_NOT)
def average_kernel(
    rows,
    weights,
    reference,
    average,
    partials,
    P,
    K,
    G,
    row_stride,
    programs,
    TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
    REFERENCE: tl.constexpr,
):
    """average[g] = sum_k weights[g, k] rows[k] / sum_k weights[g, k], for one block of columns and
    GROUPS groups; grid (blocks, tiles of groups).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= P:
        _average_block(
            rows,
            weights,
            reference,
            average,
            partials,
            start,
            P,
            K,
            G,
            row_stride,
            programs,
            TABLE,
            ALIGNMENT,
            GROUPS,
            BLOCK,
            DIAGNOSTICS,
            REFERENCE,
            False,
        )
    else:
        _average_block(
            rows,
            weights,
            reference,
            average,
            partials,
            start,
            P,
            K,
            G,
            row_stride,
            programs,
            TABLE,
            ALIGNMENT,
            GROUPS,
            BLOCK,
            DIAGNOSTICS,
            REFERENCE,
            True,
        )


@triton.jit
def _average_block(
    rows,
    weights,
    reference,
    average,
    partials,
    start,
    P,
    K,
    G,
    row_stride,
    programs,
    TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
    REFERENCE: tl.constexpr,
    MASKED: tl.constexpr,
):
    element: tl.constexpr = average.dtype.element_ty
    columns = start + tl.arange(0, BLOCK)[None, :]
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    stride = tl.cast(row_stride, tl.int64)
    total = tl.zeros((GROUPS,), tl.float64)
    sums = tl.zeros((GROUPS, BLOCK), tl.float64)
    for k in tl.range(0, K, loop_unroll_factor=4):
        values = _load(_row(rows, k, stride, element, TABLE, ALIGNMENT), columns, P, MASKED).to(
            tl.float64
        )
        weight = tl.load(
            weights + groups * K + k, mask=groups < G, other=1.0
        )  # a group that is not there must not divide 0 by 0
        shared = tl.broadcast_to(weight[:, None], (GROUPS, BLOCK))
        # A weight of 0 means that the row is absent, even when it holds NaN.
        sums = tl.where(
            shared == 0, sums, tl.fma(shared, tl.broadcast_to(values, (GROUPS, BLOCK)), sums)
        )
        total += weight
    mean = sums / tl.broadcast_to(total[:, None], (GROUPS, BLOCK))
    rounded = _rounded(mean, element)
    if GROUPS == 1:
        where = average + columns  # no group's offset, whose alignment the compiler would not know
    else:
        where = average + groups.to(tl.int64)[:, None] * P + columns
    if MASKED:
        tl.store(where, rounded, mask=(groups[:, None] < G) & (columns < P))
    elif GROUPS == 1:
        tl.store(where, rounded)
    else:
        tl.store(where, rounded, mask=tl.broadcast_to(groups[:, None] < G, (GROUPS, BLOCK)))
    if DIAGNOSTICS:
        origin = tl.zeros((1, BLOCK), tl.float64)
        if REFERENCE:
            origin = _load(reference, columns, P, MASKED).to(tl.float64)
        drift = mean - origin
        program = tl.program_id(0)
        for k in range(0, K):
            # The values come from the cache: this program has just read them.
            values = _load(_row(rows, k, stride, element, TABLE, ALIGNMENT), columns, P, MASKED)
            update = values.to(tl.float64) - origin
            tl.store(partials + tl.cast(k, tl.int64) * programs + program, _non_finite(values))
            tl.store(
                partials + tl.cast(K + k, tl.int64) * programs + program, tl.sum(update * update)
            )
            tl.store(
                partials + tl.cast(2 * K + k, tl.int64) * programs + program, tl.sum(update * drift)
            )


@triton.jit(do_not_specialize=SPECIALIZE_NOT)
def examine_kernel(
    row, reference, partials, P, programs, BLOCK: tl.constexpr, REFERENCE: tl.constexpr
):
    """One block of one row: how many entries are not finite, and the squared norm of row -
    reference. Grid (blocks,).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= P:
        _examine_block(row, reference, partials, start, P, programs, BLOCK, REFERENCE, False)
    else:
        _examine_block(row, reference, partials, start, P, programs, BLOCK, REFERENCE, True)


@triton.jit
def _examine_block(
    row,
    reference,
    partials,
    start,
    P,
    programs,
    BLOCK: tl.constexpr,
    REFERENCE: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = start + tl.arange(0, BLOCK)
    values = _load(row, columns, P, MASKED)
    tl.store(partials + tl.program_id(0), _non_finite(values))
    if REFERENCE:
        update = values.to(tl.float64) - _load(reference, columns, P, MASKED).to(tl.float64)
        tl.store(partials + tl.cast(programs, tl.int64) + tl.program_id(0), tl.sum(update * update))


@triton.jit(do_not_specialize=SPECIALIZE_NOT)
def reduce_kernel(partials, totals, programs, BLOCK: tl.constexpr):
    """totals[v] = the sum of partials[v, :], always in the same order. Grid (values,)."""
    value = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + value * programs + index, mask=index < programs, other=0.0)
    tl.store(totals + value, tl.sum(sums))


@triton.jit(do_not_specialize=SPECIALIZE_NOT)
def add_kernel(sums, total, row, weight, non_finite, P, BLOCK: tl.constexpr):
    """sums += weight * row and total += weight, unless the row has entries that are not finite:
    decided here, so that the host need not wait. Grid (blocks,).
    """
    if tl.load(non_finite) == 0:
        shared = tl.load(weight)
        start = tl.program_id(0).to(tl.int64) * BLOCK
        if start == 0:
            tl.store(total, tl.load(total) + shared)
        columns = start + tl.arange(0, BLOCK)
        if start + BLOCK <= P:
            values = tl.load(row + columns).to(tl.float64)
            tl.store(
                sums + columns,
                tl.fma(tl.broadcast_to(shared, (BLOCK,)), values, tl.load(sums + columns)),
            )
        else:
            inside = columns < P
            values = tl.load(row + columns, mask=inside, other=0.0).to(tl.float64)
            tl.store(
                sums + columns,
                tl.fma(
                    tl.broadcast_to(shared, (BLOCK,)),
                    values,
                    tl.load(sums + columns, mask=inside, other=0.0),
                ),
                mask=inside,
            )


@triton.jit
def _row(rows, k, stride, element: tl.constexpr, TABLE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where row k begins; ALIGNMENT bytes divide every row's address."""
    if TABLE:
        begin = tl.load(rows + k).to(tl.pointer_type(element))
    else:
        begin = rows + k * stride
    return tl.multiple_of(begin, ALIGNMENT)


@triton.jit
def _load(begin, columns, P, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(begin + columns, mask=columns < P, other=0.0)
    else:
        return tl.load(begin + columns)


@triton.jit
def _rounded(values, element: tl.constexpr):
    """fp64 to the nearest of a row's type, a 16-bit one by way of fp32, as torch does it."""
    single = values.to(tl.float32)
    if element == tl.bfloat16:
        # Half of the last place, ties to even, added to the bits: Triton's interpreter would cut
        # them off, and this is the same everywhere.
        bits = single.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return (
            tl.where(single == single, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        )
    else:
        return single.to(element)


@triton.jit
def _non_finite(values):
    """How many values are NaN or infinite, as fp64: exact below 2**53."""
    return tl.sum((tl.abs(values.to(tl.float32)) < float("inf")).to(tl.int32) == 0).to(tl.float64)


def block_sizes(clients: int, groups: int, itemsize: int, diagnostics: bool) -> dict[str, int]:
    """Columns per program, groups per program, and warps, by the shape alone."""
    tile = min(triton.next_power_of_2(groups), 4)
    # At least one 128-bit load per thread and row, and four rows under way at once
    # (loop_unroll_factor); 8 columns x groups per thread: the fp64 sums live in registers.
    block = 1024 // tile
    if diagnostics:
        # The rows' values are read twice; what a program holds of them in the cache is about 64
        # KiB.
        block = min(
            block, max(256, triton.next_power_of_2((64 << 10) // (clients * itemsize) + 1) // 2)
        )
    return {"BLOCK": block, "GROUPS": tile, "num_warps": min(4, max(1, block * itemsize // 512))}


STREAM = {"BLOCK": 1024, "num_warps": 4}
REDUCE = {"BLOCK": 1024, "num_warps": 4}


def average(
    rows: Sequence[torch.Tensor],
    weights_GK: torch.Tensor,
    reference_P: torch.Tensor | None,
    diagnostics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The average [G, P] of the rows' dtype, and the statistics fp64 [3, K] (or [0]): counts of
    non-finite values, squared norms, dot products.
    """
    entries, (groups, clients) = rows[0].shape[-1], weights_GK.shape
    average_GP = rows[0].new_empty(groups, entries)
    statistics = weights_GK.new_zeros((3, clients) if diagnostics else 0)
    launch_average(rows, weights_GK, reference_P, average_GP, statistics)
    return average_GP, statistics


def launch_average(
    rows: Sequence[torch.Tensor],
    weights_GK: torch.Tensor,
    reference_P: torch.Tensor | None,
    average_GP: torch.Tensor,
    statistics: torch.Tensor,
) -> None:
    """Writes average_GP, and statistics unless it is empty. `rows` is one matrix [K, P], or K rows
    [P].
    """
    (groups, clients), entries = weights_GK.shape, average_GP.shape[1]
    if entries == 0:
        return
    rows = [row if row.stride(-1) == 1 else row.contiguous() for row in rows]
    table = rows[0].ndim == 1
    diagnostics = statistics.numel() > 0
    options = block_sizes(clients, groups, rows[0].element_size(), diagnostics)
    programs = triton.cdiv(entries, options["BLOCK"])
    partials = statistics.new_empty((3, clients, programs)) if diagnostics else statistics
    addresses = [row.data_ptr() for row in rows] + (
        [] if table else [rows[0].stride(0) * rows[0].element_size()]
    )
    with on_device(average_GP):
        average_kernel[(programs, triton.cdiv(groups, options["GROUPS"]))](
            rows=_pointer_table(rows) if table else rows[0],
            weights=weights_GK.contiguous(),
            average=average_GP,
            partials=partials,
            reference=average_GP if reference_P is None else reference_P.contiguous(),
            P=entries,
            K=clients,
            G=groups,
            row_stride=0 if table else rows[0].stride(0),
            programs=programs,
            TABLE=table,
            ALIGNMENT=_alignment(addresses),
            DIAGNOSTICS=diagnostics,
            REFERENCE=reference_P is not None,
            **options,
        )
        if diagnostics:
            reduce_kernel[(3 * clients,)](
                partials=partials, totals=statistics, programs=programs, **REDUCE
            )


def launch_add(
    sums_P: torch.Tensor,
    total: torch.Tensor,
    row_P: torch.Tensor,
    weight: torch.Tensor,
    reference_P: torch.Tensor | None,
    statistics: torch.Tensor,
) -> None:
    """Examine a row: statistics fp64 [2] = non-finite values, squared norm of row - reference. If
    it is finite, add it to sums_P fp64 [P] and its weight to total fp64 [].
    """
    if row_P.numel() == 0:
        statistics.zero_()
        total += weight
        return
    row_P = row_P.contiguous()
    entries, programs = row_P.numel(), triton.cdiv(row_P.numel(), STREAM["BLOCK"])
    partials = (
        statistics.new_empty((2, programs))
        if reference_P is not None
        else statistics.new_empty((1, programs))
    )
    with on_device(row_P):
        examine_kernel[(programs,)](
            row=row_P,
            reference=row_P if reference_P is None else reference_P.contiguous(),
            partials=partials,
            P=entries,
            programs=programs,
            REFERENCE=reference_P is not None,
            **STREAM,
        )
        reduce_kernel[(len(partials),)](
            partials=partials, totals=statistics, programs=programs, **REDUCE
        )
        add_kernel[(programs,)](
            sums=sums_P,
            total=total,
            row=row_P,
            weight=weight,
            non_finite=statistics,
            P=entries,
            **STREAM,
        )


def variants() -> list[Variant]:
    """What launches of the loop's shapes compile: 10 clients, aligned rows."""
    found, ragged = [], tuple(SPECIALIZE_NOT)
    for dtype, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        of_rows, sums = (
            dict.fromkeys(("rows", "row", "reference", "average"), f"*{dtype}"),
            dict.fromkeys(
                ("weights", "partials", "sums", "total", "weight", "non_finite"), "*fp64"
            ),
        )
        for form, table, groups, diagnostics in (
            ("matrix", False, 1, False),
            ("table", True, 1, False),
            ("groups", False, 4, False),
            ("diagnostics", False, 1, True),
        ):
            tensors, constants = (
                of_rows | sums | ({"rows": "*i64"} if table else {}),
                {
                    "TABLE": table,
                    "ALIGNMENT": 16,
                    "DIAGNOSTICS": diagnostics,
                    "REFERENCE": diagnostics,
                },
            )
            found.append(
                variant(
                    f"weighted_average/{form}-{dtype}",
                    average_kernel,
                    tensors,
                    constants,
                    block_sizes(10, groups, itemsize, diagnostics),
                    ragged=ragged,
                )
            )
        found.append(
            variant(
                f"weighted_average/examine-{dtype}",
                examine_kernel,
                of_rows | sums,
                {"REFERENCE": True},
                STREAM,
                ragged=ragged,
            )
        )
        found.append(
            variant(
                f"weighted_average/add-{dtype}",
                add_kernel,
                of_rows | sums,
                {},
                STREAM,
                ragged=ragged,
            )
        )
    return [
        *found,
        variant(
            "weighted_average/reduce",
            reduce_kernel,
            {"partials": "*fp64", "totals": "*fp64"},
            {},
            REDUCE,
            ragged=ragged,
        ),
    ]


def _pointer_table(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows' addresses, int64 [K] on their device: copied from pinned memory, so that the host
    does not wait.
    """
    if rows[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a list of rows cannot be captured in a CUDA graph: their addresses are copied from host memory that will be used again. Pass one matrix [K, P]"
        )
    addresses = torch.tensor(
        [row.data_ptr() for row in rows], dtype=torch.int64, pin_memory=rows[0].is_cuda
    )
    return addresses.to(rows[0].device, non_blocking=True)


def _alignment(addresses: Sequence[int]) -> int:
    """The largest power of two, at most 16, that divides every address (in bytes)."""
    return next(
        size for size in (16, 8, 4, 2, 1) if all(address % size == 0 for address in addresses)
    )
