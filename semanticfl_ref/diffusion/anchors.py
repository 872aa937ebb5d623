"""Visual and text anchors from diffusion features: one PCA per layer, the layers side by side.

Features are read in chunks: beside the anchors, memory holds one chunk and one covariance.

Letters: N images, B batch, C classes, L layers, D width of an anchor.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from semanticfl_ref.config.settings import AnchorsSettings
from semanticfl_ref.diffusion.controls import apply_control, class_means, class_sums
from semanticfl_ref.diffusion.feature_cache import FeatureCache
from semanticfl_ref.errors import UserError


@dataclass(frozen=True)
class Anchors:
    """What guides the clients.

    Attributes:
        visual: float32 [N, D] or [C, D], as `per` says.
        text: float32 [C, D_text], or [N, C, D_text] with texts per image.
        per: "image" or "class".
        provenance: how they were made, from whose images; plain JSON values.
    """

    visual: torch.Tensor
    text: torch.Tensor
    per: str
    provenance: dict

    def visual_for(self, labels_B: torch.Tensor, indices_B: torch.Tensor) -> torch.Tensor:
        """Visual anchors [B, D] of the training images with these indices and labels."""
        return self.visual[indices_B if self.per == "image" else labels_B]

    def text_for(self, indices_B: torch.Tensor) -> torch.Tensor:
        """Text anchors [C, D_text], or those of the training images with these indices, [B, C,
        D_text]."""
        return self.text if self.text.ndim == 2 else self.text[indices_B]


def make_anchors(
    source: FeatureCache,
    settings: AnchorsSettings,
    *,
    classes: int,
    seed: int,
    text_source: FeatureCache | None = None,
) -> Anchors:
    """Distil features into anchors.

    PCA centres every layer. Norms over positions (`diffusion.pooling = norm`) are of principal
    components already and stay as they are. Anchors are normalised to unit length in the loss, with
    the clients' features.

    Equation (visual-anchor) [N; how the paper's aggregation adapts is not known]:
        a_i = [ (x_il - mean_l) U_l / s_l ] side by side over layers l
    Test: tests/diffusion/test_anchors.py::test_anchors_are_whitened_levels_side_by_side,
        tests/diffusion/test_anchors.py::test_without_whitening_levels_keep_their_shape_but_not_their_scale

    Args:
        source: features that make the visual anchors.
        settings: the section `anchors`. Visual anchors are per class if the images are not the
            clients' own (`settings.images` other than train).
        classes: C.
        seed: seed of the control conditions.
        text_source: for `settings.text = unet`, features of images under their own class's caption:
            their class means, mapped like the visual anchors, are the text anchors instead of the
            text encoder's output. Of images under every class's caption: all are text anchors, per
            image.

    Raises:
        UserError: widths that the layers do not have, or a class without images.

    Source: Choice: the aggregation. Half, a quarter and a quarter for the up-blocks and U-Net text
    anchors are FedDifRC's; that there is a VAE level is the abstract's, its eighth of the width
    ours. The paper's "adaptive multimodal diffusion aggregation" is not published.
    """
    widths = layer_widths(settings, list(source.widths))
    projections = [_fit(source, layer, widths, settings) for layer in widths]
    levels = [project(source) for project in projections]
    strengths = None
    if settings.aggregation == "separability":
        strengths = _strengths(levels, source.labels, classes)
    visual_ND, text = _side_by_side(levels, strengths), source.text
    if text_source is not None:
        condition = text_source.meta.get("condition")
        missing = widths.keys() - text_source.widths.keys()
        if missing or condition not in ("own-class", "every-class"):
            raise UserError(
                "anchors.text = unet needs features of the same layers, of images under their own "
                "class's caption or every class's"
            )
        texts = _side_by_side([project(text_source) for project in projections], strengths)
        if condition == "own-class":
            text = class_means(texts, text_source.labels, classes)
        else:
            text = texts.unflatten(0, (-1, classes))
    per = settings.per if settings.images == "train" else "class"
    visual, text = apply_control(
        settings.control, visual_ND, text, source.labels, per=per, seed=seed
    )
    provenance = {
        **asdict(settings),
        "per": per,
        "seed": seed,
        "image_count": len(source.labels),
        "widths": list(widths.values()),
        "layer_strengths": dict(zip(widths, strengths, strict=True)) if strengths else None,
        "explained_variance": {project.layer: project.explained for project in projections},
        "cache": source.id,
        "text_cache": text_source.id if text_source else None,
        **{key: source.meta.get(key) for key in COPIED},
    }
    return Anchors(visual.contiguous(), text.contiguous(), per, provenance)


# What the provenance copies from the cache's description.
COPIED = (
    "source",
    "weights_sha256",
    "dataset_sha256",
    "layers",
    "timestep",
    "pool",
    "pooling",
    "vae_pool",
    "prompt",
    "condition",
    "latent",
    "input_size",
    "precision",
)


def layer_widths(settings: AnchorsSettings, layers: list[str]) -> dict[str, int]:
    """Layer -> width of its part of an anchor, of the layers that `settings.levels` keeps.

    Widths are those of `settings.aggregation`; if layers are left out, the others share the whole
    width in the same proportions.

    Raises:
        UserError: the widths do not fit the layers or do not sum to the anchor's width; or no layer
            is left.
    """
    width, aggregation, levels = settings.width, settings.aggregation, settings.levels
    kept = [layer for layer in layers if levels in ("all", _level(layer))]
    count = len(kept)
    if not kept:
        raise UserError(
            f"anchors.levels = {levels}: none of diffusion.layers = {','.join(layers)} is of this "
            f"level; add one, or use anchors.levels=all"
        )
    if width < count:
        raise UserError(
            f"anchors.width = {width} is too small for {count} layers: raise it to {count} or more"
        )
    if aggregation in ("equal", "separability"):
        return {layer: width // count + (i < width % count) for i, layer in enumerate(kept)}
    parts = []
    if re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", aggregation):
        parts = [int(part) for part in aggregation.split("-")]
    if len(parts) != len(layers) or sum(parts) != width:
        raise UserError(
            f"anchors.aggregation = {aggregation}: expected equal, separability, or {len(layers)} "
            f"widths such as 256-128-128 (layers {', '.join(layers)}) that sum to anchors.width = "
            f"{width}"
        )
    shares = dict(zip(layers, parts, strict=True))
    total = sum(shares[layer] for layer in kept)
    widths = {layer: width * shares[layer] // total for layer in kept}
    widths[kept[0]] += width - sum(widths.values())
    return widths


def require_components(
    settings: AnchorsSettings, widths: dict[str, int], available: dict[str, int], images: int
) -> None:
    """Refuse an anchor that is wider than the layers' components.

    Args:
        settings: the section `anchors`.
        widths: as `layer_widths` returns them.
        available: layer -> number of its PCA components, or a bound of it.
        images: their number, for the message.

    Raises:
        UserError: names the settings, and values that work.
    """
    for layer, components in available.items():
        if widths[layer] <= components:
            continue
        fits = len(widths) * min(available.values())
        remedy = f"use at most --set anchors.width={fits}"
        if settings.aggregation not in ("equal", "separability"):
            remedy += " --set anchors.aggregation=equal"
        if fits < 2:
            remedy = "leave it out"
        raise UserError(
            f"anchors.width = {settings.width}: layer {layer} has {components} PCA components "
            f"({images} images), {widths[layer]} are requested; {remedy}, use more images, or, if "
            f"the layer has too few channels, a larger diffusion.pool (diffusion.vae_pool for the "
            f"latent)"
        )


def pca(
    chunks: Callable[[], Iterable[torch.Tensor]], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components in fp64 of features [N, D] that come in chunks.

    Two passes, since the sum of squares minus the squared mean loses half of the digits. The sign
    of a direction is free; here its entry of largest magnitude is positive, so that machines agree.

    Equation (pca) [N]:
        1/(N-1) sum_i (x_i - mean) (x_i - mean)^T = U diag(variances) U^T
    Test: tests/diffusion/test_anchors.py::test_pca_closed_form

    Args:
        chunks: called twice; yields [n, D] of any floating dtype.
        width: number of directions.

    Returns:
        Mean [D], directions [D, width], and the variances [D] of all directions, descending.
    """
    total, count = 0.0, 0
    for chunk in chunks():
        total, count = total + chunk.double().sum(0), count + len(chunk)
    mean = total / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for chunk in chunks():
        centred = chunk.double() - mean
        covariance += centred.T @ centred
    variances, directions = torch.linalg.eigh(covariance / max(count - 1, 1))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * largest.sign(), variances


def fisher_ratio(values_ND: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Trace of the scatter between class means over that within classes, in fp64.

    Classes without images do not count.

    Equation (separability) [O]:
        sum_c n_c |mean_c - mean|^2 / sum_i |x_i - mean_class(i)|^2
    Test: tests/diffusion/test_anchors.py::test_fisher_ratio_closed_form
    """
    values = values_ND.double() - values_ND.double().mean(0)
    sums, counts = class_sums(values, labels, classes)
    means = sums / counts.clamp(min=1)[:, None]
    between = (counts[:, None] * means.square()).sum()
    return float(between / (values - means[labels]).square().sum().clamp(min=1e-300))


@dataclass(frozen=True)
class _Projection:
    """A layer's affine map from pooled features to its part of an anchor."""

    layer: str
    mean: torch.Tensor
    directions: torch.Tensor
    scale: torch.Tensor
    explained: float

    def __call__(self, cache: FeatureCache) -> torch.Tensor:
        centred = (chunk.double() - self.mean for chunk in cache.chunks(self.layer))
        return torch.cat([(part @ self.directions / self.scale).float() for part in centred])


def _fit(
    cache: FeatureCache, layer: str, widths: dict[str, int], settings: AnchorsSettings
) -> _Projection:
    width = widths[layer]
    if cache.meta.get("pooling") == "norm" and layer != "vae":
        return _first_components(cache, layer, widths, settings)
    mean, directions, variances = pca(lambda: cache.chunks(layer), width)
    available = int((variances > 1e-10 * variances[0]).sum())
    require_components(settings, widths, {layer: available}, len(cache.labels))
    kept = variances[:width]
    # Without whitening, one number per layer, so that no layer dominates by its scale.
    scale = kept.sqrt() if settings.whiten else kept.mean().sqrt()
    explained = round(float(kept.sum() / variances.sum()), 6)
    return _Projection(layer, mean, directions, scale, explained)


def _first_components(
    cache: FeatureCache, layer: str, widths: dict[str, int], settings: AnchorsSettings
) -> _Projection:
    """The components of largest variance of features that have been through a PCA: norms, which
    are not negative, and stay so."""
    mean_square = sum(chunk.double().square().sum(0) for chunk in cache.chunks(layer))
    available, width = len(mean_square), widths[layer]
    require_components(settings, widths, {layer: available}, len(cache.labels))
    directions = torch.eye(available, dtype=torch.float64)[:, :width]
    scale = torch.ones(1)
    if settings.whiten:
        scale = (mean_square[:width] / len(cache.labels)).sqrt()
    explained = round(float(mean_square[:width].sum() / mean_square.sum()), 6)
    return _Projection(layer, torch.zeros(available), directions, scale, explained)


def _level(layer: str) -> str:
    return "vae" if layer == "vae" else "unet"


def _strengths(levels: list[torch.Tensor], labels: torch.Tensor, classes: int) -> list[float]:
    """Each layer's share of an anchor's squared length, by separability; they sum to L."""
    ratios = [fisher_ratio(level, labels, classes) for level in levels]
    return [round(len(ratios) * ratio / sum(ratios), 6) for ratio in ratios]


def _side_by_side(levels: list[torch.Tensor], strengths: list[float] | None) -> torch.Tensor:
    if strengths is not None:
        pairs = zip(levels, strengths, strict=True)
        levels = [level * strength**0.5 for level, strength in pairs]
    return torch.cat(levels, dim=1)
