"""GroupNorm and SiLU on a GPU, a stage of `bench/gpu.sh`.

N1: at least 70 % of the copy bandwidth, counted as two reads and one write, at the shapes of Stable
Diffusion's VAE encoder and U-Net for 64 images at 224x224, as a CUDA-graph node: in a pass the host
runs ahead of the device. The eager expression ends channels-last, as the convolution behind it
needs it.

Letters: B images, C channels.
"""

import torch
import torch.nn.functional as F

from bench.harness import (
    OURS,
    Bench,
    Case,
    Contender,
    as_graph,
    captured,
    guarded,
    measure,
    name_of,
)
from bench.peers import COPY
from bench.record import Record
from semanticfl_ref.kernels.group_norm_silu import group_norm_silu

GROUPS, IMAGES = 32, 64
# C, side of a map: of the VAE, then of the U-Net.
SHAPES = [(128, 224), (256, 112), (512, 28), (320, 28), (1920, 14), (1280, 7)]
TINY = [(64, 17), (320, 3)]
DTYPES = torch.bfloat16, torch.float16


def stage(record: Record, bench: Bench) -> None:
    for shape in TINY if bench.rehearse else SHAPES:
        for dtype in DTYPES:
            with guarded(record, f"group_norm_silu, {shape}, {name_of(dtype)}"):
                norm_case(record, bench, *shape, dtype)


def norm_case(record: Record, bench: Bench, C: int, side: int, dtype: torch.dtype) -> None:
    """Measure one shape and dtype."""
    images, drawn = 2 if bench.rehearse else IMAGES, {"dtype": dtype, "device": bench.device}
    x = torch.randn(images, side, side, C, **drawn).movedim(-1, 1)
    weight, bias = torch.randn(2, C, **drawn)
    # Of two images: an image's result does not depend on the others.
    exact = eager(x[:2].double(), weight.double(), bias.double())

    def check(name: str, y: torch.Tensor) -> dict:
        """The error relative in the 2-norm, of which one rounding costs 0.3 epsilons."""
        if name == COPY:
            return {"errors": {}, "correct": True}
        error = ((y[:2] - exact).norm() / exact.norm()).item()
        return {"errors": {"result": error}, "correct": error <= torch.finfo(dtype).eps}

    runs = {
        OURS: Contender(lambda: group_norm_silu(x, GROUPS, weight, bias, impl=bench.impl)),
        "eager": Contender(lambda: eager(x, weight, bias)),
        COPY: Contender(x.clone, {"bytes": 2 * x.nbytes}),
    }
    if bench.device.type == "cuda":
        runs[as_graph(OURS)] = Contender(captured(runs[OURS].run))
    case = Case(
        kernel="group_norm_silu",
        case=f"{C} x {side} x {side}",
        dtype=name_of(dtype),
        shape={"B": images, "C": C, "H": side, "W": side},
        bytes=3 * x.nbytes,
    )
    measure(record, bench, case, runs, check)


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The expression, and the copy into the layout of the next convolution."""
    y = F.silu(F.group_norm(x, GROUPS, weight, bias))
    return y.contiguous(memory_format=torch.channels_last)
