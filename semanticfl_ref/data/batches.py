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
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    return list(indices[order].split(batch_sizes(len(indices), batch_size)))


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """The sizes of an epoch's batches, see `epoch_batches`."""
    assert batch_size >= 1 and count >= 1, "a client without images has no batches"
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    if batch_size > 1 and len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [batch_size + 1]
    return sizes


def draw_crops(batches: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Where to crop each image of each batch, and whether to flip it.

    Args:
        batches: of an epoch.
        generator: CPU generator of this client and epoch.

    Returns:
        For each batch int64 [3, B]: top, left, flip; on the batches' device.
    """
    drawn, sizes = [], [len(index_B) for index_B in batches]
    for size in sizes:
        drawn.append(torch.randint(0, 2 * MARGIN + 1, (2, size), generator=generator))
        drawn[-1] = torch.cat([drawn[-1], torch.randint(0, 2, (1, size), generator=generator)])
    # One copy per epoch: each would hold a GPU up.
    return list(torch.cat(drawn, dim=1).to(batches[0].device).split(sizes, dim=1))


def network_input(images: torch.Tensor, crop_3B: torch.Tensor | None = None) -> torch.Tensor:
    """The network's input: equals `(images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5`.

    Args:
        images: uint8 [B, H, W, 3], on any device.
        crop_3B: of `draw_crops`: images are flipped, and cropped after padding by 4 black pixels.

    Returns:
        float32 [B, 3, H, W] in -1 ... 1, channels_last, on the images' device.
    """
    if crop_3B is not None:
        images = _flip_and_crop(images, crop_3B)
    x_B3HW = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    return x_B3HW.div_(127.5).sub_(1)


def _flip_and_crop(images: torch.Tensor, crop_3B: torch.Tensor) -> torch.Tensor:
    """One gather for the whole batch, from a view of all crops of every image."""
    B, H, W, _ = images.shape
    top_B, left_B, flip_B = crop_3B
    padded = F.pad(images, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    crops = padded.unfold(1, H, 1).unfold(2, W, 1)  # [B, top, left, 3, H, W]
    crops_B3HW = crops[torch.arange(B, device=images.device), top_B, left_B]
    crops_B3HW = torch.where(flip_B.bool()[:, None, None, None], crops_B3HW.flip(3), crops_B3HW)
    return crops_B3HW.permute(0, 2, 3, 1)
