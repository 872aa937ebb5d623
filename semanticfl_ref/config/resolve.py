"""From what a user wrote to a `Config`, and back to TOML.

Later sources override earlier ones: a field's default, the preset of the data set, that of the
embedded diffusion model, those of the client optimizer and of the method, a TOML file, flags,
`--set section.field=value`. A method's preset does not change the embedded model's layers, timestep
and widths.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from semanticfl_ref.config.presets import EMBEDDED, OPTIMIZERS, TINY_MODEL
from semanticfl_ref.config.registry import DATASETS, METHODS
from semanticfl_ref.config.schema import convert, toml_value
from semanticfl_ref.config.settings import Config, from_flat, setting_fields
from semanticfl_ref.errors import DataError, UserError


def resolve(
    settings: Mapping[str, object] | None = None,
    file: Path | None = None,
    assignments: Sequence[str] = (),
) -> Config:
    """Resolve a configuration.

    Args:
        settings: dotted name -> value; strings are converted.
        file: a TOML file whose tables are the sections.
        assignments: strings `section.field=value`.

    Raises:
        UserError: an unknown section, field or name (the nearest is suggested), a wrong type, a
            value out of range.
        DataError: the file is missing or is not TOML.
    """
    given = {} if file is None else read_toml(file)
    given.update(settings or {})
    given.update(map(parse_assignment, assignments))
    fields = setting_fields()

    def preset(presets: Mapping, setting: str) -> Mapping[str, object]:
        name = convert(setting, fields[setting], given.get(setting, fields[setting].default))
        # A name of another type than str (from a TOML file) is refused by from_flat.
        known = isinstance(name, str) and name in presets
        return presets[name] if known else {}

    dataset = preset({name: e.preset for name, e in DATASETS.entries.items()}, "data.name")
    optimizer = preset(OPTIMIZERS, "federation.optimizer")
    tiny = TINY_MODEL if given.get("diffusion.source") == "tiny" else {}
    method = preset({name: e.preset for name, e in METHODS.entries.items()}, "federation.method")
    if {**dataset, **given}.get("diffusion.source") == "tiny":
        method = {name: value for name, value in method.items() if name not in TINY_MODEL}
    return from_flat({**dataset, **tiny, **optimizer, **method, **given})


def parse_assignment(text: str) -> tuple[str, str]:
    """The name and the value of `section.field=value`.

    Raises:
        UserError: there is no "=".
    """
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(
            f"--set {text!r}: expected section.field=value, for example "
            f"--set federation.learning_rate=0.05"
        )
    return name.strip(), value.strip()


def read_toml(file: Path) -> dict[str, object]:
    """Dotted name -> value of a TOML file.

    Raises:
        DataError: the file cannot be read or is not TOML.
        UserError: a value outside of any section.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of numbers, encodings, tables too deep
        raise DataError(f"{file} is not TOML: {error}") from None
    flat = {}
    for section, values in tables.items():
        if not isinstance(values, dict):
            raise UserError(
                f"{file}: {section!r} is outside of any section; write [section] and below it "
                f"{section} = ..."
            )
        flat.update({f"{section}.{key}": value for key, value in values.items()})
    return flat


def is_embedded(config: Config) -> bool:
    """Whether the data set is embedded in the package, and so known to the embedded model."""
    return DATASETS.entries[config.data.name].preset is EMBEDDED


def to_toml(config: Config) -> str:
    """The configuration as TOML that `resolve(file=...)` reads back to an equal one."""
    lines = []
    for section, values in config.sections.items():
        settings = [f"{key} = {toml_value(value)}" for key, value in vars(values).items()]
        lines += [f"[{section}]", *settings, ""]
    return "\n".join(lines)
