"""Checks of arguments that the kernels share; every message names the argument."""

from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensors(**arguments) -> None:
    """Raise unless all are tensors (TypeError), and on the device of the first (ValueError)."""
    first, device = next(iter(arguments)), None
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} of type {type(tensor).__name__}: expected a tensor")
        device = device or tensor.device
        if tensor.device != device:
            devices = f"{name} on {tensor.device}, {first} on {device}"
            raise ValueError(f"{devices}: move them to one device")


def require_floating(**tensors: Tensor) -> None:
    """Raise a ValueError unless all have a dtype that the kernels or torch compute in."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} of {tensor.dtype}: must be one of float32, bfloat16, float16, float64"
            )


def require_positive(
    name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device, validate: bool
) -> None:
    """Raise unless a number is positive, finite and not subnormal in the dtype that computes.

    The value of a tensor is looked at on request, and wherever reading it waits for no GPU and
    breaks no compiled graph.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a number out of range, or a tensor that is not one number on the device.
    """
    if isinstance(value, Tensor):
        require_floating(**{name: value})
        if value.numel() != 1 or value.device != device:
            found = f"{name} {tuple(value.shape)} on {value.device}"
            raise ValueError(f"{found}: expected one number on {device}")
        if not validate and (device.type != "cpu" or torch.compiler.is_compiling()):
            return
        value = value.detach()
    elif not isinstance(value, Real):
        raise TypeError(f"{name} of type {type(value).__name__}: expected a number or a tensor")
    number, least, most = float(value), torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if not least <= number <= most:
        raise ValueError(f"{name} = {number}: must be in {least:.2g} ... {most:.2g}, for {dtype}")
