"""What a variable holds: numbers that JSON can carry, and a text for readers."""

import math

import torch
from torch import nn

LONGEST = 8  # numbers that are written out, and items of a collection that are described


def describe(values: dict[str, object]) -> list[dict]:
    """Named values: an entry each, or of a collection one for each of its first items.

    Every entry has a name and a text. A tensor has numbers too: shape, dtype, first entries,
    extremes, mean, standard deviation and norm; a term of an objective, (weight, scalar), has
    weight, value and their product. The text of a model has the norms of its parameters and
    gradients, that of any other object those of its attributes that are numbers or texts.
    """
    return [entry for name, value in values.items() for entry in _entries(name, value)]


def plain(value: object) -> bool | int | float | str | None:
    """A number or a text as JSON has it, which has no NaN; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (int, float, str)) else None


def number(value: object) -> str:
    """Four digits of a float; a long text is shortened; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else f"{text[:29]}..."


def _entries(name: str, value: object) -> list[dict]:
    match value:
        case torch.Tensor():
            about = _tensor(value.detach())
        case None | int() | float() | str():
            about = {"value": plain(value), "text": number(plain(value))}
        case nn.Module():
            about = {"text": _model(value)}
        case (float() | int() as weight, torch.Tensor(ndim=0) as term):
            about = {"weight": weight, "value": plain(term), "weighted": plain(weight * term)}
            about["text"] = "{} x {} = {}".format(*map(number, about.values()))
        case dict() | list() | tuple():
            items = _items(name, value)
            if items:
                return describe(dict(items[:LONGEST]))
            first = [plain(item) for item in list(value)[:LONGEST]]
            text = ", ".join(map(number, first)) or "empty"
            about = {"value": first, "length": len(value), "text": text}
        case _:
            about = {"text": _object(value)}
    return [{"name": name, **about}]


def _tensor(tensor: torch.Tensor) -> dict:
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    first = [plain(entry) for entry in tensor.flatten()[:LONGEST].tolist()]
    about = {"shape": shape, "dtype": dtype, "first": first}
    text = ", ".join(map(number, first))
    if tensor.numel():
        precise = tensor.double()
        about["std"] = plain(precise.std(correction=0))
        for name in ("mean", "norm", "min", "max"):
            about[name] = plain(getattr(precise, name)())
    if tensor.numel() > LONGEST:
        numbers = {name: number(value) for name, value in about.items()}
        text = "mean {mean} ± {std}, norm {norm}, {min} to {max}".format_map(numbers)
    kind = f"{dtype} {shape}" if shape else dtype
    return {**about, "text": f"{kind}  {text}"}


def _model(model: nn.Module) -> str:
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradient = f"gradient norm {_norm(gradients)}" if gradients else "no gradient"
    count = sum(p.numel() for p in parameters)
    name = type(model).__name__
    return f"{name}, {count:,} parameters of norm {_norm(parameters)}, {gradient}"


def _norm(tensors: list[torch.Tensor]) -> str:
    return number(nn.utils.get_total_norm(tensors).item())


def _items(name: str, value: dict | list | tuple) -> list[tuple[str, object]]:
    """Named items of a collection; none if it is short: empty, or of numbers and texts alone."""
    if isinstance(value, dict):
        return [(f"{name}[{key!r}]", item) for key, item in value.items()]
    if hasattr(value, "_asdict"):
        return [(f"{name}.{key}", item) for key, item in value._asdict().items()]
    if all(plain(item) is not None for item in value):
        return []
    return [(f"{name}[{place}]", item) for place, item in enumerate(value)]


def _object(value: object) -> str:
    attributes = getattr(value, "__dict__", {})
    fields = [
        f"{key}={number(plain(item))}"
        for key, item in attributes.items()
        if not key.startswith("_") and plain(item) is not None
    ]
    return type(value).__name__ + (f"({', '.join(fields[:6])})" if fields else "")
