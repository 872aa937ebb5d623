"""What a watched round looked at, as pictures: stages of the diffusion pass, anchors by class.

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
CLASSES, PER_CLASS = 20, 6  # classes that are shown, and images of each


def stage_picture(values: torch.Tensor) -> str:
    """One image at one stage: an image uint8 [H, W, 3], maps [C, h, w] of which up to nine channels
    are shown as tiles, or a vector, as stripes.
    """
    if values.dtype == torch.uint8:
        return png(values)
    if values.ndim == 1:
        return png(heat(values[None]))
    side = min(3, isqrt(len(values)))
    rows = F.pad(values[: side**2], (0, 1, 0, 1)).split(side)
    return png(heat(torch.cat([torch.cat(list(row), dim=1) for row in rows])[:-1, :-1]))


def anchor_pictures(context: RunContext) -> list[tuple[str, str, str]]:
    """Name, visual anchors and text anchor of the first classes that have visual anchors.

    Visual anchors are one row per image, at most PER_CLASS; components are in units of their
    standard deviation.
    """
    anchors, dataset = context.anchors, context.dataset
    if anchors is None:
        return []
    visual, labels = anchors.visual, dataset.train_labels
    if anchors.per == "class":
        labels = torch.arange(len(visual), device=visual.device)
    is_made = visual.isfinite().all(1)  # not of images that no client trains on
    visual, labels = visual[is_made], labels[is_made]
    visual = visual / visual.std(0).clamp(min=1e-12)
    return [
        (
            dataset.class_names[c],
            png(heat(visual[labels == c][:PER_CLASS])),
            png(heat(anchors.text[c][None])),
        )
        for c in labels.unique()[:CLASSES].tolist()
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
    towards = torch.where(strength > 0, warm, cold)
    return torch.lerp(zero, towards, strength.abs()).round().to(torch.uint8)
