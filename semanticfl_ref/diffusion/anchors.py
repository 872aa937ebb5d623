"""A `FeatureBank` -> `Anchors`: one PCA per tapped layer, levels side by side; class texts; and the controls that carry no meaning.

Letters: N images, C classes, L taps, D width of an anchor.
"""

import re
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
    """What clients are drawn towards. visual: float32 [N, D] or [C, D], as `per` says; text: float32 [C, D_text]; provenance: whose images, and how."""

    visual: torch.Tensor
    text: torch.Tensor
    per: str
    provenance: dict

    def visual_for(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The visual anchors [B, D] of images with these labels [B] and these places [B] in the training set."""
        return self.visual[indices if self.per == "image" else labels]


def make_anchors(
    bank: FeatureBank, labels: torch.Tensor, *, width: int, control: str = "sd", per: str = "image", seed: int = 0, classes: int,
    whiten: bool = True, aggregation: str = "equal", images: str = "train",
) -> Anchors:  # fmt: skip
    """Distil a bank into anchors.

    Centring and unit length are left to the loss, which needs both for its own features too.

    Args:
        bank: of N images.
        labels: int64 [N] in 0 ... C-1.
        width: D. Nothing is padded: more than the levels can give is refused.
        control: "sd" (the model's own anchors) or one without their meaning, same shapes and norms: "shuffled": each image gets another image's;
            "permuted": each class's images, and its text, get another class's; "random": Gaussian; "onehot": the label alone, through a fixed orthogonal map.
        per: "image", or "class" for the classes' means.
        seed: of the controls.
        classes: C.
        whiten: every component to unit variance; without it each level is divided by one number, so that no level wins by its scale.
        aggregation: "equal" shares of the width for every tap, or their widths in the taps' order, such as "256-128-128".
        images: whose images these are, for the provenance.

    Raises:
        UserError: an unknown name, or a width that the levels cannot give.

    Source: Choice: the paper's "adaptive" aggregation is not published; 256-128-128 over up-blocks is FedDifRC's.
    """
    for what, name, known in (("control", control, CONTROLS), ("granularity of anchors", per, GRANULARITIES)):
        if name not in known:
            raise unknown(what, name, known)
    widths = _widths(width, aggregation, list(bank.features))
    levels, explained = [], {}
    for (tap, values_ND), part in zip(bank.features.items(), widths, strict=True):
        level, share = _pca(values_ND.double(), part, whiten, tap)
        levels.append(level)
        explained[tap] = round(share, 6)
    visual = torch.cat(levels, dim=1).float()
    visual, text = _controlled(visual, bank.text, labels, control, per, seed, classes)
    copied = ("source", "weights_sha256", "dataset_sha256", "taps", "timestep", "pool", "prompt", "condition", "input_size", "precision")
    provenance = {
        "images": images, "image_count": len(labels), "bank": bank.id, "control": control, "per": per, "seed": seed, "width": width, "widths": widths,
        "aggregation": aggregation, "whiten": whiten, "explained_variance": explained, **{key: bank.meta.get(key) for key in copied},
    }  # fmt: skip
    return Anchors(visual.contiguous(), text.contiguous(), per, provenance)


def pca(values_ND: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of float64 [N, D]: mean [D], directions [D, width], variances of all directions [D], both in falling order.

    A direction's sign is free; here its entry of largest magnitude is positive, so that two machines agree.
    """
    mean = values_ND.mean(0)
    covariance = torch.zeros(values_ND.shape[1], values_ND.shape[1], dtype=torch.float64)
    for part in values_ND.split(4096):
        covariance += (part - mean).T @ (part - mean)
    variances, directions = torch.linalg.eigh(covariance / max(len(values_ND) - 1, 1))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * largest.sign(), variances


def _pca(values_ND: torch.Tensor, width: int, whiten: bool, tap: str) -> tuple[torch.Tensor, float]:
    mean, directions, variances = pca(values_ND, width)
    available = int((variances > 1e-10 * variances[0]).sum()) if variances[0] > 0 else 0
    if width > available:
        raise UserError(f"anchor width: tap {tap} gives {available} components of {len(values_ND)} images, {width} were asked of it; lower the width, or pool finer")
    kept = variances[:width]
    scale = kept.sqrt() if whiten else kept.mean().sqrt()
    return (values_ND - mean) @ directions / scale, float(kept.sum() / variances.sum())


def _widths(width: int, aggregation: str, taps: list[str]) -> list[int]:
    if width < len(taps):
        raise UserError(f"anchor width {width} is below one component for each of {len(taps)} taps")
    if aggregation == "equal":
        return [width // len(taps) + (i < width % len(taps)) for i in range(len(taps))]
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", aggregation):
        raise UserError(f"aggregation {aggregation!r}: write equal, or the taps' widths in order, such as 256-128-128")
    widths = [int(part) for part in aggregation.split("-")]
    if len(widths) != len(taps) or sum(widths) != width:
        raise UserError(f"aggregation {aggregation} must name {len(taps)} widths (taps {', '.join(taps)}) that sum to the anchor width {width}")
    return widths


def _controlled(visual_ND, text_CD, labels, control: str, per: str, seed: int, classes: int):
    """The anchors asked for. A control's rows keep the length of the rows they replace; what is only handed to another keeps its own."""
    draw = generator(seed, f"anchors/{control}")
    own = visual_ND if per == "image" else _class_means(visual_ND, labels, classes)
    owners = labels if per == "image" else torch.arange(classes)
    if control == "sd":
        return own, text_CD
    if control == "shuffled":  # texts belong to classes, not to images: they stay
        if len(visual_ND) < 2:
            raise UserError("control shuffled needs two images")
        moved = visual_ND[_derangement(len(visual_ND), draw)]
        return (moved, text_CD) if per == "image" else (_as_long_as(_class_means(moved, labels, classes), own), text_CD)
    if control == "permuted":
        present = owners.unique()
        if len(present) < 2:
            raise UserError("control permuted needs images of two classes")
        other = torch.arange(classes)
        other[present] = present[_derangement(len(present), draw)]
        return own[_handed(owners, other, draw)], text_CD[other]
    if control == "random":
        return tuple(_as_long_as(torch.randn(rows.shape, generator=draw), rows) for rows in (own, text_CD))
    return _as_long_as(_codes(classes, own.shape[1], draw)[owners], own), _as_long_as(_codes(classes, text_CD.shape[1], draw), text_CD)


def _handed(owners: torch.Tensor, other: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """For each row the number of a row whose owner is `other[its owner]`; each is used once before any is used again."""
    source = torch.empty(len(owners), dtype=torch.long)
    for label in owners.unique():
        rows, givers = (owners == label).nonzero().flatten(), (owners == other[label]).nonzero().flatten()
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
    return F.normalize(torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0][:classes, :width].float(), dim=1)


def _as_long_as(rows: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=1) * model.norm(dim=1, keepdim=True)


def _class_means(visual_ND: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise UserError(f"class {int((counts == 0).nonzero()[0])} has no image among those that make the anchors; use anchors per image, or more images")
    sums = torch.zeros(classes, visual_ND.shape[1], dtype=torch.float64).index_add_(0, labels, visual_ND.double())
    return (sums / counts[:, None]).float()


def linear_probe(features: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor, penalty: float = 1e-3) -> float:
    """How much of the labels a linear map reads: softmax regression by L-BFGS on features standardised by the first set.

    Args:
        features, test_features: [N, D], any float type. labels, test_labels: int64 [N].
        penalty: weight of the squared weights, against the mean cross-entropy.

    Returns:
        The accuracy on the second set, 0 ... 1.
    """
    mean, spread = features.double().mean(0), features.double().std(0).clamp(min=1e-8)
    train, test = (((part.double() - mean) / spread).float() for part in (features, test_features))
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    weight, bias = torch.zeros(train.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(((test @ weight + bias).argmax(1) == test_labels).double().mean())
