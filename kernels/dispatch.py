"""Which implementation of a kernel runs: plain torch, or Triton.

The choice is `impl="auto" | "torch" | "triton"`. "auto" takes Triton for CUDA tensors where Triton
can be used, and the kernel takes the call and pays; torch everywhere else. "triton" is Triton or an
error that says why not: who measures it must not measure torch. Where Triton is missing, older than
3.6, or cannot compile, one warning says why, and torch runs from then on: there is never an import
error.

The environment variable `SEMANTICFL_KERNELS`, with the same three values, replaces "auto". Its
"triton" is a preference for a whole run: calls that the kernel does not take run in torch.

The kernels' files import `triton` and `tl` from here. Importing Triton at once costs a run nothing:
torch's optimizers do it too.
"""

import os
import re
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch

IMPORT_ERROR: Exception | None = None
try:
    import triton
    import triton.language as tl
except Exception as error:  # missing, or broken, which raises more than ImportError
    IMPORT_ERROR = error
    # Stand-ins, so that the kernels' files can be imported: `triton.jit`, bare or with options,
    # leaves a kernel as it is, and nothing calls it.
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or triton.jit)
    tl = SimpleNamespace(constexpr=None)

ENVIRONMENT = "SEMANTICFL_KERNELS"
CHOICES = ("auto", "torch", "triton")
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies

_unusable: str | None = None  # why Triton cannot be used in this process
_examined = False


def implementation(
    impl: str, *tensors: torch.Tensor, obstacle: str | None = None, pays: bool = True
) -> str:
    """Choose the implementation for a call on these tensors.

    Under `torch.compile` the choice is made once, when the call is compiled.

    Args:
        impl: "auto", "torch" or "triton".
        tensors: every tensor that the kernel reads.
        obstacle: what the kernel does not take in this call, if anything; float64 is looked for
            here.
        pays: whether the kernel is faster than torch in this call; if not, "auto" takes torch.

    Returns:
        "torch" or "triton".

    Raises:
        ValueError: an unknown value; `impl="triton"` where there is an obstacle or Triton cannot be
            used; Triton, asked for in either way, with CPU tensors outside its interpreter.
    """
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        obstacle = "float64 tensors"
    return _choose(impl, on_cuda, obstacle, pays)


def with_fallback(launch: Callable, reference: Callable, impl: str = "auto"):
    """`launch()`, or `reference()` if Triton cannot compile here; other errors are raised.

    After the first such failure this process warns once, and uses torch from then on.

    Raises:
        ValueError: Triton cannot compile, and `impl` is "triton".
    """
    global _unusable, _examined
    try:
        return launch()
    except Exception as error:
        if interpreted() or not _from_compiler(error):
            raise
        if _unusable is None:
            first_line = next(iter(str(error).strip().splitlines()), "")
            _unusable = f"it could not compile a kernel ({type(error).__name__}: {first_line})"
            _examined = True
            _warn()
        if impl == "triton":
            raise _cannot_be_used() from error
        return reference()


def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on CPU tensors.

    Triton reads the variable when it decorates a kernel: set it before the start of Python.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's: make it so."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@torch.compiler.assume_constant_result
def _choose(impl: str, on_cuda: bool, obstacle: str | None, pays: bool) -> str:
    name, by_name = "impl", impl == "triton"
    if impl == "auto" and os.environ.get(ENVIRONMENT):
        impl, name = os.environ[ENVIRONMENT], f"environment variable {ENVIRONMENT}"
    if impl not in CHOICES:
        raise ValueError(f"{name} = {impl!r}: expected one of {', '.join(CHOICES)}")
    if by_name and obstacle is not None:
        raise ValueError(
            f"impl = 'triton' with {obstacle}: the kernel does not take that; change the call, or "
            "use 'auto', which runs it in torch"
        )
    if impl == "torch" or obstacle is not None or (impl == "auto" and not (on_cuda and pays)):
        return "torch"
    if not _usable():
        if by_name:
            raise _cannot_be_used()
        return "torch"
    if not on_cuda and not interpreted():
        raise ValueError(
            f"{name} = 'triton' with CPU tensors: the kernels run on CUDA devices; move the "
            "tensors to one, use 'auto', or set TRITON_INTERPRET=1 before the start of Python"
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
    if IMPORT_ERROR is not None:
        return f"it cannot be imported ({type(IMPORT_ERROR).__name__}: {IMPORT_ERROR})"
    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"its version is {triton.__version__}, and the kernels need {oldest} or later"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        has, needs = torch.cuda.get_device_capability(), OLDEST_CAPABILITY
        return (
            f"the device has compute capability {has[0]}.{has[1]}, and the kernels need "
            f"{needs[0]}.{needs[1]} or later"
        )
    return None


def _cannot_be_used() -> ValueError:
    return ValueError(f"impl = 'triton', but Triton cannot be used: {_unusable}; use 'auto'")


def _warn() -> None:
    message = f"Triton is not used: {_unusable}. The torch implementation runs instead."
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _from_compiler(error: BaseException) -> bool:
    """Errors of Triton, of the host compiler that it calls, and of loading what they built.

    Errors of CUDA and of our own checks are not among them.
    """
    if type(error).__module__.split(".")[0] == "triton":
        return True
    if isinstance(error, (ImportError, subprocess.CalledProcessError)):
        return True
    known = ("C compiler", "PassManager", "0 active drivers")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in known)
