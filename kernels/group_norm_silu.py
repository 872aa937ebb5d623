"""GroupNorm and SiLU of channels-last feature maps, for inference.

    x'_bsc = x_bsc + shift_c                                           shift: optional
    y_bsc  = (x'_bsc - mean_bg) / sqrt(var_bg + eps) weight_c + bias_c
    out    = y / (1 + exp(-y))                                         SiLU: optional

with mean_bg and var_bg over all positions of image b and all channels of group g, c's group. The
shift takes the bias of the convolution that made x, which would be a pass over x of its own. There
is no gradient.

Variances are never differences of large numbers, as E[x^2] - E[x]^2 is: a map with a mean of 1000
and a deviation of 1 keeps its digits. Every lane of a program keeps the mean and the sum of squared
deviations of the entries that it has seen (Welford's update). Lanes, and later chunks of an image,
are combined by the update of Chan, Golub and LeVeque, whose terms are all positive:

    mean = sum_i n_i mean_i / n,    squares = sum_i squares_i + n_i (mean_i - mean)^2

A program owns a chunk of an image's positions and some whole groups of its channels. Up to
MOST_POSITIONS positions are one chunk: one launch computes statistics and result. Of larger images
a first launch writes the statistics of every chunk; each program of a second one combines those of
its image, in a fixed order. Chunks and blocks depend on the shape of one image alone, so an image's
result does not depend, bit for bit, on the batch. Bytes of device memory, for entries of e bytes:

    reads     2 B S C e (a second time from the cache, where it fits) + 12 C
    writes    B S C e                                     + 8 B G chunks, read by every program

Never allocated: a copy of x in another layout, the norm's result before SiLU. All is computed in
float32, and rounded once.

Letters: B images, S positions of an image, C channels, G groups.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from semanticfl_ref.kernels.checks import require_floating, require_positive, require_tensors
from semanticfl_ref.kernels.dispatch import implementation, on_device, tl, triton, with_fallback

MOST_WIDTH = 4096  # channels of a group that the kernel takes: a row of them lives in registers
MOST_POSITIONS = 256  # of a chunk, unless there would be more chunks than
MOST_CHUNKS = 64
INTEGERS = ["S", "chunk_size"]  # one compiled kernel for all their values


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    shift_C: Tensor | None,
    silu: bool,
) -> Tensor:
    """The definition in plain torch. Arguments and result as `group_norm_silu` has them."""
    if shift_C is not None:
        x = x + shift_C.view(-1, *(1 for _ in x.shape[2:]))
    with torch.autocast(x.device.type, enabled=False):
        # Of channels-last maps torch's CPU kernel computes E[x^2] - E[x]^2.
        y = torch.group_norm(x.contiguous(), groups, weight_C, bias_C, eps)
        y = F.silu(y) if silu else y
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(x) else y


@triton.jit(do_not_specialize=INTEGERS)
def statistics_kernel(
    x, shift, means, squares, S, chunk_size, C: tl.constexpr, G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every group in one chunk. Grid as `place` has it."""
    image, chunk, chunks, block = place(S, chunk_size, G, BLOCK_G)
    mean, square = moments(
        x + image * S * C, shift, chunk, block, S, chunk_size, C, G, BLOCK_S, BLOCK_G, BLOCK_W
    )
    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    to = (image * chunks + chunk) * G + g
    tl.store(means + to, mean, mask=g < G)
    tl.store(squares + to, square, mask=g < G)


@triton.jit(do_not_specialize=INTEGERS)
def group_norm_kernel(
    x, shift, weight, bias, means, squares, y, S, chunk_size, eps, C: tl.constexpr,
    G: tl.constexpr, SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """The result of one chunk. Without `means` and `squares` the chunk is the whole image, and its
    statistics are computed here. Grid as `place` has it.
    """
    image, chunk, chunks, block = place(S, chunk_size, G, BLOCK_G)
    x += image * S * C
    if means is None:
        mean, square = moments(
            x, shift, chunk, block, S, chunk_size, C, G, BLOCK_S, BLOCK_G, BLOCK_W
        )
    else:
        part, g = tl.arange(0, BLOCK_CHUNKS), block * BLOCK_G + tl.arange(0, BLOCK_G)
        sizes = tl.where(part < chunks, tl.minimum(chunk_size, S - part * chunk_size), 0)
        exists = (part < chunks)[:, None] & (g < G)[None, :]
        of_part = (image * chunks + part)[:, None] * G + g[None, :]
        mean, square = combine(
            tl.load(means + of_part, mask=exists, other=0.0),
            tl.load(squares + of_part, mask=exists, other=0.0),
            sizes.to(tl.float32) * (C // G), g < G, 1, BLOCK_G, 1,
        )  # fmt: skip

    channel, exists = columns(block, C, G, BLOCK_G, BLOCK_W)
    variance = tl.div_rn(square, S.to(tl.float32) * (C // G))
    scale = spread(tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), BLOCK_G, BLOCK_W)
    centre = spread(mean, BLOCK_G, BLOCK_W)
    offset = tl.zeros((BLOCK_G * BLOCK_W,), tl.float32)
    if shift is not None:
        centre -= load(shift + channel, exists)
    if weight is not None:
        scale *= load(weight + channel, exists)
    if bias is not None:
        offset = load(bias + channel, exists)
    y += image * S * C
    for start in range(chunk * chunk_size, tl.minimum((chunk + 1) * chunk_size, S), BLOCK_S):
        at, valid = tile(start, S, channel, exists, C, BLOCK_S)
        # The difference first: x scale - mean scale would lose the digits of a large mean.
        values = (load(x + at, valid) - centre[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            values = values / (1.0 + tl.exp(-values))
        tl.store(y + at, values.to(y.dtype.element_ty), mask=valid)


@triton.jit
def place(S, chunk_size, G: tl.constexpr, BLOCK_G: tl.constexpr):
    """Image, chunk, number of chunks, and block of groups of this program. Grid (images * chunks *
    blocks of groups,): neighbours in memory are neighbours in time.
    """
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    chunks, program = tl.cdiv(S, chunk_size), tl.program_id(0)
    image = (program // (chunks * blocks)).to(tl.int64)
    return image, program // blocks % chunks, chunks, program % blocks


@triton.jit
def columns(
    block, C: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Channel of each of a tile's columns, BLOCK_W to a group, and whether there is one."""
    column = tl.arange(0, BLOCK_G * BLOCK_W)
    if BLOCK_W == C // G:  # known to lie side by side, they are loaded 128 bits at a time
        channel = block * (BLOCK_G * BLOCK_W) + column
        return channel, channel < C
    else:
        within = column % BLOCK_W
        channel = (block * BLOCK_G + column // BLOCK_W) * (C // G) + within
        return channel, (channel < C) & (within < C // G)


@triton.jit
def tile(start, S, channel, exists, C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Where in an image the entries of BLOCK_S positions lie, and which of them exist."""
    s = tl.arange(0, BLOCK_S)
    at = tl.cast(start, tl.int64) * C + (s[:, None] * C + channel[None, :])
    return at, (start + s < S)[:, None] & exists[None, :]


@triton.jit
def load(pointers, valid):
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def moments(
    x, shift, chunk, block, S, chunk_size, C: tl.constexpr, G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group of a block in one chunk of an image."""
    channel, exists = columns(block, C, G, BLOCK_G, BLOCK_W)
    first, last = chunk * chunk_size, tl.minimum((chunk + 1) * chunk_size, S)
    mean = tl.zeros((BLOCK_S, BLOCK_G * BLOCK_W), tl.float32)
    square = tl.zeros((BLOCK_S, BLOCK_G * BLOCK_W), tl.float32)
    seen = 0.0
    for start in range(first, last, BLOCK_S):
        at, valid = tile(start, S, channel, exists, C, BLOCK_S)
        values = load(x + at, valid)
        seen += 1.0
        difference = tl.where(valid, values - mean, 0.0)
        mean += difference * (1.0 / seen)
        square += difference * (values - mean)
    # Lane s has seen every BLOCK_S-th position from first + s on.
    counts = (last - first + BLOCK_S - 1 - tl.arange(0, BLOCK_S)) // BLOCK_S
    if shift is not None:
        mean += load(shift + channel, exists)[None, :]
    return combine(mean, square, counts.to(tl.float32), exists, C // G, BLOCK_G, BLOCK_W)


@triton.jit
def combine(
    means, squares, counts, exists, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group, from those of parts [parts, BLOCK_G *
    BLOCK_W]: row i is made of counts[i] entries, WIDTH columns of a group exist.
    """
    exist = (counts > 0)[:, None] & exists[None, :]
    counts, total = counts[:, None], tl.sum(counts, 0) * WIDTH
    mean = tl.div_rn(sum_groups(tl.where(exist, means * counts, 0.0), BLOCK_G, BLOCK_W), total)
    away = tl.where(exist, means - spread(mean, BLOCK_G, BLOCK_W)[None, :], 0.0)
    added = sum_groups(squares + counts * away * away, BLOCK_G, BLOCK_W)
    # What the rounding of a large mean has lost.
    lost = tl.div_rn(sum_groups(away * counts, BLOCK_G, BLOCK_W), total)
    return mean + lost, added


@triton.jit
def sum_groups(values, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr):
    """The sum of each group's columns over all rows."""
    return tl.sum(tl.reshape(tl.sum(values, 0), (BLOCK_G, BLOCK_W)), 1)


@triton.jit
def spread(of_groups, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr):
    """A group's number for each of its columns."""
    wide = tl.broadcast_to(of_groups[:, None], (BLOCK_G, BLOCK_W))
    return tl.reshape(wide, (BLOCK_G * BLOCK_W,))


def block_sizes(C: int, G: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile shape and launch options: 32 bytes of a tile for each thread, and columns for about 128
    channels, so that a tile's rows are whole sectors of memory.
    """
    block_w = triton.next_power_of_2(C // G)
    block_g = min(triton.next_power_of_2(G), max(1, 128 // block_w))
    block_s = max(1, 4096 // dtype.itemsize // (block_g * block_w))
    return {"BLOCK_S": block_s, "BLOCK_G": block_g, "BLOCK_W": block_w, "num_warps": 4}


def chunk_positions(S: int) -> int:
    """Positions of a chunk."""
    return max(MOST_POSITIONS, triton.next_power_of_2(triton.cdiv(S, MOST_CHUNKS)))


def launch(
    x: Tensor,
    groups: int,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    shift_C: Tensor | None,
    silu: bool,
) -> Tensor:
    """Arguments and result as `group_norm_silu` has them; x is channels-last."""
    (B, C), S = x.shape[:2], math.prod(x.shape[2:])
    sizes, chunk_size = block_sizes(C, groups, x.dtype), chunk_positions(S)
    chunks, blocks = triton.cdiv(S, chunk_size), triton.cdiv(groups, sizes["BLOCK_G"])
    if x.data_ptr() % 16:  # would be compiled apart, and add in another order
        x = x.clone()
    rows = x.movedim(1, -1)
    y = x.new_empty(rows.shape)
    shift_C, weight_C, bias_C = (
        None if vector is None else vector.contiguous() for vector in (shift_C, weight_C, bias_C)
    )
    common = {"x": rows, "shift": shift_C, "means": None, "squares": None, "S": S}
    common |= {"chunk_size": chunk_size, "C": C, "G": groups} | sizes
    with on_device(x):
        if chunks > 1:
            statistics = x.new_empty((2, B, chunks, groups), dtype=torch.float32)
            common["means"], common["squares"] = statistics
            statistics_kernel[(B * chunks * blocks,)](**common)
        group_norm_kernel[(B * chunks * blocks,)](
            **common,
            weight=weight_C,
            bias=bias_C,
            y=y,
            eps=eps,
            SILU=silu,
            BLOCK_CHUNKS=MOST_CHUNKS,
        )
    return y.movedim(-1, 1)


@torch.library.custom_op("semanticfl_ref::group_norm_silu", mutates_args=())
def group_norm_silu_operator(
    x: Tensor,
    groups: int,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    shift_C: Tensor | None,
    silu: bool,
    impl: str,
) -> Tensor:
    """The chosen implementation as a torch operator, which `torch.compile` knows. No gradient."""
    arguments = (x, groups, weight_C, bias_C, eps, shift_C, silu)
    reference = partial(group_norm_silu_reference, *arguments)
    if implementation(impl, x, obstacle=_obstacle(x, groups)) == "torch":
        return reference()
    return with_fallback(partial(launch, *arguments), reference, impl)


@group_norm_silu_operator.register_fake
def _(x, groups, weight_C, bias_C, eps, shift_C, silu, impl):
    if is_channels_last(x):
        return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    *,
    eps: float = 1e-5,
    shift_C: Tensor | None = None,
    silu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Normalise each group of channels of each image, then apply SiLU.

    Equals `F.silu(F.group_norm(x + shift, groups, weight, bias, eps))`, rounded once and in x's
    layout. The kernel takes channels-last maps with up to 4096 channels a group. Has no gradient.

    Equation (group-norm) [Wu and He 2018]:
        y = weight (x - mean) / sqrt(var + eps) + bias,  out = y / (1 + exp(-y))
    Test: tests/kernels/test_group_norm_silu.py::test_on_paper

    Args:
        x: float32, bfloat16, float16 or float64 (torch only) [B, C, ...], with any number of
            dimensions behind the channels.
        groups: number of groups, which divides C.
        weight_C, bias_C: [C], of x's dtype; None: 1 and 0.
        eps: added to the variance, which is that of the population.
        shift_C: [C], of x's dtype, added to x first.
        silu: apply SiLU; otherwise the result is the norm's.
        impl: "auto" (the kernel for CUDA tensors where it takes the call, else torch), "torch", or
            "triton" (the kernel or an error); see `dispatch`.

    Returns:
        Of x's shape and dtype, and channels-last if x is.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes, dtypes or devices that do not fit; an eps that is not positive; a tensor
            that wants a gradient; an unknown `impl`; `impl="triton"` where the kernel cannot run.

    Source: Wu and He 2018, Group Normalization.
    """
    _check(x, groups, weight_C, bias_C, shift_C)
    require_positive("eps", eps, torch.float32, x.device, False)
    return group_norm_silu_operator(x, groups, weight_C, bias_C, float(eps), shift_C, silu, impl)


def is_channels_last(x: Tensor) -> bool:
    """Whether a position's channels lie side by side, positions one after another."""
    return x.movedim(1, -1).is_contiguous()


def _obstacle(x: Tensor, groups: int) -> str | None:
    """What the kernel does not take in this call."""
    if x.numel() == 0:
        return "no entries"
    if x.shape[1] // groups > MOST_WIDTH:
        return f"more than {MOST_WIDTH} channels a group"
    return None if is_channels_last(x) else "maps that are not channels-last"


def _check(
    x: Tensor,
    groups: int,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    shift_C: Tensor | None,
) -> None:
    vectors = {"weight": weight_C, "bias": bias_C, "shift": shift_C}
    given = {"x": x} | {name: vector for name, vector in vectors.items() if vector is not None}
    require_tensors(**given)
    require_floating(x=x)
    shape = tuple(x.shape)
    if len(shape) < 2 or groups < 1 or shape[1] % groups:
        raise ValueError(f"x {shape}, {groups} groups: expected [B, C, ...], C a multiple of them")
    for name, tensor in given.items():
        if tensor is not x and (tuple(tensor.shape) != shape[1:2] or tensor.dtype != x.dtype):
            found = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{found}, x {shape} {x.dtype}: expected [C], of x's dtype")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} with requires_grad = True: the kernel has no gradient; use "
                "torch.no_grad() or .detach()"
            )
