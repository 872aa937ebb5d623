"""InfoNCE where all keys of a client fit on chip: one launch gives the loss and, the keys being
frozen, the gradient of the queries.

The equations are those of `info_nce.py`. One program owns one tile of one client's rows: it
multiplies the tile with all N <= 256 keys, chunk by chunk of D, and sums the squares of both on the
way (the norms cost no pass of their own); the logits [BLOCK_B, BLOCK_N] live in registers from the
product to the softmax to ds; a second walk over the chunks of D, whose keys are in the cache by
now, multiplies ds with the keys. There is one program per client where B <= 64, as in training, so
the reduced loss leaves in the same launch; with more tiles a second launch adds the tiles' sums in
ascending order.

Bytes of device memory: read  (2 B D + 2 N D) e  (the second read of each from the cache, where it
fits) + 8 B labels;  written  4 B D  (dq, fp32) + 4. Never allocated: the logits, the probabilities,
normalised copies.

dq is kept in fp32 until it has been multiplied by the upstream gradient: in fp16 the gradient of
one row of a mean would be rounded away before the loss scale, which is there to prevent that,
arrives.

Letters: G clients, B queries, N keys, D feature width.
"""

import torch
import triton
import triton.language as tl

from semanticfl_ref.kernels.dispatch import Variant, interpreted, variant

MOST_KEYS = 256
# an inverse norm above this belongs to a vector shorter than F.normalize's eps = 1e-12, through
# which no projection passes
ZERO_SCALE = 0.999e12
TRITON_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a b. WIDEN is for the interpreter, whose product of two bf16 tensors multiplies their
    bit patterns.
    """
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def chunk(rows, d, live, D: tl.constexpr, SIZE: tl.constexpr):
    """Columns d of the rows that are live, zeros elsewhere. SIZE: number of columns; where it
    divides D no column needs a mask.
    """
    if D % SIZE == 0:
        return tl.load(rows + d[None, :], mask=live[:, None], other=0.0)
    else:
        return tl.load(rows + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def inverse_norm(squares):
    """1 / max(|v|, 1e-12) from the sums of squares. A GPU's plain division and root may be two
    units off, which at tau = 0.005 a loss would show.
    """
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-12))


@triton.jit
def small(
    queries,
    keys,
    labels,
    weights,
    temperature,
    loss,
    gradient,
    tau,
    programs,
    B,
    N,
    query_stride_g,
    query_stride_b,
    key_stride_g,
    key_stride_n,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    REDUCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ZERO: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loss of TILES x BLOCK_B rows of one client, and their dq if `gradient` is given. `labels`
    None: row b's positive is key b.
    """
    g = (tl.program_id(0) // programs).to(tl.int64)
    queries, keys = queries + g * query_stride_g, keys + g * key_stride_g
    if temperature is not None:
        tau = tl.load(temperature).to(tl.float32)
    divisor = 1.0
    if REDUCTION == "mean":
        divisor = B * 1.0
        if weights is not None:
            weight_sums = tl.zeros((1024,), tl.float32)
            for start in range(0, B, 1024):
                other = start + tl.arange(0, 1024)
                weight_sums += tl.load(weights + g * B + other, mask=other < B, other=0.0)
            divisor = tl.sum(weight_sums, 0)
    loss_sum = tl.zeros((BLOCK_B,), tl.float32)
    for tile in range(TILES):
        b = (tl.program_id(0) % programs * TILES + tile) * BLOCK_B + tl.arange(0, BLOCK_B)
        row_loss = rows(
            queries,
            keys,
            labels,
            weights,
            gradient,
            b,
            g,
            tau,
            divisor,
            B,
            N,
            query_stride_b,
            key_stride_n,
            D,
            NORMALIZE,
            PRECISION,
            WIDEN,
            ZERO,
            BLOCK_B,
            BLOCK_N,
            BLOCK_D,
        )
        if REDUCTION == "none":
            tl.store(loss + g * B + b, row_loss, mask=b < B)
        loss_sum += row_loss
    if REDUCTION != "none":
        tl.store(loss + tl.program_id(0), tl.sum(loss_sum, 0) / divisor)


@triton.jit
def rows(
    queries,
    keys,
    labels,
    weights,
    gradient,
    b,
    g,
    tau,
    divisor,
    B,
    N,
    query_stride_b,
    key_stride_n,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted losses of the rows b; writes their dq."""
    n = tl.arange(0, BLOCK_N)
    live, weight = b < B, tl.full((BLOCK_B,), 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + g * B + b, mask=b < B, other=0.0)
        live = weight != 0
    label = b.to(tl.int64)
    if labels is not None:
        label = tl.load(labels + g * B + b, mask=live, other=0)
    query_rows = queries + b.to(tl.int64)[:, None] * query_stride_b
    key_rows = keys + n.to(tl.int64)[:, None] * key_stride_n

    cosine, query_squares, key_squares = (
        tl.zeros((BLOCK_B, BLOCK_N), tl.float32),
        tl.zeros((BLOCK_B,), tl.float32),
        tl.zeros((BLOCK_N,), tl.float32),
    )
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = chunk(query_rows, d, live, D, BLOCK_D)
        k = chunk(key_rows, d, n < N, D, BLOCK_D)
        cosine = multiply(q, tl.trans(k), cosine, PRECISION, WIDEN)
        if NORMALIZE:
            query_squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            key_squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
    query_scale, key_scale = (
        tl.full((BLOCK_B,), 1.0, tl.float32),
        tl.full((BLOCK_N,), 1.0, tl.float32),
    )
    if NORMALIZE:
        query_scale, key_scale = inverse_norm(query_squares), inverse_norm(key_squares)
    # Divided last, and exactly: a rounded 1 / tau would cost each logit one more rounding, which
    # the softmax multiplies by the logit.
    logit = tl.where(
        (n < N)[None, :],
        tl.div_rn(cosine * query_scale[:, None] * key_scale[None, :], tau),
        float("-inf"),
    )

    top = tl.max(logit, 1)
    share = tl.exp(logit - top[:, None])
    total = tl.sum(share, 1)
    hit = n[None, :] == label[:, None]
    positive = tl.sum(tl.where(hit, logit, 0.0), 1)
    weight = tl.where(
        (label >= 0) & (label < N), weight, float("nan")
    )  # a label out of range: NaN, and nothing was read for it
    row_loss = tl.where(live, weight * (tl.log(total) + (top - positive)), 0.0)

    if gradient is not None:
        ds = share / total[:, None] - tl.where(hit, 1.0, 0.0)
        slope = tl.sum(
            tl.where((n < N)[None, :], ds * logit, 0.0), 1
        )  # the part of the gradient along the query, which normalisation removes
        ds = ds * key_scale[None, :]
        peak = tl.full((BLOCK_B,), 1.0, tl.float32)
        if keys.dtype.element_ty != tl.float32:
            # A row of ds is brought to a largest entry of 1 before it is rounded to the keys' type:
            # in fp16 small probabilities would vanish.
            ds = tl.where(key_scale[None, :] < ZERO, ds, 0.0)
            peak = tl.max(tl.abs(ds), 1)
            peak = tl.where(peak > 0, peak, 1.0)
            ds = ds / peak[:, None]
        ds = ds.to(keys.dtype.element_ty)
        slope = tl.where(query_scale < ZERO, slope * query_scale, 0.0)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            q = chunk(query_rows, d, live, D, BLOCK_D)
            k = chunk(key_rows, d, n < N, D, BLOCK_D)
            dq = (
                multiply(ds, k, tl.zeros((BLOCK_B, BLOCK_D), tl.float32), PRECISION, WIDEN)
                * (peak / tau)[:, None]
            )
            if NORMALIZE:
                dq -= q.to(tl.float32) * slope[:, None]
            dq = tl.where(live[:, None], dq * (weight / divisor * query_scale)[:, None], 0.0)
            tl.store(
                gradient + (g * B + b)[:, None] * D + d[None, :],
                dq,
                mask=(b < B)[:, None] & (d < D)[None, :],
            )
    return row_loss


@triton.jit
def add_up(values, weights, total, scale, length, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """total[g] = sum of values[g] in ascending order; for a mean over the sum of weights[g], or the
    length; scale[g] = what one was multiplied by.
    """
    g = tl.program_id(0).to(tl.int64)
    value_sums, weight_sums = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value_sums += tl.load(values + g * length + i, mask=i < length, other=0.0)
        if weights is not None:
            weight_sums += tl.load(weights + g * length + i, mask=i < length, other=0.0)
    divisor = 1.0
    if MEAN:
        divisor = length * 1.0
        if weights is not None:
            divisor = tl.sum(weight_sums, 0)
    tl.store(total + g, tl.sum(value_sums, 0) / divisor)
    if scale is not None:
        tl.store(scale + g, 1.0 / divisor)


def block_sizes(B: int, N: int, D: int, dtype: torch.dtype, precision: str = "ieee") -> dict:
    """Tile shape and launch options, of the shape and dtype alone: never of the number of clients,
    so that a client's bits do not depend on its company.
    """
    block_n, rows_of_program = (
        max(16, triton.next_power_of_2(N)),
        min(64, max(16, triton.next_power_of_2(B))),
    )
    block_b = min(
        rows_of_program, 32 if block_n == 256 else 64
    )  # 64 x 256 logits and their softmax do not fit into the registers of eight warps
    wide, cuda_cores = dtype == torch.float32, dtype == torch.float32 and precision == "ieee"
    block_d = 16 if block_n == 256 or cuda_cores else 32 if wide or block_n == 128 else 64
    return {
        "TILES": rows_of_program // block_b,
        "BLOCK_B": block_b,
        "BLOCK_N": block_n,
        "BLOCK_D": min(block_d, max(16, triton.next_power_of_2(D))),
        "num_warps": 4 if block_n <= 64 else 16 if cuda_cores and block_n == 256 else 8,
        "num_stages": 2 if wide or block_n == 256 else 3,
    }


def launch(
    queries,
    keys,
    labels,
    weights,
    temperature,
    tau: float,
    normalize: bool,
    reduction: str,
    precision: str,
    gradient: bool,
):
    """Loss fp32 ([G] or [1]; [G, B] for "none") and dq fp32 of the queries' shape for an upstream
    gradient of 1 (empty unless `gradient`).

    Queries [B, D] or [G, B, D], keys [N, D] or [G, N, D] of one dtype, rows contiguous; labels
    int64 and weights fp32 contiguous."""
    (G, B, D), N = (1, *queries.shape)[-3:], keys.shape[-2]
    blocks = block_sizes(B, N, D, queries.dtype, precision)
    programs = triton.cdiv(B, blocks["TILES"] * blocks["BLOCK_B"])  # of one client
    loss = queries.new_empty((G, B) if reduction == "none" else (G, programs), dtype=torch.float32)
    dq = queries.new_empty(queries.shape if gradient else (0,), dtype=torch.float32)
    if G and B:
        small[(G * programs,)](
            queries=queries,
            keys=keys,
            labels=labels,
            weights=weights,
            temperature=temperature,
            loss=loss,
            gradient=dq if gradient else None,
            tau=tau,
            programs=programs,
            B=B,
            N=N,
            query_stride_g=queries.stride(0) if queries.ndim == 3 else 0,
            query_stride_b=queries.stride(-2),
            key_stride_g=keys.stride(0) if keys.ndim == 3 else 0,
            key_stride_n=keys.stride(-2),
            D=D,
            NORMALIZE=normalize,
            REDUCTION=reduction,
            PRECISION=precision,
            WIDEN=interpreted() and queries.dtype == torch.bfloat16,
            ZERO=ZERO_SCALE,
            **blocks,
        )
    if reduction == "none":
        return loss, dq
    if B == 0:
        return queries.new_full(
            (G,), float("nan") if reduction == "mean" else 0.0, dtype=torch.float32
        ), dq
    if programs == 1:
        return loss.view(G), dq
    total = loss.new_empty(G)
    if G:
        add_up[(G,)](
            values=loss,
            weights=None,
            total=total,
            scale=None,
            length=programs,
            MEAN=False,
            BLOCK=1024,
            num_warps=4,
        )
    return total, dq


def kinds() -> list[tuple[torch.dtype, str, str, bool]]:
    """Dtype, precision, both in one word, and whether products of them take tensor cores: what
    every kernel of InfoNCE is compiled for.
    """
    wide = torch.float32
    return [
        (wide, "ieee", "float32", False),
        (wide, "tf32", "float32 tf32", True),
        (torch.bfloat16, "ieee", "bfloat16", True),
        (torch.float16, "ieee", "float16", True),
    ]


def variants() -> list[Variant]:
    """The kernel at the shapes it is trained with: batch 64, D 512, 10, 100 and 200 class anchors."""
    found = []
    for N in (10, 100, 200):
        for dtype, precision, name, tensor_cores in kinds():
            tensors = dict.fromkeys(("queries", "keys"), TRITON_TYPES[dtype]) | {
                "labels": "*i64",
                "loss": "*fp32",
                "gradient": "*fp32",
            }
            constants = {
                "D": 512,
                "NORMALIZE": True,
                "REDUCTION": "mean",
                "PRECISION": precision,
                "WIDEN": False,
                "ZERO": ZERO_SCALE,
                "weights": None,
                "temperature": None,
            }
            blocks = block_sizes(64, N, 512, dtype, precision)
            found.append(
                variant(
                    f"info_nce_small {name} 64x{N}x512",
                    small,
                    tensors,
                    constants,
                    blocks,
                    tensor_cores=tensor_cores,
                    ragged=("programs", "N"),
                )
            )
    return found
