"""Settings: dataclass fields with help, range, unit and source, checked when they are made."""

import dataclasses
import json
import math
import re
from collections.abc import Collection

from semanticfl_ref.errors import UserError, unknown

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def option(
    default,
    help: str,
    *,
    low=None,
    high=None,
    above=None,
    choices: Collection[str] = (),
    source: str = "",
    unit: str = "",
):
    """A setting.

    Args:
        default: its type is the setting's type.
        help: a noun phrase that stands alone.
        low, high: inclusive bounds.
        above: exclusive lower bound.
        choices: the admissible names; a registry may grow.
        source: where the default comes from; the tags are explained in settings.py.
        unit: for numbers with one, for example "pixels".
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "source": source,
        "unit": unit,
    }
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of all sections: checks the type and range of every field when a section is made.

    Attributes:
        section: name of the section, for messages; by default made from the class's.

    Raises:
        UserError: names the field, the value and what is admissible.
    """

    def __init_subclass__(cls):
        cls.section = cls.__name__.removesuffix("Settings").lower()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = f"{self.section}.{field.name}", getattr(self, field.name)
            limits, choices, kind = field.metadata, choices_of(field), type(field.default)
            if type(value) is not kind:
                raise UserError(
                    f"{name} = {value!r}: expected {KINDS[kind]}, not {type(value).__name__}"
                )
            if isinstance(value, str) and not is_unicode(value):
                raise UserError(
                    f"{name} = {value!r} is not UTF-8: give the file or folder another name"
                )
            if choices and value not in choices:
                raise unknown(name, value, choices)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} = {value}: expected a finite number")
            if limits["low"] is not None and value < limits["low"]:
                raise UserError(f"{name} = {value}: must be at least {limits['low']}")
            if limits["high"] is not None and value > limits["high"]:
                raise UserError(f"{name} = {value}: must be at most {limits['high']}")
            if limits["above"] is not None and value <= limits["above"]:
                raise UserError(f"{name} = {value}: must be above {limits['above']}")


def is_unicode(text: str) -> bool:
    """Whether a text can be written: the name of a file need not be UTF-8."""
    return not re.search(r"[\ud800-\udfff]", text)


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    """The admissible names of a setting; empty if any value of its type is admissible."""
    return tuple(field.metadata["choices"])


def convert(name: str, field: dataclasses.Field, value):
    """`value` as the field's type if it is a string that spells one, and names as registered.

    Names are matched without regard to case, hyphens and underscores: "CIFAR-10" is cifar10.

    Raises:
        UserError: the string does not spell a value of the field's type.
    """
    kind = type(field.default)
    if isinstance(value, str) and kind is not str:
        try:
            return BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UserError(f"{name} = {value!r}: expected {KINDS[kind]}") from None
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, str):
        return next((c for c in choices_of(field) if _folded(c) == _folded(value)), value)
    return value


def toml_value(value) -> str:
    """A bool, int, float or str as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML's escapes are JSON's, and DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _folded(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
