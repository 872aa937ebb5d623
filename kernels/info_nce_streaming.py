"""InfoNCE forward where the keys do not fit on chip: each tile of rows walks over all keys with a running maximum and sum.

    m' = max(m, max_n x_n)        s' = s 2^(m - m') + sum_n 2^(x_n - m')        x_n = log2(e) q_b . k_n / (|q_b| |k_n| tau)
    l_b = ln 2 (log2 s + (m - x_y))

The logits live in base 2, where the exponential is one instruction. m and s are saved apart rather than as one log-sum-exp: at tau = 0.005 the logits reach 300,
and p = 2^(x - m) / s keeps the digits that p = 2^(x - (m + log2 s)) would lose. The gradients recompute x from the inputs, see `info_nce_gradient.py`.

Launches: inverse norms of queries and of keys (one read of each), this kernel, and one that adds the losses of a client in a fixed order. The loop runs over
(tile of keys, chunk of D) as one: with a loop inside a loop the loads of a tile's first chunks would wait for the softmax of the tile before.

Bytes from the cache or memory: B D e ceil(N / BLOCK_N) + N D e ceil(B / BLOCK_B); written 16 B + 4 N. Arithmetic: 2 B N D operations.
Never allocated: anything of size B x N.

Letters: G clients, B queries, N keys, D feature width.
"""

import torch
import triton
import triton.language as tl

from semanticfl_ref.kernels.dispatch import Variant, interpreted, variant
from semanticfl_ref.kernels.info_nce_small import (
    TRITON_TYPES,
    add_up,
    chunk,
    inverse_norm,
    kinds,
    multiply,
)

PIECE = 1024  # values that `add_up` takes at a time


@triton.jit
def forward(
    queries,
    keys,
    query_scale,
    key_scale,
    labels,
    weights,
    candidates,
    temperature,
    row_loss,
    row_top,
    row_total,
    tau,
    programs,
    B,
    N,
    query_stride_g,
    query_stride_b,
    key_stride_g,
    key_stride_n,
    key_scale_stride,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted loss, maximum and sum of one tile of rows. `candidates` None, or weights of the keys: one of weight 0 is no candidate for any row."""
    g = (tl.program_id(0) // programs).to(tl.int64)
    b = tl.program_id(0) % programs * BLOCK_B + tl.arange(0, BLOCK_B)
    if temperature is not None:
        tau = tl.load(temperature).to(tl.float32)
    label = b
    if labels is not None:
        given = tl.load(labels + g * B + b, mask=b < B, other=0)
        label = tl.where((given >= 0) & (given < N), given, -1).to(tl.int32)
    row_scale = tl.div_rn(tl.full((BLOCK_B,), 1.4426950408889634, tl.float32), tau)
    if query_scale is not None:
        row_scale *= tl.load(query_scale + g * B + b, mask=b < B, other=0.0)
    # Within a tile 32 bits suffice for offsets, and take half the registers.
    first = (tl.program_id(0) % programs * BLOCK_B).to(tl.int64)
    query_rows = (
        queries
        + g * query_stride_g
        + first * query_stride_b
        + (tl.arange(0, BLOCK_B) * query_stride_b)[:, None]
    )

    top, total, positive = (
        tl.full((BLOCK_B,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_B,), tl.float32),
        tl.zeros((BLOCK_B,), tl.float32),
    )
    score = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    for step in range(0, CHUNKS * tl.cdiv(N, BLOCK_N)):
        d = step % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)
        n = step // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        key_rows = (
            keys
            + (g * key_stride_g + tl.cast(step // CHUNKS * BLOCK_N, tl.int64) * key_stride_n)
            + (tl.arange(0, BLOCK_N) * key_stride_n)[:, None]
        )
        q = chunk(query_rows, d, b < B, D, BLOCK_D)
        k = chunk(key_rows, d, n < N, D, BLOCK_D)
        if (
            key_scale is not None
        ):  # read in every step, so that it has arrived when a tile's product is complete
            scale = tl.load(key_scale + g * key_scale_stride + n, mask=n < N, other=0.0)
        score = multiply(q, tl.trans(k), score, PRECISION, WIDEN)
        if step % CHUNKS == CHUNKS - 1:
            candidate = n < N
            if candidates is not None:
                candidate = candidate & (
                    tl.load(candidates + g * N + n, mask=n < N, other=0.0) != 0
                )
            logit = score * row_scale[:, None]
            if key_scale is not None:
                logit *= scale[None, :]
            logit = tl.where(candidate[None, :], logit, float("-inf"))
            positive += tl.sum(tl.where(n[None, :] == label[:, None], logit, 0.0), 1)
            higher = tl.maximum(top, tl.max(logit, 1))
            pivot = tl.where(
                higher == float("-inf"), 0.0, higher
            )  # no candidate yet: -inf - -inf would be NaN
            total = total * tl.exp2(top - pivot) + tl.sum(tl.exp2(logit - pivot[:, None]), 1)
            top = higher
            score = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)

    loss = 0.6931471805599453 * (tl.log2(total) + (top - positive))
    loss = tl.where(label >= 0, loss, float("nan"))
    if weights is not None:
        weight = tl.load(weights + g * B + b, mask=b < B, other=0.0)
        loss = tl.where(weight != 0, weight * loss, 0.0)
    tl.store(row_loss + g * B + b, loss, mask=b < B)
    tl.store(row_top + g * B + b, top, mask=b < B)
    tl.store(row_total + g * B + b, total, mask=b < B)


@triton.jit
def inverse_norms(
    vectors,
    scale,
    rows,
    stride_g,
    stride_row,
    programs,
    D: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale = 1 / max(|v|, 1e-12) of each row."""
    g = (tl.program_id(0) // programs).to(tl.int64)
    row = tl.program_id(0) % programs * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    squares = tl.zeros((BLOCK_ROW, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = chunk(
            vectors + g * stride_g + row.to(tl.int64)[:, None] * stride_row,
            d,
            row < rows,
            D,
            BLOCK_D,
        ).to(tl.float32)
        squares += v * v
    tl.store(scale + g * rows + row, inverse_norm(tl.sum(squares, 1)), mask=row < rows)


def block_sizes(D: int, dtype: torch.dtype, precision: str = "ieee") -> dict:
    """Tile shape and launch options, of the feature width and dtype alone."""
    if (
        dtype == torch.float32 and precision == "ieee"
    ):  # the CUDA cores: every thread holds its operands in registers
        blocks = {"BLOCK_B": 64, "BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 3}
    elif dtype == torch.float32:
        blocks = {"BLOCK_B": 128, "BLOCK_N": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 4}
    else:
        blocks = {"BLOCK_B": 128, "BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4}
    return blocks | {"BLOCK_D": min(blocks["BLOCK_D"], max(16, triton.next_power_of_2(D)))}


def launch(
    queries,
    keys,
    labels,
    weights,
    candidates,
    temperature,
    tau: float,
    normalize: bool,
    reduction: str,
    precision: str,
):
    """The loss and what the gradients need.

    Queries [B, D] or [G, B, D], keys [N, D] or [G, N, D] of one dtype, rows contiguous; labels int64, weights and candidates fp32, contiguous.

    Returns:
        loss fp32 ([G] or [1]; [G, B] for "none"), statistics fp32 [2, G, B] (maximum in base 2, sum), query_scale fp32 [G, B], key_scale fp32 [G or 1, N]
        (both empty without normalisation), mean_scale fp32 [G] (what a sum over the rows was multiplied by).
    """
    (G, B, D), N = (1, *queries.shape)[-3:], keys.shape[-2]
    row_loss, mean_scale = (
        queries.new_empty((G, B), dtype=torch.float32),
        queries.new_ones((G,), dtype=torch.float32),
    )
    statistics = queries.new_empty((2, G, B), dtype=torch.float32)
    query_scale, key_scale = scales(queries, normalize), scales(keys, normalize)
    blocks = block_sizes(D, queries.dtype, precision)
    programs = triton.cdiv(B, blocks["BLOCK_B"])
    if G and B:
        forward[(G * programs,)](
            queries=queries,
            keys=keys,
            query_scale=query_scale if normalize else None,
            key_scale=key_scale if normalize else None,
            labels=labels,
            weights=weights,
            candidates=candidates,
            temperature=temperature,
            row_loss=row_loss,
            row_top=statistics[0],
            row_total=statistics[1],
            tau=tau,
            programs=programs,
            B=B,
            N=N,
            query_stride_g=queries.stride(0) if queries.ndim == 3 else 0,
            query_stride_b=queries.stride(-2),
            key_stride_g=keys.stride(0) if keys.ndim == 3 else 0,
            key_stride_n=keys.stride(-2),
            key_scale_stride=N if keys.ndim == 3 else 0,
            D=D,
            PRECISION=precision,
            WIDEN=interpreted() and queries.dtype == torch.bfloat16,
            **blocks,
        )
    if reduction == "none":
        return row_loss, statistics, query_scale, key_scale, mean_scale
    loss = row_loss.new_empty(G)
    if G:
        add_up[(G,)](
            values=row_loss,
            weights=weights,
            total=loss,
            scale=mean_scale,
            length=B,
            MEAN=reduction == "mean",
            BLOCK=PIECE,
            num_warps=4,
        )
    return loss, statistics, query_scale, key_scale, mean_scale


def scales(vectors: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Inverse norms fp32 [G or 1, rows] of vectors [rows, D] or [G, rows, D]; empty without normalisation."""
    if not normalize:
        return vectors.new_empty((0, 0), dtype=torch.float32)
    G, rows, D = (1, *vectors.shape)[-3:]
    scale = vectors.new_empty((G, rows), dtype=torch.float32)
    programs = triton.cdiv(rows, 16)
    if G and rows:
        inverse_norms[(G * programs,)](
            vectors=vectors,
            scale=scale,
            rows=rows,
            stride_g=vectors.stride(0) if vectors.ndim == 3 else 0,
            stride_row=vectors.stride(-2),
            programs=programs,
            D=D,
            BLOCK_ROW=16,
            BLOCK_D=min(256, max(16, triton.next_power_of_2(D))),
            num_warps=4,
        )
    return scale


def variants() -> list[Variant]:
    """64k x 64k pairs at D 512, positives on the diagonal, and the kernels beside it."""
    found = []
    for dtype, precision, name, tensor_cores in kinds():
        tensors = dict.fromkeys(("queries", "keys"), TRITON_TYPES[dtype]) | dict.fromkeys(
            ("query_scale", "key_scale", "row_loss", "row_top", "row_total"), "*fp32"
        )
        constants = {"D": 512, "PRECISION": precision, "WIDEN": False} | dict.fromkeys(
            ("labels", "weights", "candidates", "temperature")
        )
        found.append(
            variant(
                f"info_nce_forward {name} 65536x65536x512",
                forward,
                tensors,
                constants,
                block_sizes(512, dtype, precision),
                tensor_cores=tensor_cores,
            )
        )
    tensors, constants = (
        {"vectors": "*bf16", "scale": "*fp32"},
        {"D": 512, "BLOCK_ROW": 16, "BLOCK_D": 256},
    )
    found.append(
        variant(
            "info_nce_norms bfloat16 65536x512", inverse_norms, tensors, constants, {"num_warps": 4}
        )
    )
    tensors, constants = (
        dict.fromkeys(("values", "total", "scale"), "*fp32"),
        {"weights": None, "MEAN": True, "BLOCK": PIECE},
    )
    return [*found, variant("info_nce_add_up 65536", add_up, tensors, constants, {"num_warps": 4})]
