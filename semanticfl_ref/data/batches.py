"""Batches from one resident uint8 tensor: seeded indices, and the augmentation of a whole batch at
once. No DataLoader.

Letters: B batch.
"""

import torch
import torch.nn.functional as F

MARGIN = 4  # pixels of padding on each side before a random crop, as usual for CIFAR


def epoch_batches(
    indices: torch.Tensor, *, batch_size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Shuffle a client's indices and cut them into batches; every index comes once.

    A last batch of one joins the one before it, because BatchNorm has no variance over one image; a
    client with fewer images than a batch still takes one step.

    Args:
        indices: int64 [n], n >= 1.
        batch_size: images a batch, >= 1; one batch may hold one more.
        generator: CPU generator of this client and epoch.

    Returns:
        int64 tensors [batch_size] (the last one shorter, or longer by one), on the indices' device.
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
    """What the network reads; equals `(images / 255 - 0.5) / 0.5` with the channels moved, after a
    random flip and crop if asked.

    Args:
        images: uint8 [B, H, W, 3], on any device.
        augment: flip half of the images and crop each from a black frame of 4 pixels.
        generator: CPU generator for the augmentation; may be None without it.

    Returns:
        float32 [B, 3, H, W] in -1 ... 1, channels_last, on the images' device.
    """
    if augment:
        images = _flip_and_crop(images, generator)
    # NHWC bytes seen as NCHW are channels_last already: no copy but the conversion.
    x_B3HW = (
        images.permute(0, 3, 1, 2).to(torch.float32).contiguous(memory_format=torch.channels_last)
    )
    return x_B3HW.div_(127.5).sub_(1)


def _flip_and_crop(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One gather for the whole batch: a flip is a crop whose columns run backwards."""
    B, H, W, _ = images.shape
    device = images.device
    top_B, left_B = torch.randint(0, 2 * MARGIN + 1, (2, B), generator=generator).to(device)
    flip_B = torch.randint(0, 2, (B,), generator=generator).to(device).bool()
    rows_BH = top_B[:, None] + torch.arange(H, device=device)
    across = torch.arange(W, device=device)
    columns_BW = left_B[:, None] + torch.where(flip_B[:, None], across.flip(0), across)
    framed = F.pad(images, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    return framed[
        torch.arange(B, device=device)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]
    ]
