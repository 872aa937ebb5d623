"""From the section `model` to the clients' model.

Letters: B batch, C classes, D feature width.
"""

from inspect import signature

import torch
from torch import nn

from semanticfl_ref.config.registry import METHODS, MODELS
from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import UserError


def build_model(config: Config, classes: int, image_size: int, **heads: int) -> nn.Module:
    """The client model of a configuration, initialised.

    Args:
        config: section `model`, and the seed.
        classes: C.
        image_size: pixels per side.
        heads: widths of its heads, see `ClientModel`.

    Raises:
        UserError: the model does not offer the normalisation layers.
    """
    settings, build = config.model, MODELS[config.model.name]
    taken = signature(build).parameters
    if settings.norm != "batch" and "norm" not in taken:
        raise UserError(
            f"model.norm = {settings.norm}: the model {settings.name!r} takes no argument norm; "
            f"leave model.norm out, or add the argument"
        )
    offered = {"norm": settings.norm, "image_size": image_size}
    options = {name: value for name, value in offered.items() if name in taken}
    return build(settings.width, classes, **heads, **options, seed=config.run.seed)


def feature_width(config: Config, classes: int, image_size: int) -> int:
    """D of the client model, by a trial of two images.

    Raises:
        UserError: the model does not give logits, features, and levels where the method reads them.
    """
    method = METHODS[config.federation.method]
    name = "forward_with_levels" if method.needs_levels else "forward"
    model = build_model(config, classes, image_size).eval()
    try:
        found = getattr(model, name)(torch.zeros(2, 3, image_size, image_size))
        logits, features, *levels = (list(part.shape) for part in found)
    except Exception as error:  # a model of one's own may raise anything
        problem = f"raised {type(error).__name__}: {error}"
    else:
        if logits == [2, classes] and len(features) == 2 and bool(levels) == method.needs_levels:
            return features[1]
        problem = f"returned shapes {[logits, features, *levels]}"
    wanted = ", then those of every level [B, channels]" if method.needs_levels else ""
    raise UserError(
        f"model {config.model.name!r}: {name} on two images {problem}; it must return logits [B, "
        f"{classes}] and features [B, D]{wanted} (see ClientModel)"
    )
