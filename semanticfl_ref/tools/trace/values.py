"""What a variable holds, in a few numbers that JSON can carry."""

import math

import torch
from torch import nn

LONGEST = 8  # numbers that are written out; entries of a dict or a tuple that are described


def describe(name: str, value, model: nn.Module | None = None) -> list[dict]:
    """A value under its name; several entries for a dict or a tuple of tensors, of a list its
    length and the first.

    A tensor has shape, dtype, mean, standard deviation, extremes, norm, first entries; a term of an
    objective, (weight, scalar), has both and their product, and the norm of its gradient at the
    weights of `model`, where one is given; a model or an optimizer its entries and the norms of
    weights and gradients; any other object those of its attributes that are numbers or names."""
    if isinstance(value, torch.Tensor):
        return [_tensor(name, value.detach())]
    if _plain(value) is not None or value is None:
        return [{"name": name, "value": _plain(value)}]
    if (
        isinstance(value, tuple)
        and [type(v) for v in value] == [float, torch.Tensor]
        and value[1].ndim == 0
    ):
        return [_term(name, *value, model)]
    if isinstance(value, dict) and value:
        return [
            entry
            for key in list(value)[:LONGEST]
            for entry in describe(f"{name}[{key!r}]", value[key], model)
        ]
    if isinstance(value, (dict, list, tuple)) and all(_plain(v) is not None for v in value):
        return [
            {
                "name": name,
                "value": [_plain(v) for v in list(value)[:LONGEST]],
                "length": len(value),
            }
        ]
    if isinstance(value, list):
        return [
            {"name": name, "is": "list", "fields": {"length": len(value)}},
            *describe(f"{name}[0]", value[0], model),
        ]
    if isinstance(value, tuple):
        return [
            entry
            for place, v in enumerate(value[:LONGEST])
            for entry in describe(f"{name}[{place}]", v, model)
        ]
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        owned = (
            list(value.parameters())
            if isinstance(value, nn.Module)
            else [p for group in value.param_groups for p in group["params"]]
        )
        gradients = [p.grad for p in owned if p.grad is not None]
        return [
            {
                "name": name,
                "is": type(value).__name__,
                "entries": sum(p.numel() for p in owned),
                "norm": _norm(owned),
                "gradient_norm": _norm(gradients) if gradients else None,
            }
        ]
    fields = {
        key: _plain(v)
        for key, v in getattr(value, "__dict__", {}).items()
        if not key.startswith("_") and _plain(v) is not None
    }
    return [{"name": name, "is": type(value).__name__, "fields": fields}]


def _tensor(name: str, value: torch.Tensor) -> dict:
    about, flat = (
        {
            "name": name,
            "shape": list(value.shape),
            "dtype": str(value.dtype)[6:],
            "first": [_plain(v) for v in value.flatten()[:LONGEST].tolist()],
        },
        value.double().flatten(),
    )
    if len(flat) and value.is_floating_point():
        about |= {
            "mean": _plain(flat.mean()),
            "std": _plain(flat.std(correction=0)),
            "norm": _norm([flat]),
        }
    return about | ({"min": _plain(flat.min()), "max": _plain(flat.max())} if len(flat) else {})


def _term(name: str, weight: float, value: torch.Tensor, model: nn.Module | None) -> dict:
    gradient = None
    if model is not None and value.requires_grad:
        found = torch.autograd.grad(
            weight * value,
            [p for p in model.parameters() if p.requires_grad],
            retain_graph=True,
            allow_unused=True,
        )
        gradient = _norm([g for g in found if g is not None])
    return {
        "name": name,
        "weight": weight,
        "value": _plain(value),
        "weighted": _plain(weight * value),
        "gradient_norm": gradient,
    }


def _norm(tensors: list[torch.Tensor]) -> float:
    return _plain(math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors)))


def _plain(value):
    """A number or a text as JSON has it, which knows no NaN; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return (
        str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        if isinstance(value, (bool, int, float, str))
        else None
    )
