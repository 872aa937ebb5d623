"""The device and the precision of a run, decided once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from semanticfl_ref.errors import UserError

DEFAULT_THREADS = torch.get_num_threads()  # torch's own choice, before a run sets its number


def resolve_device(name: str) -> torch.device:
    """The device that `run.device` names: auto is CUDA if available.

    Raises:
        UserError: CUDA is asked for and not available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("run.device = cuda: torch finds no CUDA device; use run.device=auto or cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def require_precision(precision: str, device: torch.device) -> None:
    """Refuse a U-Net's precision that a device does not have.

    Raises:
        UserError: fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("diffusion.precision = fp16 needs a CUDA device: on a CPU use fp32 or bf16")


@contextmanager
def default_threads() -> Iterator[None]:
    """As many CPU threads as torch chooses by itself, for work that nothing else runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(DEFAULT_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def use_deterministic_kernels() -> None:
    """On CUDA: cuDNN chooses algorithms that repeat their results, and fp32 is no TF32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def resolve_precision(name: str, device: torch.device, half_on_cuda: str = "bf16") -> str:
    """The precision that a setting names.

    auto is `half_on_cuda` on CUDA devices that support it, bf16 on CPUs whose matrix units do
    (emulated, it is slower than fp32), else fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return half_on_cuda if half_on_cuda == "fp16" or has_bf16(device) else "fp32"
    return "bf16" if has_bf16(device) else "fp32"


def vae_precision(precision: str, device: torch.device) -> str:
    """The VAE's precision beside a U-Net of this precision: it overflows in fp16."""
    half = device.type == "cpu" or has_bf16(device)
    return "bf16" if precision != "fp32" and half else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
