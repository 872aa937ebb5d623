"""Which implementation of a kernel runs: plain torch, or Triton.

The choice is `impl="auto" | "torch" | "triton"`; the environment variable `SEMANTICFL_KERNELS`, of
the same three words, replaces "auto". "auto" takes Triton for CUDA tensors where Triton can be
used, and torch everywhere else. Where Triton is missing, older than 3.6, or cannot compile, there
is one warning with the reason, and torch from then on: never an import error. Triton is imported by
nothing but a call that wants it."""

import os
import re
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

ENVIRONMENT = "SEMANTICFL_KERNELS"
CHOICES = ("auto", "torch", "triton")
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies

_unusable: str | None = None  # why Triton cannot be used in this process
_examined = False


def implementation(impl: str, *tensors: torch.Tensor) -> str:
    """Choose the implementation for a call on these tensors.

    Under `torch.compile` the answer is taken once, when the call is compiled.

    Args:
        impl: "auto", "torch" or "triton".
        tensors: every tensor that the kernel reads.

    Returns:
        "torch" or "triton".

    Raises:
        ValueError: an unknown word; Triton asked for by name on float64, or on CPU tensors without
            Triton's interpreter.
    """
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    return _choose(impl, on_cuda, any(tensor.dtype == torch.float64 for tensor in tensors))


def with_fallback(launch: Callable, reference: Callable):
    """`launch()`, or `reference()` if Triton cannot compile here. Anything else that `launch`
    raises is raised.
    """
    try:
        return launch()
    except Exception as error:
        if not compile_failed(error):
            raise
        return reference()


def compile_failed(error: BaseException) -> bool:
    """Whether an error of a launch means that Triton cannot compile here. Then this process warns
    once, and uses torch from now on.
    """
    global _unusable, _examined
    if interpreted() or not _from_the_compiler(error):
        return False
    if _unusable is None:
        first_line = next(iter(str(error).strip().splitlines()), "")
        _unusable, _examined = (
            f"it could not compile a kernel ({type(error).__name__}: {first_line})",
            True,
        )
        _warn()
    return True


def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on CPU tensors. It is read when a
    kernel's module is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One ahead-of-time compilation of a kernel: what a launch of a certain shape and dtype hands
    to Triton's compiler.
    """

    name: str
    kernel: object  # the function under @triton.jit
    signature: dict[str, str]  # argument -> Triton type, as "*bf16", "i32", "fp32", "constexpr"
    constants: dict = field(
        default_factory=dict
    )  # argument -> value, of those that are "constexpr"
    divisible_by_16: tuple[
        str, ...
    ] = ()  # arguments whose value or address a launch knows to be a multiple of 16
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False  # whether the compiled code has to use them


def variant(
    name: str,
    kernel,
    tensors: dict[str, str],
    constants: dict,
    blocks: dict,
    *,
    tensor_cores: bool = False,
    ragged: tuple[str, ...] = (),
) -> Variant:
    """The variant of a launch with these tensors (argument -> Triton type), constants, and block
    sizes and launch options.

    The other arguments are the temperature `tau` and integers, known to be multiples of 16 unless
    they are `ragged`; every tensor begins at such a multiple."""
    constants = constants | {key: value for key, value in blocks.items() if key.isupper()}
    types = {
        argument: tensors.get(
            argument,
            "constexpr" if argument in constants else "fp32" if argument == "tau" else "i32",
        )
        for argument in kernel.arg_names
    }
    divisible = tuple(
        argument
        for argument, kind in types.items()
        if kind not in ("constexpr", "fp32") and argument not in ragged
    )
    options = {key: value for key, value in blocks.items() if key.islower()}
    return Variant(
        name=name,
        kernel=kernel,
        signature=types,
        constants=constants,
        divisible_by_16=divisible,
        tensor_cores=tensor_cores,
        **options,
    )


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@torch.compiler.assume_constant_result
def _choose(impl: str, on_cuda: bool, float64: bool) -> str:
    if impl not in CHOICES:
        raise ValueError(f"impl = {impl!r}: expected one of {', '.join(CHOICES)}")
    said = "impl"
    if impl == "auto":
        impl, said = os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT
        if impl not in CHOICES:
            raise ValueError(
                f"environment variable {ENVIRONMENT} = {impl!r}: expected one of {', '.join(CHOICES)}"
            )
    if impl == "torch" or (impl == "auto" and (not on_cuda or float64)):
        return "torch"
    if impl == "triton" and float64:
        raise ValueError(
            f"{said} = 'triton' with float64 tensors: the kernels take float32, bfloat16 and float16. Convert the tensors, or use 'torch'"
        )
    if not _usable():
        return "torch"
    if not on_cuda and not interpreted():
        raise ValueError(
            f"{said} = 'triton' with CPU tensors: move them to a CUDA device, use 'auto', or set TRITON_INTERPRET=1 before the start of Python"
        )
    return "triton"


def _usable() -> bool:
    """Whether Triton can be used, examined once; if not, one warning says why."""
    global _unusable, _examined
    if not _examined:
        _unusable, _examined = _examine(), True
        if _unusable is not None:
            _warn()
    return _unusable is None


def _examine() -> str | None:
    """Why Triton cannot be used; None if it can."""
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA devices, and this torch is built for ROCm"
    try:
        import triton
    except Exception as error:  # a broken installation raises more than ImportError
        return f"it cannot be imported ({type(error).__name__}: {error})"
    oldest = ".".join(map(str, OLDEST_TRITON))
    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TRITON:
        return f"its version is {triton.__version__}, and the kernels need {oldest} or later"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        has, needs = (
            ".".join(map(str, pair))
            for pair in (torch.cuda.get_device_capability(), OLDEST_CAPABILITY)
        )
        return f"the device has compute capability {has}, and the kernels need {needs} or later"
    return None


def _warn() -> None:
    warnings.warn(
        f"Triton is not used: {_unusable}. The torch implementation runs instead.",
        RuntimeWarning,
        stacklevel=4,
    )


def _from_the_compiler(error: BaseException) -> bool:
    """Errors of Triton itself, of the host compiler that it calls, and of loading what they built;
    not errors of CUDA, nor of our own checks.
    """
    if type(error).__module__.split(".")[0] == "triton" or isinstance(
        error, (ImportError, subprocess.CalledProcessError)
    ):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("C compiler", "PassManager", "0 active drivers")
    )
