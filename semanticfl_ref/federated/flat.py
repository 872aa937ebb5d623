"""A model <-> one flat vector: every floating parameter and buffer in a fixed order.

So averaging, resuming, hashing and robust rules are each one operation on a matrix. Integer
counters stay out.

Letters: P size of a flat vector.
"""

from dataclasses import dataclass

import torch
from torch import nn

from semanticfl_ref.federated.model import HEADS


@dataclass(frozen=True)
class FlatLayout:
    """Which part of a flat vector is which tensor.

    Heads come last: models with and without them share the beginning.

    Attributes:
        names, shapes: of the tensors, in order.
        batch_norm: int64 indices of the entries that belong to BatchNorm layers.
        buffers: int64 indices of the buffers' entries (not optimised).
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    batch_norm: torch.Tensor
    buffers: torch.Tensor

    @property
    def size(self) -> int:
        """P."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def optimised(self) -> torch.Tensor:
        """int64 indices of the entries that are not buffers."""
        mask_P = torch.ones(self.size, dtype=torch.bool)
        mask_P[self.buffers] = False
        return mask_P.nonzero()[:, 0]


def flat_layout(model: nn.Module) -> FlatLayout:
    """The layout of a model's flat vector."""
    tensors = _tensors(model)
    modules = model.named_modules()
    norms = tuple(f"{name}." for name, module in modules if isinstance(module, nn.BatchNorm2d))
    buffers = {name for name, _ in model.named_buffers()}

    def indices(belongs) -> torch.Tensor:
        masks = [torch.full((t.numel(),), belongs(name)) for name, t in tensors.items()]
        return torch.cat(masks).nonzero()[:, 0]

    return FlatLayout(
        names=tuple(tensors),
        shapes=tuple(t.shape for t in tensors.values()),
        batch_norm=indices(lambda name: name.startswith(norms)),
        buffers=indices(buffers.__contains__),
    )


def flatten_params(model: nn.Module) -> torch.Tensor:
    """A new float32 vector [P] on the model's device."""
    return torch.cat([t.detach().reshape(-1) for t in _tensors(model).values()])


@torch.no_grad()
def load_params(model: nn.Module, params_P: torch.Tensor) -> None:
    """Write a flat vector [P] into the model's parameters and buffers, in place."""
    tensors = list(_tensors(model).values())
    sizes = [t.numel() for t in tensors]
    assert params_P.numel() == sum(sizes), "the flat vector belongs to another model"
    for tensor, values in zip(tensors, params_P.split(sizes), strict=True):
        tensor.copy_(values.view(tensor.shape))


def with_parameters(
    model: nn.Module, values_P: torch.Tensor
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter of the model with its part of a flat vector (parameters, a gradient, ...)."""
    tensors, parameters = _tensors(model), dict(model.named_parameters())
    values_P = values_P.to(next(model.parameters()).device)
    parts = values_P.split([t.numel() for t in tensors.values()])
    return [
        (parameters[name], part.view(tensor.shape))
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        if name in parameters
    ]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    # A stable sort: only the heads move.
    return dict(sorted(state.items(), key=lambda item: item[0].split(".")[0] in HEADS))
