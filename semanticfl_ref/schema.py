"""What a setting is: a dataclass field with its help, range, unit and source beside it, checked
when its section is made.
"""

import dataclasses
import json
import math

from semanticfl_ref.errors import UserError, unknown


def option(
    default,
    help: str,
    *,
    low=None,
    high=None,
    above=None,
    choices=None,
    source: str = "",
    unit: str = "",
):
    """A field: `low` and `high` are inclusive bounds, `above` an exclusive one."""
    meta = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "source": source,
        "unit": unit,
    }
    return dataclasses.field(default=default, metadata=meta)


class Section:
    """Checks every field's type and range when a section is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(type(self).__name__.lower(), field, getattr(self, field.name))


def typed(name: str, field: dataclasses.Field, value):
    """`value` as the field's type, where it is a text that spells one; raises UserError."""
    kind = field.type
    if isinstance(value, str) and kind is not str:
        try:
            if kind is bool:
                return {
                    "true": True,
                    "1": True,
                    "yes": True,
                    "false": False,
                    "0": False,
                    "no": False,
                }[value.lower()]
            return kind(value)
        except (KeyError, ValueError):
            raise UserError(f"{name} = {value!r}: expected {_kind(kind)}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check(section: str, field, value) -> None:
    name, meta = f"{section}.{field.name}", field.metadata
    if type(value) is not field.type:
        raise UserError(
            f"{name} = {value!r}: expected {_kind(field.type)}, not {type(value).__name__}"
        )
    if meta["choices"] and value not in meta["choices"]:
        raise unknown(name, value, meta["choices"])
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} = {value}: expected a finite number")
    bounds = (
        (meta["low"], "at least", lambda v, b: v >= b),
        (meta["high"], "at most", lambda v, b: v <= b),
        (meta["above"], "above", lambda v, b: v > b),
    )
    for bound, word, holds in bounds:
        if bound is not None and not holds(value, bound):
            raise UserError(f"{name} = {value}: must be {word} {bound}")


def _kind(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def toml_value(value) -> str:
    """A bool, int, float or str as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        if isinstance(value, str)
        else repr(value)
    )  # TOML's escapes are JSON's, and DEL
