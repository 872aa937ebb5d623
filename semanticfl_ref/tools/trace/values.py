"""What a variable holds: numbers that JSON can carry, and a text for readers."""

import math
from collections.abc import Iterable

import torch
from torch import nn

LONGEST = 8  # numbers that are written out, and items of a collection that are described


def describe(name: str, value: object) -> list[dict]:
    """A value under its name: one entry, or one for each of the first items of a collection.

    Every entry has a text. A tensor has numbers too: shape, dtype, first entries, extremes, mean,
    standard deviation and norm; a term of an objective, (weight, scalar), has weight, value and
    their product. The text of a model has the norms of its parameters and gradients, that of any
    other object those of its attributes that are numbers or texts.
    """
    match value:
        case torch.Tensor():
            about = tensor_summary(value.detach())
        case None | bool() | int() | float() | str():
            about = {"value": plain(value), "text": number(plain(value))}
        case nn.Module():
            about = {"text": _model(value)}
        case (float() as weight, torch.Tensor(ndim=0) as term):
            about = term_summary(weight, term)
        case dict() | list() | tuple():
            return _collection(name, value)
        case _:
            about = {"text": _object(value)}
    return [{"name": name, **about}]


def tensor_summary(tensor: torch.Tensor) -> dict:
    """A tensor in numbers and as a text."""
    first = [plain(entry) for entry in tensor.flatten()[:LONGEST].tolist()]
    dtype, text = str(tensor.dtype).removeprefix("torch."), ", ".join(map(number, first))
    about = {"shape": list(tensor.shape), "dtype": dtype, "first": first}
    if tensor.numel():
        v = tensor.double()
        about |= {"mean": plain(v.mean()), "std": plain(v.std(correction=0))}
        about |= {"norm": plain(v.norm()), "min": plain(v.min()), "max": plain(v.max())}
    if tensor.numel() > LONGEST:
        numbers = {key: number(value) for key, value in about.items()}
        text = "mean {mean} ± {std}, norm {norm}, {min} to {max}".format_map(numbers)
    shape = f" {about['shape']}" if about["shape"] else ""
    return {**about, "text": f"{dtype}{shape}  {text}"}


def term_summary(weight: float, value: torch.Tensor) -> dict:
    """A term of an objective in numbers and as a text."""
    about = {"weight": weight, "value": plain(value), "weighted": plain(weight * value)}
    return {**about, "text": "{} x {} = {}".format(*map(number, about.values()))}


def plain(value: object) -> bool | int | float | str | None:
    """A number or a text as JSON has it, which has no NaN; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def number(value: object) -> str:
    """Four digits of a float; a long text is shortened; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else f"{text[:29]}..."


def _model(model: nn.Module) -> str:
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradient = f"gradient norm {number(_norm(gradients))}" if gradients else "no gradient"
    count = sum(p.numel() for p in parameters)
    name = type(model).__name__
    return f"{name}, {count:,} parameters of norm {number(_norm(parameters))}, {gradient}"


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.hypot(*(tensor.detach().double().norm() for tensor in tensors))


def _collection(name: str, value: dict | list | tuple) -> list[dict]:
    if isinstance(value, dict) and value:
        items = {f"{name}[{key!r}]": item for key, item in value.items()}
    elif hasattr(value, "_asdict"):
        items = {f"{name}.{key}": item for key, item in value._asdict().items()}
    elif all(plain(item) is not None for item in value):
        first = [plain(item) for item in list(value)[:LONGEST]]
        text = ", ".join(map(number, first)) or "empty"
        return [{"name": name, "value": first, "length": len(value), "text": text}]
    else:
        items = {f"{name}[{place}]": item for place, item in enumerate(value)}
    return [entry for key in list(items)[:LONGEST] for entry in describe(key, items[key])]


def _object(value: object) -> str:
    attributes = getattr(value, "__dict__", {})
    fields = [
        f"{key}={number(plain(item))}"
        for key, item in attributes.items()
        if not key.startswith("_") and plain(item) is not None
    ]
    return type(value).__name__ + (f"({', '.join(fields[:6])})" if fields else "")
