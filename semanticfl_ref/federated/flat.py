"""A model <-> one row: every floating-point parameter and buffer in a fixed order; integer counters
stay out.

So averaging, resuming, hashing and robust rules are each one operation on a matrix. Letters: P
entries of a row."""

from dataclasses import dataclass

import torch
from torch import nn

from semanticfl_ref.federated.model import HEADS


@dataclass(frozen=True)
class RowLayout:
    """Which entries of a row are which tensor. Heads come last: models with and without them share
    the row's beginning.

    Attributes:
        names, shapes: of the tensors, in the row's order.
        batch_norm: int64 indices of the entries that belong to BatchNorm layers.
        buffers: int64 indices of the entries that are no parameters: nothing descends there.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    batch_norm: torch.Tensor
    buffers: torch.Tensor

    @property
    def entries(self) -> int:
        """P."""
        return sum(shape.numel() for shape in self.shapes)


def layout_of(model: nn.Module) -> RowLayout:
    """The row layout of a model."""
    tensors = _tensors(model)
    norms = tuple(
        name + "." for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    )
    buffers = {name for name, _ in model.named_buffers()}

    def entries(belongs) -> torch.Tensor:
        return torch.cat(
            [torch.full((t.numel(),), belongs(name)) for name, t in tensors.items()]
        ).nonzero()[:, 0]

    return RowLayout(
        tuple(tensors),
        tuple(t.shape for t in tensors.values()),
        entries(lambda name: name.startswith(norms)),
        entries(buffers.__contains__),
    )


def to_row(model: nn.Module) -> torch.Tensor:
    """A new float32 row [P] on the model's device."""
    return torch.cat([t.detach().reshape(-1) for t in _tensors(model).values()])


@torch.no_grad()
def load_row(model: nn.Module, row_P: torch.Tensor) -> None:
    """Write a row [P] into the model's parameters and buffers, in place."""
    tensors = list(_tensors(model).values())
    assert row_P.numel() == sum(t.numel() for t in tensors), "the row belongs to another model"
    for tensor, values in zip(tensors, row_P.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))


def beside_parameters(
    model: nn.Module, row_P: torch.Tensor
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter of the model with its part of a row, which may be another model's, a gradient,
    or any other row of the layout.
    """
    tensors, parameters = _tensors(model), dict(model.named_parameters())
    parts = row_P.to(next(model.parameters()).device).split([t.numel() for t in tensors.values()])
    return [
        (parameters[name], part.view(t.shape))
        for (name, t), part in zip(tensors.items(), parts, strict=True)
        if name in parameters
    ]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    return dict(
        sorted(state.items(), key=lambda item: item[0].split(".")[0] in HEADS)
    )  # stable: only the heads move
