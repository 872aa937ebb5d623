"""Control conditions: anchors of the same shape and norms without the diffusion model's meaning.

    sd        no control: the anchors as they are
    shuffled  each image gets another image's visual anchor, and its texts if they are per image;
              texts of classes stay
    permuted  each class's images, and its text, get another class's
    random    Gaussian
    onehot    only the label, through a fixed orthogonal map

Letters: N images, C classes, D width of an anchor.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.config.settings import CONTROLS
from semanticfl_ref.errors import UserError, unknown
from semanticfl_ref.randomness import generator


def apply_control(
    control: str,
    visual_ND: torch.Tensor,
    text: torch.Tensor,
    labels: torch.Tensor,
    *,
    per: str,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual and text anchors under a control condition.

    A row that replaces another has its norm; a row that is only handed to another image or class
    keeps its own.

    Args:
        control: one of CONTROLS.
        visual_ND: float32 [N, D], one anchor per image.
        text: float32 [C, D_text], or [N, C, D_text] with texts per image.
        labels: int64 [N].
        per: "image", or "class" for class means.
        seed: seed of the condition.

    Returns:
        Visual anchors [N, D] or [C, D], as `per` says, and text anchors of the shape received.

    Raises:
        UserError: an unknown condition, or too few images or classes for it.
    """
    classes, source = text.shape[-2], generator(seed, f"anchors/{control}")
    per_image, texts_per_image = per == "image", text.ndim == 3
    visual = visual_ND if per_image else class_means(visual_ND, labels, classes)
    owners = labels if per_image else torch.arange(classes)
    if control == "sd":
        return visual, text
    if control == "shuffled":
        if len(visual_ND) < 2:
            raise UserError("anchors.control = shuffled needs at least two images")
        others_N = _derangement(len(visual_ND), source)
        moved = visual_ND[others_N]
        if not per_image:
            moved = _with_norms_of(visual, class_means(moved, labels, classes))
        return moved, text[others_N] if texts_per_image else text
    if control == "permuted":
        present = owners.unique()
        if len(present) < 2:
            raise UserError("anchors.control = permuted needs images of at least two classes")
        other = torch.arange(classes)
        other[present] = present[_derangement(len(present), source)]
        rows = _rows_of_others(owners, other, source)
        if texts_per_image:
            text = text[rows if per_image else _rows_of_others(labels, other, source)]
        return visual[rows], text[..., other, :]
    if control == "random":
        rows = torch.randn(visual.shape, generator=source)
        text_rows = torch.randn(text.shape, generator=source)
    elif control == "onehot":
        rows = _orthogonal_codes(classes, visual.shape[1], source)[owners]
        text_rows = _orthogonal_codes(classes, text.shape[-1], source)
    else:
        raise unknown("control", control, CONTROLS)
    return _with_norms_of(visual, rows), _with_norms_of(text, text_rows)


def class_means(values_ND: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """The mean [C, D] of every class's rows, accumulated in fp64.

    Raises:
        UserError: a class without images.
    """
    require_every_class(labels, classes)
    sums, counts = class_sums(values_ND, labels, classes)
    return (sums / counts[:, None]).float()


def require_every_class(labels: torch.Tensor, classes: int) -> None:
    """Refuse images from which a class is missing.

    Raises:
        UserError: names the class.
    """
    missing = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"class {missing[0]} has no image among those that make the anchors; use more images, "
            f"or anchors.per = image with anchors.text = clip"
        )


def class_sums(
    values_ND: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum float64 [C, D] and the number int64 [C] of every class's rows."""
    sums = torch.zeros(classes, values_ND.shape[1], dtype=torch.float64)
    counts = torch.bincount(labels, minlength=classes)
    return sums.index_add_(0, labels, values_ND.double()), counts


def _rows_of_others(
    owners: torch.Tensor, other: torch.Tensor, source: torch.Generator
) -> torch.Tensor:
    """For each row the index of a row whose owner is `other[its owner]`; each is used once before
    any is used again."""
    index = torch.empty(len(owners), dtype=torch.long)
    for label in owners.unique():
        rows = (owners == label).nonzero().flatten()
        givers = (owners == other[label]).nonzero().flatten()
        givers = givers[torch.randperm(len(givers), generator=source)]
        index[rows] = givers.repeat(-(-len(rows) // len(givers)))[: len(rows)]
    return index


def _derangement(count: int, source: torch.Generator) -> torch.Tensor:
    """A random permutation without a fixed point: one cycle through all."""
    order = torch.randperm(count, generator=source)
    image = torch.empty(count, dtype=torch.long)
    image[order] = order.roll(1)
    return image


def _orthogonal_codes(classes: int, width: int, source: torch.Generator) -> torch.Tensor:
    """Unit rows [C, D], orthogonal if C <= D."""
    size = max(classes, width)
    gaussian = torch.randn(size, size, generator=source, dtype=torch.float64)
    return F.normalize(torch.linalg.qr(gaussian)[0][:classes, :width].float(), dim=1)


def _with_norms_of(model: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=-1) * model.norm(dim=-1, keepdim=True)
