"""What a pass through the model is made of: its number of images, pixels, noise, pooled cells.

The number of images belongs to what names a feature cache: libraries choose their algorithm by it,
so another number would round differently. It follows from the model, the input size and the device
alone, never from what else uses the device at the time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from semanticfl_ref.errors import DataError
from semanticfl_ref.randomness import generator

SMALL_PASS = 64
LARGE_PASS = 8  # of a large model on a CPU, to save memory
MOST = 256  # on CUDA: more gains nothing
# On CUDA: at the VAE's first level, where most memory is needed, this many feature maps are held at
# once, and half of the memory is left for weights, the U-Net and the libraries.
MAPS = 8


def host_pass_size(unet: Mapping) -> int:
    """Images per pass on a CPU, by the U-Net's configuration."""
    return SMALL_PASS if unet["block_out_channels"][-1] <= 256 else LARGE_PASS


def device_pass_size(folder: Path, device: torch.device, pixels: int, precision: str) -> int:
    """Images per pass on CUDA: a power of two from 8 to 256.

    Args:
        folder: the model's folder.
        device: a CUDA device.
        pixels: of an image as the VAE sees it.
        precision: the VAE's.
    """
    memory = torch.cuda.get_device_properties(device).total_memory
    entry = 4 if precision == "fp32" else 2
    try:
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        fits = memory // 2 // (MAPS * vae["block_out_channels"][0] * pixels * entry)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        raise DataError(
            f"vae of the model folder {folder} has no config.json that says its sizes: download it "
            f"again"
        ) from None
    return min(MOST, max(LARGE_PASS, 1 << max(fits.bit_length() - 1, 0)))


def scale_images(images: torch.Tensor, input_size: int) -> torch.Tensor:
    """uint8 [B, H, W, 3] in 0 ... 255 -> float32 [B, 3, H, W] in -1 ... 1, the VAE's range.

    Args:
        images: on any device.
        input_size: height and width to resize to first; 0: not resized.
    """
    values = images.permute(0, 3, 1, 2).float()
    if input_size and values.shape[2:] != (input_size, input_size):
        values = F.interpolate(values, input_size, mode="bicubic", antialias=True).clamp(0, 255)
    return values / 127.5 - 1


def pool_cells(values_BCHW: torch.Tensor, pool: int) -> torch.Tensor:
    """Means over pool x pool cells: [B, C, H, W] -> float32 [B, C * pool * pool]."""
    return F.adaptive_avg_pool2d(values_BCHW.float(), pool).flatten(1)


def image_noise(
    images: torch.Tensor, shape: Sequence[int], seed: int, purpose: str
) -> torch.Tensor:
    """Standard normal numbers float32 [B, *shape], on the CPU.

    Every image has a generator of its own, keyed by the SHA-256 of its shape and bytes.

    Args:
        images: uint8 [B, H, W, 3].
        shape: shape of one image's noise.
        seed: seed of the noise.
        purpose: what the noise is for; other purposes get other numbers.
    """
    noise = []
    for image in images.cpu():
        content = f"{tuple(image.shape)}".encode() + image.numpy().tobytes()
        key = f"{purpose}/{hashlib.sha256(content).hexdigest()}"
        noise.append(torch.randn(shape, generator=generator(seed, key)))
    return torch.stack(noise)
