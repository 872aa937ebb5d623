"""What a watched round looked at, as pictures: the stages of the diffusion pass, the anchors by class.

Letters: C channels, D width of an anchor.
"""

import base64
import io
from math import isqrt

import torch
import torch.nn.functional as F
from PIL import Image

from semanticfl_ref.federated.context import RunContext

# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart.
COLD, ZERO, WARM = (0, 114, 178), (240, 240, 236), (213, 94, 0)
TILE = 32  # side of a channel's tile, in pixels
CLASSES, PER_CLASS = 20, 6  # classes that are shown, and images of each


def stage_picture(values: torch.Tensor) -> str:
    """One image at one stage: an image uint8 [H, W, 3], maps [C, h, w] of which up to nine channels
    are shown as tiles, or a vector, in rows of equal length.
    """
    if values.dtype == torch.uint8:
        return png(values)
    if values.ndim == 1:
        rows = max(r for r in range(1, isqrt(len(values)) + 1) if len(values) % r == 0)
        return png(heat(values.view(rows, -1)))
    side = min(3, isqrt(len(values)))
    scale = max(1, TILE // values.shape[1])
    tiles = F.interpolate(values[None, : side**2].float(), scale_factor=scale, mode="nearest")
    tiles = F.pad(tiles[0], (0, 2, 0, 2))
    rows = [torch.cat(list(row), dim=1) for row in tiles.split(side)]
    return png(heat(torch.cat(rows)[:-2, :-2]))


def anchor_pictures(context: RunContext) -> list[tuple[str, str, str]]:
    """Class name, visual anchors and text anchor of the first classes that have visual anchors.

    Visual anchors are one row per image, at most PER_CLASS; components are in units of their
    standard deviation.
    """
    if context.anchors is None:
        return []
    visual, labels, names = (
        context.anchors.visual,
        context.dataset.train_labels,
        context.dataset.class_names,
    )
    if context.anchors.per == "class":
        labels = torch.arange(len(visual), device=visual.device)
    is_used = visual.isfinite().all(1)  # by a client's image
    visual, labels = visual[is_used], labels[is_used]
    visual = visual / visual.std(0).clamp(min=1e-12)
    classes = labels.unique()[:CLASSES].tolist()
    rows = [visual[labels == c][:PER_CLASS] for c in classes]
    visual_pictures = heat(torch.cat(rows)).split([len(part) for part in rows])
    text_pictures = heat(context.anchors.text[classes]).split(1)
    return [
        (names[c], png(of_images), png(of_text))
        for c, of_images, of_text in zip(classes, visual_pictures, text_pictures, strict=True)
    ]


def png(pixels: torch.Tensor) -> str:
    """A picture uint8 [height, width, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.cpu().contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(values: torch.Tensor) -> torch.Tensor:
    """A matrix as colours, uint8 [height, width, 3]: blue below zero, red above, full from the 99th
    percentile of the magnitudes on.
    """
    values = values.detach().float().cpu().nan_to_num()
    strength = values / values.abs().quantile(0.99).clamp(min=1e-12)
    strength = strength.clamp(-1, 1)[:, :, None]
    cold, zero, warm = (torch.tensor(colour).float() for colour in (COLD, ZERO, WARM))
    towards = torch.where(strength > 0, warm, cold) - zero
    return (zero + strength.abs() * towards).round().to(torch.uint8)
