"""InfoNCE backward where the keys do not fit on chip: the residuals of one block of pairs at a time, and two matrix products with them.

With p_bn = 2^(x_bn - m_b) / s_b from the saved maximum and sum, and c_b what the loss of row b counts for (its weight, the mean's divisor and the upstream
gradient in one factor):

    S_bn = c_b (p_bn - [n = y_b]) / (|q_b| |k_n|)
    dq_b = P(q_b) sum_n S_bn k_n / tau         dk_n = P(k_n) sum_b S_bn q_b / tau         P(v) = 1 - v v^T / |v|^2
    dtau = - sum_b q_b . sum_n S_bn k_n / tau^2

The norms that normalisation divides by are all in S, so both products take the inputs as they are, and the projection P is one pass over the result. Without
normalisation the norms are 1 and P is the identity.

S is never whole: blocks of at most 64 MiB of it are written, multiplied from both sides, and overwritten. This costs 6 B N D operations beside the forward's
2 B N D. One kernel per side that keeps S on chip costs 8, or 12 at D = 512, where the accumulator of a 128-row tile fits into no register file and the logits
have to be recomputed for each half of D. The products start from what they left before, so the bits do not depend on how S was cut; there is no atomic addition.

Memory beside the results: 64 MiB of S, 4 N D for the sum of dk in fp32, 4 D bytes for each row of a block. Never allocated: anything of size B x N above that.

In fp16 S is kept in fp32 and multiplied in TF32, which holds an fp16 key exactly and has the exponents that small probabilities need.

Letters: G clients, B queries, N keys, D feature width.
"""

import torch
import triton
import triton.language as tl

from semanticfl_ref.kernels.dispatch import Variant, interpreted, variant
from semanticfl_ref.kernels.info_nce_small import TRITON_TYPES, ZERO_SCALE, chunk, kinds, multiply
from semanticfl_ref.kernels.info_nce_streaming import block_sizes as forward_block_sizes

SPACE = 64 << 20  # bytes of S
COLUMNS = 4096  # keys of a block where S has to be cut
SPAN = 8  # tiles of keys that one program of `residual` walks over


@triton.jit
def residual(
    queries,
    keys,
    query_scale,
    key_scale,
    row_factor,
    labels,
    candidates,
    row_top,
    row_total,
    temperature,
    residuals,
    row_slope,
    tau,
    programs,
    spans,
    B,
    N,
    first_b,
    first_n,
    query_stride_g,
    query_stride_b,
    key_stride_g,
    key_stride_n,
    key_scale_stride,
    residual_stride,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """S [G, B, residual_stride] of a block, zeros beyond N: one tile of rows, SPAN tiles of keys. Row 0 and key 0 are number first_b and first_n of their client; row_factor = c_b / |q_b|.

    row_slope [G, B, spans], if given: sum_n (p_bn - [n = y_b]) x_bn over the program's keys, in base 2 and before S is rounded.
    """
    g = (tl.program_id(0) // (programs * spans)).to(tl.int64)
    first = (tl.program_id(0) // spans % programs * BLOCK_B).to(tl.int64)
    b = first.to(tl.int32) + tl.arange(0, BLOCK_B)
    if temperature is not None:
        tau = tl.load(temperature).to(tl.float32)
    weight = tl.load(row_factor + g * B + b, mask=b < B, other=0.0)
    top, share = (
        tl.load(row_top + g * B + b, mask=b < B, other=0.0),
        1 / tl.load(row_total + g * B + b, mask=b < B, other=1.0),
    )
    label = b + (first_b - first_n)
    if labels is not None:
        label = (tl.load(labels + g * B + b, mask=b < B, other=0) - first_n).to(tl.int32)
    row_scale = tl.div_rn(tl.full((BLOCK_B,), 1.4426950408889634, tl.float32), tau)
    if query_scale is not None:
        row_scale *= tl.load(query_scale + g * B + b, mask=b < B, other=0.0)
    query_rows = (
        queries
        + g * query_stride_g
        + first * query_stride_b
        + (tl.arange(0, BLOCK_B) * query_stride_b)[:, None]
    )
    score, slope = tl.zeros((BLOCK_B, BLOCK_N), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    start = tl.program_id(0) % spans * SPAN
    for step in range(0, CHUNKS * tl.minimum(SPAN, tl.cdiv(N, BLOCK_N) - start)):
        d = step % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)
        first_key = tl.cast((start + step // CHUNKS) * BLOCK_N, tl.int64)
        n = first_key.to(tl.int32) + tl.arange(0, BLOCK_N)
        q = chunk(query_rows, d, b < B, D, BLOCK_D)
        k = chunk(
            keys
            + (g * key_stride_g + first_key * key_stride_n)
            + (tl.arange(0, BLOCK_N) * key_stride_n)[:, None],
            d,
            n < N,
            D,
            BLOCK_D,
        )
        if (
            key_scale is not None
        ):  # read in every step, so that it has arrived when a tile's product is complete
            scale = tl.load(key_scale + g * key_scale_stride + n, mask=n < N, other=0.0)
        score = multiply(q, tl.trans(k), score, PRECISION, WIDEN)
        if step % CHUNKS == CHUNKS - 1:
            logit = score * row_scale[:, None]
            if key_scale is not None:
                logit *= scale[None, :]
            ds = tl.exp2(logit - top[:, None]) * share[:, None]
            ds = tl.where(n[None, :] == label[:, None], ds - 1, ds)
            pair = (weight != 0)[:, None] & (n < N)[None, :]
            if candidates is not None:
                pair = pair & (tl.load(candidates + g * N + n, mask=n < N, other=0.0) != 0)[None, :]
            if row_slope is not None:
                slope += tl.sum(tl.where(pair, ds * logit, 0.0), 1)
            ds *= weight[:, None]
            if key_scale is not None:
                ds *= scale[None, :]
            ds = tl.where(pair, ds, 0.0)
            if (
                ROUND
            ):  # to the nearest TF32, as tensor cores cut the digits off; a NaN stays what it is
                ds = tl.where(
                    ds == ds,
                    ((ds.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(
                        tl.float32, bitcast=True
                    ),
                    ds,
                )
            out = (
                residuals
                + (g * B + first) * residual_stride
                + first_key
                + (tl.arange(0, BLOCK_B) * residual_stride)[:, None]
                + tl.arange(0, BLOCK_N)[None, :]
            )
            tl.store(
                out,
                ds.to(residuals.dtype.element_ty),
                mask=(b < B)[:, None] & (n < residual_stride)[None, :],
            )
            score = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if row_slope is not None:
        tl.store(row_slope + (g * B + b) * spans + tl.program_id(0) % spans, slope, mask=b < B)


@triton.jit
def accumulate(
    residuals,
    other,
    other_live,
    total,
    programs,
    OWN,
    OTHER,
    groups,
    residual_stride_g,
    residual_stride,
    other_stride_g,
    other_stride,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """total [., OWN, D] += S other, or S^T other if TRANSPOSED, over `groups` clients whose keys are shared. Rows whose other_live is 0 are not read."""
    g = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs * BLOCK_OWN).to(tl.int64)
    own, k = first.to(tl.int32) + tl.arange(0, BLOCK_OWN), tl.arange(0, BLOCK_OTHER)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out = total + (g * OWN + first) * D + (tl.arange(0, BLOCK_OWN) * D)[:, None] + d[None, :]
    inside = (own < OWN)[:, None] & (d < D)[None, :]
    pull = tl.load(out, mask=inside, other=0.0)
    tiles = tl.cdiv(OTHER, BLOCK_OTHER)
    for step in range(0, groups * tiles):
        group, start = g + step // tiles, tl.cast(step % tiles * BLOCK_OTHER, tl.int64)
        reached = start.to(tl.int32) + k < OTHER
        if TRANSPOSED:
            at = (
                residuals
                + (group * residual_stride_g + start * residual_stride + first)
                + (k * residual_stride)[:, None]
                + tl.arange(0, BLOCK_OWN)[None, :]
            )
            s = tl.trans(
                tl.load(at, mask=reached[:, None] & (own < residual_stride)[None, :], other=0.0)
            )
        else:
            at = (
                residuals
                + (group * residual_stride_g + first * residual_stride + start)
                + (tl.arange(0, BLOCK_OWN) * residual_stride)[:, None]
                + k[None, :]
            )
            s = tl.load(
                at,
                mask=(own < OWN)[:, None] & (start.to(tl.int32) + k < residual_stride)[None, :],
                other=0.0,
            )
        if other_live is not None:
            reached = reached & (
                tl.load(other_live + group * OTHER + start + k, mask=reached, other=0.0) != 0
            )
        v = chunk(
            other + (group * other_stride_g + start * other_stride) + (k * other_stride)[:, None],
            d,
            reached,
            D,
            BLOCK_D,
        )
        pull = multiply(s, v.to(residuals.dtype.element_ty), pull, PRECISION, WIDEN)
    tl.store(out, pull, mask=inside)


@triton.jit
def project(
    total,
    own,
    own_scale,
    own_live,
    temperature,
    out,
    tau,
    programs,
    rows,
    own_stride_g,
    own_stride,
    D: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = (total - own (own . total) / |own|^2) / tau, 0 where own_live is 0; without own_scale, total / tau."""
    g = (tl.program_id(0) // programs).to(tl.int64)
    row = tl.program_id(0) % programs * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    live = row < rows
    if own_live is not None:
        live = live & (tl.load(own_live + g * rows + row, mask=row < rows, other=0.0) != 0)
    if temperature is not None:
        tau = tl.load(temperature).to(tl.float32)
    vectors, pulls = (
        own + g * own_stride_g + row.to(tl.int64)[:, None] * own_stride,
        (g * rows + row).to(tl.int64)[:, None] * D,
    )
    scale = tl.zeros((BLOCK_ROW,), tl.float32)
    if own_scale is not None:
        products = tl.zeros((BLOCK_ROW, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            products += chunk(vectors, d, live, D, BLOCK_D).to(tl.float32) * chunk(
                total + pulls, d, live, D, BLOCK_D
            )
        norm = tl.load(own_scale + g * rows + row, mask=live, other=0.0)
        scale = tl.where(
            norm < ZERO, tl.sum(products, 1) * norm * norm, 0.0
        )  # beyond: shorter than the eps of the normalisation, which is a constant there
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        pull = chunk(total + pulls, d, live, D, BLOCK_D)
        if own_scale is not None:
            pull -= chunk(vectors, d, live, D, BLOCK_D).to(tl.float32) * scale[:, None]
        tl.store(
            out + pulls + d[None, :], pull / tau, mask=(row < rows)[:, None] & (d < D)[None, :]
        )


def block_sizes(D: int, dtype: torch.dtype, precision: str = "ieee") -> dict:
    """Tile shape and launch options of `accumulate`, of the feature width and dtype alone."""
    width = max(16, triton.next_power_of_2(D))
    if dtype == torch.float32 and precision == "ieee":
        return {
            "BLOCK_OWN": 64,
            "BLOCK_OTHER": 16,
            "BLOCK_D": min(width, 64),
            "num_warps": 8,
            "num_stages": 3,
        }
    if dtype in (torch.float32, torch.float16):
        return {
            "BLOCK_OWN": 128,
            "BLOCK_OTHER": 32,
            "BLOCK_D": min(width, 128),
            "num_warps": 8,
            "num_stages": 3,
        }
    return {
        "BLOCK_OWN": 128,
        "BLOCK_OTHER": 64,
        "BLOCK_D": min(width, 128),
        "num_warps": 8,
        "num_stages": 3,
    }


def launch(
    queries,
    keys,
    labels,
    absent: bool,
    candidates,
    temperature,
    coefficient,
    statistics,
    query_scale,
    key_scale,
    tau: float,
    precision: str,
    wanted: tuple[bool, bool, bool],
):
    """dq and dk of the inputs' dtype and shape, d temperature fp32 []; an empty tensor for what is not wanted. Arguments as `info_nce_streaming.launch` has them.

    coefficient: fp32 [G, B], c_b: 0 for an absent row, NaN for a bad label. absent: whether there are absent rows, which are not read. Scales None: no
    normalisation.
    """
    (G, B), (N, D), (want_q, want_k, want_tau) = coefficient.shape, keys.shape[-2:], wanted
    q_GBD, k_GND = queries.view(G, B, D), keys.view(-1, N, D)
    shared = len(k_GND) < G
    dtype_s = torch.bfloat16 if queries.dtype == torch.bfloat16 else torch.float32
    row_factor = (
        coefficient
        if query_scale is None
        else torch.where(coefficient == 0, 0.0, coefficient * query_scale)
    )
    live = row_factor if absent else None
    dq, dtau = (
        queries.new_empty((G, B, D) if want_q else 0),
        coefficient.new_zeros((), dtype=torch.float64),
    )
    dk_total = coefficient.new_zeros(k_GND.shape if want_k else 0)
    for g, b, n in cuts(G, B, N, dtype_s.itemsize):
        h = slice(0, 1) if shared else g  # the clients of the keys
        q, k = q_GBD[g, b], k_GND[h, n]
        s = q.new_empty((len(q), q.shape[1], padded(k.shape[1])), dtype=dtype_s)[..., : k.shape[1]]
        slope_GB = launch_residual(
            q,
            k,
            part(query_scale, g, b),
            part(key_scale, h, n),
            row_factor[g, b],
            part(labels, g, b),
            part(candidates, g, n),
            statistics[:, g, b],
            temperature,
            s,
            want_tau,
            tau,
            b.start,
            n.start,
            precision,
            shared,
        )
        if want_tau:
            dtau -= (coefficient[g, b].double() * slope_GB).sum()
        if want_q:
            if n.start == 0:
                q_total = coefficient.new_zeros(q.shape)
            launch_accumulate(s, k, part(candidates, g, n), q_total, False, 1, shared, precision)
            if n.stop == N:
                launch_project(
                    q_total,
                    q,
                    part(query_scale, g, b),
                    part(live, g, b),
                    temperature,
                    dq[g, b],
                    tau,
                )
        if want_k:
            launch_accumulate(
                s,
                q,
                part(live, g, b),
                dk_total[h, n],
                True,
                len(q) if shared else 1,
                False,
                precision,
            )
        del s  # or the next block's would be made beside it
    dk = keys.new_empty(keys.shape if want_k else 0)
    if want_k:
        launch_project(
            dk_total, k_GND, key_scale, None if shared else candidates, temperature, dk, tau
        )
    if want_tau:
        dtau /= temperature.reshape(())
    return (
        dq.view(queries.shape) if want_q else dq,
        dk,
        dtau.float() if want_tau else coefficient.new_empty(0),
    )


def cuts(G: int, B: int, N: int, itemsize: int) -> list[tuple[slice, slice, slice]]:
    """Blocks (clients, rows, keys) of pairs whose S takes at most SPACE bytes: whole clients where one fits, else COLUMNS keys and as many rows as fit.

    Both are multiples of the tiles of `accumulate`, so no bit of the result depends on how S is cut.
    """
    if 0 in (G, B):
        return []
    if (client := B * padded(N) * itemsize) <= SPACE:
        clients = SPACE // client
        return [
            (slice(g, min(g + clients, G)), slice(0, B), slice(0, N)) for g in range(0, G, clients)
        ]
    columns = min(N, COLUMNS)
    rows = max(128, SPACE // (padded(columns) * itemsize) // 128 * 128)
    corners = [(g, b, n) for g in range(G) for b in range(0, B, rows) for n in range(0, N, columns)]
    return [
        (slice(g, g + 1), slice(b, min(b + rows, B)), slice(n, min(n + columns, N)))
        for g, b, n in corners
    ]


def padded(N: int) -> int:
    """Entries of a row of S: every row begins at a multiple of 32 bytes, so that loads and stores are wide whatever N is."""
    return triton.cdiv(N, 16) * 16


def residual_block_sizes(D: int, dtype: torch.dtype, precision: str, slope: bool) -> dict:
    """Tile shape and launch options of `residual`: the forward's, with half the keys where S leaves in fp32 or slopes are summed, which takes more registers."""
    blocks = forward_block_sizes(D, dtype, precision)
    return (
        blocks | {"BLOCK_N": 64}
        if dtype == torch.float16 or precision == "tf32" or slope
        else blocks
    )


def part(tensor: torch.Tensor | None, clients: slice, entries: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[clients, entries]


def launch_residual(
    q_GBD,
    k_HND,
    query_scale,
    key_scale,
    row_factor,
    labels,
    candidates,
    statistics,
    temperature,
    s_GBN,
    want_slope: bool,
    tau,
    first_b,
    first_n,
    precision,
    shared,
):
    (G, B, N), D = s_GBN.shape, q_GBD.shape[2]
    blocks = residual_block_sizes(D, q_GBD.dtype, precision, want_slope)
    programs, spans = triton.cdiv(B, blocks["BLOCK_B"]), triton.cdiv(N, SPAN * blocks["BLOCK_N"])
    slopes = row_factor.new_empty((G, B, spans)) if want_slope else None
    residual[(G * programs * spans,)](
        queries=q_GBD,
        keys=k_HND,
        query_scale=query_scale,
        key_scale=key_scale,
        row_factor=row_factor,
        labels=labels,
        candidates=candidates,
        row_top=statistics[0],
        row_total=statistics[1],
        temperature=temperature,
        residuals=s_GBN,
        row_slope=slopes,
        tau=tau,
        programs=programs,
        spans=spans,
        B=B,
        N=N,
        first_b=first_b,
        first_n=first_n,
        query_stride_g=q_GBD.stride(0),
        query_stride_b=q_GBD.stride(1),
        key_stride_g=0 if shared else k_HND.stride(0),
        key_stride_n=k_HND.stride(1),
        key_scale_stride=0 if shared else N,
        residual_stride=s_GBN.stride(1),
        D=D,
        PRECISION=precision,
        WIDEN=interpreted() and q_GBD.dtype == torch.bfloat16,
        ROUND=s_GBN.dtype == torch.float32 and tensor_cores(q_GBD.dtype, precision),
        SPAN=SPAN,
        **blocks,
    )
    return slopes.double().sum(2) * 0.6931471805599453 if want_slope else None


def launch_accumulate(
    s_GBN, other, other_live, total, transposed: bool, groups: int, shared: bool, precision: str
) -> None:
    OWN, D = total.shape[1:]
    blocks = block_sizes(D, other.dtype, precision)
    programs = triton.cdiv(OWN, blocks["BLOCK_OWN"])
    accumulate[(len(total) * programs, triton.cdiv(D, blocks["BLOCK_D"]))](
        residuals=s_GBN,
        other=other,
        other_live=other_live,
        total=total,
        programs=programs,
        OWN=OWN,
        OTHER=other.shape[1],
        groups=groups,
        residual_stride_g=s_GBN.stride(0),
        residual_stride=s_GBN.stride(1),
        other_stride_g=0 if shared else other.stride(0),
        other_stride=other.stride(1),
        D=D,
        TRANSPOSED=transposed,
        PRECISION="tf32" if other.dtype == torch.float16 else precision,
        WIDEN=interpreted() and other.dtype == torch.bfloat16,
        **blocks,
    )


def launch_project(total, own, own_scale, own_live, temperature, out, tau) -> None:
    (G, rows, D), block = total.shape, 16
    programs = triton.cdiv(rows, block)
    project[(G * programs,)](
        total=total,
        own=own,
        own_scale=own_scale,
        own_live=own_live,
        temperature=temperature,
        out=out,
        tau=tau,
        programs=programs,
        rows=rows,
        own_stride_g=own.stride(0),
        own_stride=own.stride(1),
        D=D,
        ZERO=ZERO_SCALE,
        BLOCK_ROW=block,
        BLOCK_D=min(256, max(16, triton.next_power_of_2(D))),
        num_warps=4,
    )


def tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    return dtype != torch.float32 or precision == "tf32"


def variants() -> list[Variant]:
    """The kernels of one block of 64k x 64k pairs at D 512, positives on the diagonal."""
    found = []
    for dtype, precision, name, cores in kinds():
        kind, kind_s, where = (
            TRITON_TYPES[dtype],
            "*bf16" if dtype == torch.bfloat16 else "*fp32",
            f"{name} 65536x65536x512",
        )
        common, fp32 = (
            {"D": 512, "PRECISION": precision, "WIDEN": False},
            ("query_scale", "key_scale", "row_factor", "row_top", "row_total"),
        )
        tensors = {"queries": kind, "keys": kind, "residuals": kind_s} | dict.fromkeys(
            fp32, "*fp32"
        )
        options = {
            "row_slope": "*fp32",
            "labels": "*i64",
            "candidates": "*fp32",
            "temperature": "*fp32",
        }
        for form, given in (
            ("", {}),
            ("_with_everything", options),
        ):  # the temperature learns, labels, absent keys
            constants = (
                common
                | {"ROUND": kind_s == "*fp32" and cores, "SPAN": SPAN}
                | dict.fromkeys(options.keys() - given.keys())
            )
            blocks = residual_block_sizes(512, dtype, precision, bool(given))
            found.append(
                variant(
                    f"info_nce_residual{form} {where}",
                    residual,
                    tensors | given,
                    constants,
                    blocks,
                    tensor_cores=cores,
                )
            )
        for side, transposed in (("dq", False), ("dk", True)):
            tensors = {"residuals": kind_s, "other": kind, "total": "*fp32"}
            constants = common | {
                "PRECISION": "tf32" if dtype == torch.float16 else precision,
                "TRANSPOSED": transposed,
                "other_live": None,
                "groups": 1,
            }
            found.append(
                variant(
                    f"info_nce_{side} {where}",
                    accumulate,
                    tensors,
                    constants,
                    block_sizes(512, dtype, precision),
                    tensor_cores=cores,
                )
            )
        tensors = {"total": "*fp32", "own": kind, "own_scale": "*fp32", "out": kind}
        constants = {
            "D": 512,
            "ZERO": ZERO_SCALE,
            "own_live": None,
            "temperature": None,
            "BLOCK_ROW": 16,
            "BLOCK_D": 256,
        }
        found.append(
            variant(f"info_nce_project {where}", project, tensors, constants, {"num_warps": 4})
        )
    return found
