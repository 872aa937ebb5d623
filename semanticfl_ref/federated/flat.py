"""A model <-> one flat vector: every floating parameter and buffer in a fixed order.

This makes averaging, resuming, hashing and robust rules one operation on a matrix each. Integer
counters stay out. A convolution's weights are in the order [out, height, width, in], in which
channels_last keeps them.

Letters: P size of a flat vector.
"""

from dataclasses import dataclass

import torch
from torch import nn

from semanticfl_ref.federated.model import HEADS

ORDER = "channels_last"  # of entries; part of a run's identity


@dataclass(frozen=True)
class FlatLayout:
    """Which entries of a flat vector are what.

    Heads come last: models with and without them share the beginning.

    Attributes:
        size: P.
        batch_norm: int64 indices of the entries that belong to BatchNorm layers.
        buffers: int64 indices of the buffers' entries (not optimised).
        optimised: int64 indices of all other entries.
    """

    size: int
    batch_norm: torch.Tensor
    buffers: torch.Tensor
    optimised: torch.Tensor


def flat_layout(model: nn.Module) -> FlatLayout:
    """The layout of a model's flat vector."""
    tensors = _tensors(model)
    modules, buffers = model.named_modules(), dict(model.named_buffers())
    norms = tuple(f"{name}." for name, module in modules if isinstance(module, nn.BatchNorm2d))

    def indices(belongs) -> torch.Tensor:
        masks = [torch.full((t.numel(),), belongs(name)) for name, t in tensors.items()]
        return torch.cat(masks).nonzero()[:, 0]

    return FlatLayout(
        size=sum(t.numel() for t in tensors.values()),
        batch_norm=indices(lambda name: name.startswith(norms)),
        buffers=indices(lambda name: name in buffers),
        optimised=indices(lambda name: name not in buffers),
    )


def flatten_params(model: nn.Module) -> torch.Tensor:
    """A new float32 vector [P] on the model's device."""
    tensors = _tensors(model).values()
    stored = [t.permute(0, 2, 3, 1) if t.ndim == 4 else t for t in tensors]
    return torch.cat([t.reshape(-1) for t in stored])


def load_params(model: nn.Module, params_P: torch.Tensor) -> None:
    """Write a flat vector [P] into the model's parameters and buffers, in place."""
    tensors, parts = model.state_dict(), _parts(model, params_P)
    # In a few launches for all of them.
    torch._foreach_copy_([tensors[name] for name in parts], list(parts.values()))


def with_parameters(
    model: nn.Module, values_P: torch.Tensor
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter of the model with its part of a flat vector (parameters, a gradient, ...)."""
    parts = _parts(model, values_P)
    return [(w, parts[name].to(w.device)) for name, w in model.named_parameters()]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter or buffer, without gradient, in the order of a flat vector."""
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    # A stable sort: only the heads move.
    return dict(sorted(state.items(), key=lambda item: item[0].startswith(HEADS)))


def _parts(model: nn.Module, values_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> the tensor's part of a flat vector, in its shape."""
    tensors = _tensors(model)
    sizes = [t.numel() for t in tensors.values()]
    assert len(values_P) == sum(sizes), "the flat vector belongs to another model"
    parts = {}
    for (name, tensor), part in zip(tensors.items(), values_P.split(sizes), strict=True):
        if tensor.ndim == 4:
            out, into, height, width = tensor.shape
            parts[name] = part.view(out, height, width, into).permute(0, 3, 1, 2)
        else:
            parts[name] = part.view(tensor.shape)
    return parts
