"""What a watched round looked at, as pictures: stages of the diffusion pass, anchors by class.

Letters: C channels, D width of an anchor.
"""

import base64
import io
from math import isqrt

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.tools.report.drawing import COLOURS

COLD, WARM = COLOURS[:2]  # blue and vermilion
ZERO = (240, 240, 236)
CLASSES, PER_CLASS = 20, 6  # classes that are shown, and images of each


def stage_picture(values: torch.Tensor) -> str:
    """One image at one stage: an image uint8 [H, W, 3], maps [C, h, w] of which up to nine channels
    are shown as tiles, or a vector, as stripes.
    """
    if values.dtype == torch.uint8:
        return png(Image.fromarray(values.cpu().numpy()))
    if values.ndim == 1:
        return heat_map(values[None])
    side = min(3, isqrt(len(values)))
    rows = F.pad(values[: side**2], (0, 1, 0, 1)).split(side)
    return heat_map(torch.vstack([torch.hstack(list(row)) for row in rows])[:-1, :-1])


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

    def text_rows(c: int) -> torch.Tensor:
        """A class's text anchor, or with texts per image those of the first images of the class."""
        if anchors.text.ndim == 2:
            return anchors.text[c][None]
        return anchors.text[dataset.train_labels == c, c][:PER_CLASS]

    return [
        (
            dataset.class_names[c],
            heat_map(visual[labels == c][:PER_CLASS]),
            heat_map(text_rows(c)),
        )
        for c in labels.unique()[:CLASSES].tolist()
    ]


def heat_map(values: torch.Tensor) -> str:
    """A matrix as a picture: blue below zero, red above, full from the 99th percentile of the
    magnitudes on.
    """
    values = values.detach().float().cpu().nan_to_num()
    strength = values / values.abs().quantile(0.99).clamp(min=1e-12)
    grey = (127 + 127 * strength.clamp(-1, 1)).round().byte()  # 0, 127 and 254: full, zero, full
    picture = Image.fromarray(grey.numpy())
    return png(ImageOps.colorize(picture, COLD, WARM, mid=ZERO, whitepoint=254))


def png(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
