"""A `FeatureBank` -> `Anchors`: one PCA per tapped layer, levels side by side; class texts; and the
controls that carry no meaning.

Banks are read in pieces: beside the anchors themselves, memory holds one piece and one covariance.

Letters: N images, C classes, L taps, D width of an anchor.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from semanticfl_ref.config import CONTROLS
from semanticfl_ref.diffusion.bank import FeatureBank
from semanticfl_ref.errors import UserError, unknown
from semanticfl_ref.randomness import generator

GRANULARITIES = ("image", "class")


@dataclass(frozen=True)
class Anchors:
    """What clients are drawn towards. visual: float32 [N, D] or [C, D], as `per` says; text:
    float32 [C, D_text]; provenance: whose images, and how.
    """

    visual: torch.Tensor
    text: torch.Tensor
    per: str
    provenance: dict

    def visual_for(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The visual anchors [B, D] of images with these labels [B] and these places [B] in the
        training set.
        """
        return self.visual[indices if self.per == "image" else labels]


def make_anchors(
    bank: FeatureBank,
    labels: torch.Tensor,
    *,
    width: int,
    control: str = "sd",
    per: str = "image",
    seed: int = 0,
    classes: int,
    whiten: bool = True,
    aggregation: str = "equal",
    images: str = "train",
    text_bank: FeatureBank | None = None,
    text_labels: torch.Tensor | None = None,
) -> Anchors:
    """Distil a bank into anchors (the paper's "adaptive multimodal diffusion aggregation", as far
    as it is known).

    Levels are centred by their PCA; unit length is left to the loss, which needs it for its own
    features too.

    Equation (visual-anchor) [N; how the paper's aggregation adapts is not known]: a_i = [ (x_il -
        mean_l) U_l / s_l ] side by side over levels l
    Test: tests/diffusion/test_anchors.py::test_anchors_are_whitened_levels_side_by_side,
        tests/diffusion/test_anchors.py::test_without_whitening_levels_keep_their_shape_but_not_their_scale

    Args:
        bank: of N images.
        labels: int64 [N] in 0 ... C-1.
        width: D. Nothing is padded: more than the levels can give is refused.
        control: "sd" (the model's own anchors) or one without their meaning, same shapes and norms:
            "shuffled": each image gets another image's; "permuted": each class's images, and its
            text, get another class's; "random": Gaussian; "onehot": the label alone, through a
            fixed orthogonal map.
        per: "image", or "class" for the classes' means.
        seed: of the controls.
        classes: C.
        whiten: every component to unit variance; without it each level is divided by one number, so
            that no level wins by its scale.
        aggregation: "equal" shares of the width for every tap; their widths in the taps' order,
            such as "256-128-128"; or "separability": equal widths, each level's squared length in
            proportion to its Fisher ratio, the trace of the variance between classes over that
            within them.
        images: whose images these are, for the provenance.
        text_bank, text_labels: a bank of images passed under their own class's caption, and their
            classes: the text anchors are then the classes' mean U-Net features, mapped like the
            visual ones (D wide), in place of the text encoder's output.

    Raises:
        UserError: an unknown name, or a width that the levels cannot give.

    Source: Choice: how the paper's aggregation adapts is not published; 256-128-128 over up-blocks,
        and texts from the U-Net, are FedDifRC's.
    """
    for what, name, known in (
        ("control", control, CONTROLS),
        ("granularity of anchors", per, GRANULARITIES),
    ):
        if name not in known:
            raise unknown(what, name, known)
    taps = list(bank.widths)
    widths = _widths(width, aggregation, taps)
    maps = {tap: _fitted(bank, tap, part, whiten) for tap, part in zip(taps, widths, strict=True)}
    levels = {tap: maps[tap](bank.chunks(tap)) for tap in taps}
    strengths = _strengths(levels, labels, classes) if aggregation == "separability" else None
    visual = _side_by_side(levels, strengths)
    text = (
        bank.text if text_bank is None else _texts(text_bank, text_labels, maps, strengths, classes)
    )
    visual, text = _controlled(visual, text, labels, control, per, seed, classes)
    copied = (
        "source",
        "weights_sha256",
        "dataset_sha256",
        "taps",
        "timestep",
        "pool",
        "prompt",
        "condition",
        "latent",
        "input_size",
        "precision",
    )
    provenance = {
        "images": images,
        "image_count": len(labels),
        "bank": bank.id,
        "control": control,
        "per": per,
        "seed": seed,
        "width": width,
        "widths": widths,
        "aggregation": aggregation,
        "level_strengths": strengths,
        "whiten": whiten,
        "explained_variance": {tap: round(maps[tap].explained, 6) for tap in taps},
        "text": "clip" if text_bank is None else "unet",
        "text_bank": text_bank.id if text_bank else None,
        **{key: bank.meta.get(key) for key in copied},
    }
    return Anchors(visual.contiguous(), text.contiguous(), per, provenance)


def pca(
    chunks: Callable[[], Iterable[torch.Tensor]], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of [N, D] that comes in pieces, in fp64: mean [D], directions [D,
    width], variances of all directions [D], both in falling order.

    Two passes, since the sum of squares minus the squared mean loses half the digits. A direction's
    sign is free; here its entry of largest magnitude is positive, so that two machines agree.

    Equation (pca) [N]: 1/(N-1) sum_i (x_i - mean) (x_i - mean)^T = U diag(variances) U^T
    Test: tests/diffusion/test_anchors.py::test_pca_closed_form

    Args:
        chunks: called twice; yields [n, D] of any float type.
    """
    total, count = 0.0, 0
    for part in chunks():
        total, count = total + part.double().sum(0), count + len(part)
    mean = total / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in chunks():
        centred = part.double() - mean
        covariance += centred.T @ centred
    variances, directions = torch.linalg.eigh(covariance / max(count - 1, 1))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * largest.sign(), variances


@dataclass(frozen=True)
class _Map:
    """A level's affine map from pooled features to its part of the anchor."""

    mean: torch.Tensor
    directions: torch.Tensor
    scale: torch.Tensor
    explained: float

    def __call__(self, chunks: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat(
            [
                ((part.double() - self.mean) @ self.directions / self.scale).float()
                for part in chunks
            ]
        )


def _fitted(bank: FeatureBank, tap: str, width: int, whiten: bool) -> _Map:
    mean, directions, variances = pca(lambda: bank.chunks(tap), width)
    available = int((variances > 1e-10 * variances[0]).sum()) if variances[0] > 0 else 0
    if width > available:
        images = bank.meta.get("images", "these")
        raise UserError(
            f"anchor width: tap {tap} gives {available} components of {images} images, {width} were asked of it; lower the width, or pool finer"
        )
    kept = variances[:width]
    return _Map(
        mean,
        directions,
        kept.sqrt() if whiten else kept.mean().sqrt(),
        float(kept.sum() / variances.sum()),
    )


def _strengths(
    levels: dict[str, torch.Tensor], labels: torch.Tensor, classes: int
) -> dict[str, float]:
    """tap -> its share of the anchor's squared length, by separability; they sum to the number of
    levels.
    """
    ratios = {tap: fisher_ratio(level, labels, classes) for tap, level in levels.items()}
    return {
        tap: round(len(ratios) * ratio / sum(ratios.values()), 6) for tap, ratio in ratios.items()
    }


def fisher_ratio(values_ND: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Trace of the scatter between the classes' means over the trace of the scatter within the
    classes, in fp64; classes without images do not count.

    Equation (separability) [O]: sum_c n_c |mean_c - mean|^2 / sum_i |x_i - mean_class(i)|^2
    Test: tests/diffusion/test_anchors.py::test_fisher_ratio_closed_form
    """
    counts = torch.bincount(labels, minlength=classes).double()
    values = values_ND.double() - values_ND.double().mean(0)
    means = (
        torch.zeros(classes, values.shape[1], dtype=torch.float64).index_add_(0, labels, values)
        / counts.clamp(min=1)[:, None]
    )
    between = (counts[:, None] * means.square()).sum()
    return float(between / (values - means[labels]).square().sum().clamp(min=1e-300))


def _side_by_side(
    levels: dict[str, torch.Tensor], strengths: dict[str, float] | None
) -> torch.Tensor:
    return torch.cat(
        [
            level if strengths is None else level * strengths[tap] ** 0.5
            for tap, level in levels.items()
        ],
        dim=1,
    )


def _texts(
    bank: FeatureBank, labels: torch.Tensor, maps: dict[str, _Map], strengths, classes: int
) -> torch.Tensor:
    if list(bank.widths) != list(maps) or bank.meta.get("condition") != "own-class":
        raise UserError(
            "anchors.text = unet needs a bank of the same taps whose images passed under their own class's caption"
        )
    return _class_means(
        _side_by_side({tap: maps[tap](bank.chunks(tap)) for tap in maps}, strengths),
        labels,
        classes,
    )


def _widths(width: int, aggregation: str, taps: list[str]) -> list[int]:
    if width < len(taps):
        raise UserError(f"anchor width {width} is below one component for each of {len(taps)} taps")
    if aggregation in ("equal", "separability"):
        return [width // len(taps) + (i < width % len(taps)) for i in range(len(taps))]
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", aggregation):
        raise UserError(
            f"aggregation {aggregation!r}: write equal, separability, or the taps' widths in order, such as 256-128-128"
        )
    widths = [int(part) for part in aggregation.split("-")]
    if len(widths) != len(taps) or sum(widths) != width:
        raise UserError(
            f"aggregation {aggregation} must name {len(taps)} widths (taps {', '.join(taps)}) that sum to the anchor width {width}"
        )
    return widths


def _controlled(visual_ND, text_CD, labels, control: str, per: str, seed: int, classes: int):
    """The anchors asked for. A control's rows keep the length of the rows they replace; what is
    only handed to another keeps its own.
    """
    draw = generator(seed, f"anchors/{control}")
    own = visual_ND if per == "image" else _class_means(visual_ND, labels, classes)
    owners = labels if per == "image" else torch.arange(classes)
    if control == "sd":
        return own, text_CD
    if control == "shuffled":  # texts belong to classes, not to images: they stay
        if len(visual_ND) < 2:
            raise UserError("control shuffled needs two images")
        moved = visual_ND[_derangement(len(visual_ND), draw)]
        return (
            (moved, text_CD)
            if per == "image"
            else (_as_long_as(_class_means(moved, labels, classes), own), text_CD)
        )
    if control == "permuted":
        present = owners.unique()
        if len(present) < 2:
            raise UserError("control permuted needs images of two classes")
        other = torch.arange(classes)
        other[present] = present[_derangement(len(present), draw)]
        return own[_handed(owners, other, draw)], text_CD[other]
    if control == "random":
        return tuple(
            _as_long_as(torch.randn(rows.shape, generator=draw), rows) for rows in (own, text_CD)
        )
    return _as_long_as(_codes(classes, own.shape[1], draw)[owners], own), _as_long_as(
        _codes(classes, text_CD.shape[1], draw), text_CD
    )


def _handed(owners: torch.Tensor, other: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """For each row the number of a row whose owner is `other[its owner]`; each is used once before
    any is used again.
    """
    source = torch.empty(len(owners), dtype=torch.long)
    for label in owners.unique():
        rows, givers = (
            (owners == label).nonzero().flatten(),
            (owners == other[label]).nonzero().flatten(),
        )
        givers = givers[torch.randperm(len(givers), generator=draw)]
        source[rows] = givers.repeat(-(-len(rows) // len(givers)))[: len(rows)]
    return source


def _derangement(count: int, draw: torch.Generator) -> torch.Tensor:
    """A random permutation without a fixed point: one cycle through all."""
    order = torch.randperm(count, generator=draw)
    image = torch.empty(count, dtype=torch.long)
    image[order] = order.roll(1)
    return image


def _codes(classes: int, width: int, draw: torch.Generator) -> torch.Tensor:
    """[C, D] of unit rows, orthogonal where C <= D."""
    size = max(classes, width)
    return F.normalize(
        torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0][
            :classes, :width
        ].float(),
        dim=1,
    )


def _as_long_as(rows: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=1) * model.norm(dim=1, keepdim=True)


def _class_means(visual_ND: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise UserError(
            f"class {int((counts == 0).nonzero()[0])} has no image among those that make the anchors; use anchors per image, or more images"
        )
    sums = torch.zeros(classes, visual_ND.shape[1], dtype=torch.float64).index_add_(
        0, labels, visual_ND.double()
    )
    return (sums / counts[:, None]).float()
