"""What a variable holds, in a few numbers that JSON can carry."""

import math
from collections.abc import Iterable

import torch
from torch import nn

LONGEST = 8  # numbers that are written out, and items of a collection that are described


def describe(name: str, value: object) -> list[dict]:
    """A value under its name: one entry, or one for each of the first items of a collection.

    A tensor has shape, dtype, mean, standard deviation, extremes, norm and first numbers; a term of
    an objective, (weight, scalar), both and their product; a model the norms of its parameters and
    gradients; any other object those of its attributes that are numbers or texts.
    """
    match value:
        case torch.Tensor():
            about = _tensor(value.detach())
        case None | bool() | int() | float() | str():
            about = {"value": plain(value)}
        case nn.Module():
            about = _model(value)
        case (float() as weight, torch.Tensor(ndim=0) as term):
            about = weighted(weight, term)
        case dict() | list() | tuple():
            return _collection(name, value)
        case _:
            about = {"is": type(value).__name__, "fields": _fields(value)}
    return [{"name": name, **about}]


def weighted(weight: float, value: torch.Tensor) -> dict:
    """A term of an objective."""
    return {"weight": weight, "value": plain(value), "weighted": plain(weight * value)}


def plain(value: object) -> bool | int | float | str | None:
    """A number or a text as JSON has it, which has no NaN; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def _tensor(value: torch.Tensor) -> dict:
    about = {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "first": [plain(number) for number in value.flatten()[:LONGEST].tolist()],
    }
    if not value.numel():
        return about
    numbers = value.double()
    if value.is_floating_point():
        about["mean"] = plain(numbers.mean())
        about["std"] = plain(numbers.std(correction=0))
        about["norm"] = _norm([numbers])
    return {**about, "min": plain(numbers.min()), "max": plain(numbers.max())}


def _model(model: nn.Module) -> dict:
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {
        "is": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "norm": _norm(parameters),
        "gradient_norm": _norm(gradients) if gradients else None,
    }


def _norm(tensors: Iterable[torch.Tensor]) -> float | str | None:
    return plain(math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors)))


def _collection(name: str, value: dict | list | tuple) -> list[dict]:
    if isinstance(value, dict) and value:
        items = {f"{name}[{key!r}]": item for key, item in value.items()}
    elif hasattr(value, "_asdict"):
        items = {f"{name}.{key}": item for key, item in value._asdict().items()}
    elif all(plain(item) is not None for item in value):
        first = [plain(item) for item in list(value)[:LONGEST]]
        return [{"name": name, "value": first, "length": len(value)}]
    else:
        items = {f"{name}[{place}]": item for place, item in enumerate(value)}
    return [entry for key in list(items)[:LONGEST] for entry in describe(key, items[key])]


def _fields(value: object) -> dict:
    attributes = getattr(value, "__dict__", {})
    found = {key: plain(item) for key, item in attributes.items() if not key.startswith("_")}
    return {key: item for key, item in found.items() if item is not None}
