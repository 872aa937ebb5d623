"""What settings choose by name: federated methods, data sets, models, partition scenarios.

The package's own entries are import paths, so that reading their names (for `--help`) imports
nothing heavy. An entry from outside the package is registered by the same calls.
"""

import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

from semanticfl_ref.config.schema import Section
from semanticfl_ref.errors import UserError, unknown


class Entry(NamedTuple):
    """One registered name.

    Attributes:
        target: the object, or "module:attribute" to import it from.
        settings: section of the entry's own settings, which appear as `name.field`.
        preset: dotted name -> value of the settings whose default differs with this entry.
        optimizers: admissible values of federation.optimizer; empty: any.
    """

    target: object
    settings: type[Section] | None = None
    preset: Mapping[str, object] = {}
    optimizers: tuple[str, ...] = ()


class Registry(Mapping):
    """name -> object, imported when it is first looked up.

    Args:
        kind: what the names name, for messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            UserError: the name is taken.
        """
        if name in self.entries:
            raise UserError(f"{self.kind} {name!r} is already registered: choose another name")
        self.entries[name] = entry

    def __getitem__(self, name: str):
        if name not in self.entries:
            raise unknown(self.kind, name, self.entries)
        target = self.entries[name].target
        return pkgutil.resolve_name(target) if isinstance(target, str) else target

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


# Files that --import ran: they may have registered names, so printed commands repeat them.
IMPORTED: list[Path] = []
# Names of a configuration's other sections, which no method can have.
SECTIONS = ("data", "partition", "diffusion", "anchors", "model", "federation", "server", "run")

METHODS = Registry("method")
DATASETS = Registry("data set")
MODELS = Registry("model")
SCENARIOS = Registry("scenario")


def is_foreign(setting: str, *methods: str) -> bool:
    """Whether a setting is one of another method."""
    section = setting.partition(".")[0]
    return section in METHODS and section not in methods


def register_method(
    name: str,
    method,
    settings: type[Section] | None = None,
    preset: Mapping[str, object] = {},
    optimizers: tuple[str, ...] = (),
) -> None:
    """Make a federated method available as `--method NAME`.

    Args:
        name: what the user writes.
        method: a `Method`, or "module:attribute".
        settings: a frozen dataclass of `option` fields, derived from `Section`.
        preset: defaults of other settings that this method changes.
        optimizers: the client optimizers for which its arithmetic holds; empty: any.

    Raises:
        UserError: the name is taken, or cannot be that of a section of settings; or the method or
            its settings are something else.
    """
    if name in SECTIONS or not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f"method {name!r}: choose a name of letters, digits, - and _ that is none of "
            f"{', '.join(SECTIONS)}"
        )
    _check_method(name, method, settings)
    if settings:
        settings.section = name
    METHODS.register(name, Entry(method, settings, preset, optimizers))


def register_dataset(name: str, reader, preset: Mapping[str, object] = {}) -> None:
    """Make a data set available as `--dataset NAME`.

    Args:
        name: what the user writes.
        reader: a function of a `ReadOptions` that returns `Parts` (see data/dataset.py), or
            "module:attribute".
        preset: defaults of settings for this data set.

    Raises:
        UserError: the name is taken.
    """
    DATASETS.register(name, Entry(reader, preset=preset))


def register_model(name: str, build) -> None:
    """Make a client model available as `--model NAME`.

    Args:
        name: what the user writes.
        build: a class that derives from `ClientModel` (see federated/model.py); or a class or
            function with its arguments and interface, where norm and image_size may be missing; or
            "module:attribute".

    Raises:
        UserError: the name is taken.
    """
    MODELS.register(name, Entry(build))


def register_scenario(name: str, assign) -> None:
    """Make a partition scenario available as `--scenario NAME`.

    Args:
        name: what the user writes.
        assign: a function of an `Assignment` that returns the client of every image, int64 [N]
            (see data/scenarios.py), or "module:attribute".

    Raises:
        UserError: the name is taken.
    """
    SCENARIOS.register(name, Entry(assign))


register_model("resnet10", "semanticfl_ref.federated.model:ResNet10")
register_model("resnet18", "semanticfl_ref.federated.networks:ResNet18")
register_model("cnn", "semanticfl_ref.federated.networks:ConvNet")
register_model("mobilenet", "semanticfl_ref.federated.networks:MobileNetV2")
for _name in ("iid", "nid1", "nid2", "pathological", "extended", "quantity", "natural"):
    register_scenario(_name, f"semanticfl_ref.data.scenarios:{_name}")


def _check_method(name: str, method, settings) -> None:
    """Refuse the usual mistakes in a method of one's own."""
    if not isinstance(method, str) and not hasattr(method, "local_terms"):
        raise UserError(
            f"method {name!r}: expected a Method, such as Method(local_terms=...), or "
            f"'module:attribute', not {method!r}"
        )
    if settings is None:
        return
    if not (
        isinstance(settings, type) and issubclass(settings, Section) and is_dataclass(settings)
    ):
        raise UserError(
            f"method {name!r}: its settings must be a class that derives from Section and has "
            f"@dataclass(frozen=True, kw_only=True) above it, not {settings!r}"
        )
    for field in fields(settings):
        if "help" not in field.metadata:
            raise UserError(
                f"method {name!r}: the setting {field.name} is not made by option: write "
                f"{field.name}: TYPE = option(DEFAULT, HELP)"
            )
