"""Batches from one uint8 tensor in memory: seeded indices, and augmentation of whole batches.

Letters: B batch.
"""

import torch
import torch.nn.functional as F

MARGIN = 4  # pixels of padding per side before a random crop, as usual for CIFAR


def epoch_batches(
    indices: torch.Tensor, *, batch_size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Shuffle a client's indices and split them into batches; every index occurs once.

    A last batch of one image joins the batch before it, since BatchNorm has no variance over one
    image. A client with fewer images than a batch still takes one step.

    Args:
        indices: int64 [n], n >= 1.
        batch_size: images per batch, >= 1.
        generator: CPU generator of this client and epoch.

    Returns:
        int64 tensors [batch_size], the last one shorter or longer by one; on the indices' device.
    """
    assert batch_size >= 1 and len(indices) >= 1, "a client without images has no batches"
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    batches = list(indices[order].split(batch_size))
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def network_input(
    images: torch.Tensor, *, augment: bool, generator: torch.Generator | None
) -> torch.Tensor:
    """The network's input: equals `(images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5`.

    Args:
        images: uint8 [B, H, W, 3], on any device.
        augment: first flip half of the images, and crop each after padding by 4 black pixels.
        generator: CPU generator of the augmentation; None without it.

    Returns:
        float32 [B, 3, H, W] in -1 ... 1, channels_last, on the images' device.
    """
    if augment:
        images = _flip_and_crop(images, generator)
    x_B3HW = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    return x_B3HW.div_(127.5).sub_(1)


def _flip_and_crop(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One gather for the whole batch, from a view of all crops of every image."""
    B, H, W, _ = images.shape
    device = images.device
    top_B, left_B = torch.randint(0, 2 * MARGIN + 1, (2, B), generator=generator).to(device)
    flip_B = torch.randint(0, 2, (B,), generator=generator).to(device).bool()
    padded = F.pad(images, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    crops = padded.unfold(1, H, 1).unfold(2, W, 1)  # [B, top, left, 3, H, W]
    crops_B3HW = crops[torch.arange(B, device=device), top_B, left_B]
    crops_B3HW = torch.where(flip_B[:, None, None, None], crops_B3HW.flip(3), crops_B3HW)
    return crops_B3HW.permute(0, 2, 3, 1)
