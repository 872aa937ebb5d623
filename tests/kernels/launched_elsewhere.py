"""Makes the small calls of every kernel as on an H100 that need not be here.

Triton binds their arguments and compiles the kernels; nothing is started, and results mean nothing.
"""

from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.gpu.checks import small_calls
from semanticfl_ref.kernels import group_norm_silu, info_nce, weighted_average

launched = set()
launch = JITFunction.run


def bound_and_compiled(kernel: JITFunction, *arguments, warmup: bool, **named):
    launched.add(kernel.__name__)
    return launch(kernel, *arguments, warmup=True, **named)


if __name__ == "__main__":
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(device)
    JITFunction.run = bound_and_compiled
    for module in (group_norm_silu, info_nce, weighted_average):
        module.implementation = lambda *_, **__: "triton"
    small_calls(torch.device("cpu"))
    print(*sorted(launched))
