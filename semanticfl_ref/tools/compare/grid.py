"""An experiment grid: every method in every scenario with every seed.

Runs of one scenario and seed share the partition, the clients of every round, the initial weights
and the order of batches, since each is drawn from (seed, purpose, round, client, epoch). A method's
numbers therefore do not depend on which others are in the grid.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from semanticfl_ref.config.presets import NID2_CLIENTS
from semanticfl_ref.config.registry import is_foreign
from semanticfl_ref.config.resolve import is_embedded, resolve
from semanticfl_ref.config.settings import Config
from semanticfl_ref.cores import cores
from semanticfl_ref.errors import UserError

# The setting that x stands for in a scenario such as nid1:x.
NUMBERED = {
    "nid1": "partition.alpha",
    "quantity": "partition.alpha",
    "pathological": "partition.classes_per_client",
}


LONGEST_NAME = 200  # of a run's folder; file systems allow 255 bytes


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An experiment grid, how it is trained, and what is reported of it.

    Attributes:
        methods: entries such as "fedavg" or "semanticfl[anchors.control=shuffled]".
        scenarios: entries such as "nid1:0.1"; empty: the one that `settings` make.
        seeds: their number.
        first_seed: the first of them; the others follow.
        settings: dotted name -> value, of all runs; the settings of an entry override them.
        out: folder of the experiment; its runs are in `runs/`.
        baseline: the method that the others are paired with.
        part: "test" or "validation", whose accuracy is reported.
        at: numbers of rounds after which to report, ascending; empty: after the last round.
        workers: runs at a time, which share the processor's threads.
        offline: no network access.
        tuning: the search that chose the methods' settings, see `search.Search`; None: no search.
        any_environment: whether runs of different environments and data are compared.
    """

    methods: Sequence[str]
    scenarios: Sequence[str] = ()
    seeds: int
    first_seed: int = 0
    settings: Mapping[str, object]
    out: Path
    baseline: str
    part: str = "test"
    at: Sequence[int] = ()
    workers: int = 1
    offline: bool = False
    tuning: Mapping | None = None
    any_environment: bool = False

    @property
    def seed_numbers(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True)
class Run:
    """One run of a grid: its entries, its seed, its configuration and its folder."""

    method: str
    scenario: str
    seed: int
    config: Config
    folder: Path


def plan(grid: Grid) -> list[Run]:
    """The runs of a grid, seed by seed: an interrupted grid has whole seeds.

    Raises:
        UserError: an unknown name, a malformed entry, a setting out of range, a duplicate run, or a
            result to report that a run will not have.
    """
    replicas = max(1, cores() // grid.workers) if grid.workers > 1 else 0
    shared = {"run.replicas": replicas, **grid.settings}
    scenarios = grid.scenarios or [resolve(shared).partition.scenario]
    runs: dict[Path, Run] = {}
    for seed, scenario, method in product(grid.seed_numbers, scenarios, grid.methods):
        own = scenario_settings(scenario) if grid.scenarios else {}
        config = resolve({**shared, **own, **method_settings(method), "run.seed": seed})
        _check_reported(grid, config)
        name = f"{short_name(method)}-{scenario}-{config.federation.rounds}-seed{seed}"
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"{method}: too long for the name of a folder; give it a short one: "
                f"--methods 'NAME={method}'"
            )
        folder = grid.out / "runs" / re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
        if folder in runs:
            first = runs[folder]
            raise UserError(
                f"duplicate run: {first.method} in {first.scenario} and {method} in {scenario}; "
                f"leave one out"
            )
        runs[folder] = Run(method, scenario, seed, config, folder)
    return list(runs.values())


def split_entries(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The entries of a list separated by commas; commas in brackets do not separate.

    Args:
        flag: the flag that has the list.
        text: the list.
        known: names that it may have.

    Raises:
        UserError: the list is empty.
    """
    entries = [entry.strip() for entry in re.split(r",(?![^\[]*\])", text) if entry.strip()]
    if not entries:
        raise UserError(f"{flag} {text!r} is empty: give at least one of {', '.join(known)}")
    return entries


def short_name(entry: str) -> str:
    """`name` of the entry `name=method[...]`; the whole entry if it has no name."""
    name, named, _ = entry.partition("[")[0].partition("=")
    return name.strip() if named else entry


def method_settings(entry: str) -> dict[str, object]:
    """The settings of `method` or `method[section.field=value;...]`, with or without `name=`.

    Raises:
        UserError: a malformed entry, or a setting of another method.
    """
    name, assignments = _parts(re.sub(r"^[^\[=]*=", "", entry))
    for setting in assignments:
        if is_foreign(setting, name):
            raise UserError(f"{entry!r}: {name} does not read {setting}")
    return {"federation.method": name, **assignments}


def with_settings(entry: str, settings: Iterable[tuple[str, object]]) -> str:
    """The entry with further settings in its brackets."""
    name, assignments = _parts(entry)
    inside = ";".join(
        f"{setting}={value}" for setting, value in {**assignments, **dict(settings)}.items()
    )
    return f"{name}[{inside}]" if inside else name


def scenario_settings(entry: str) -> dict[str, object]:
    """The settings of `name`, `name:x` (nid1:0.1 is alpha = 0.1) or
    `name[section.field=value;...]`.

    Raises:
        UserError: a number for a scenario that takes none, or a malformed entry.
    """
    head, assignments = _parts(entry)
    name, colon, number = head.partition(":")
    settings = {"partition.scenario": name}
    if name == "nid2":
        settings["partition.clients"] = NID2_CLIENTS
    if colon:
        if name not in NUMBERED:
            raise UserError(
                f"scenario {entry!r}: only {', '.join(NUMBERED)} take a number; use "
                f"NAME[partition.field=value]"
            )
        settings[NUMBERED[name]] = number
    return settings | assignments


def _check_reported(grid: Grid, config: Config) -> None:
    """Refuse, before anything is trained, to report what the run will not have."""
    data, rounds = config.data, config.federation.rounds
    if config.run.patience or config.run.evaluate_every > 1:
        raise UserError(
            "compare needs every round of every run: leave out run.patience and run.evaluate_every"
        )
    if grid.part == "validation" and data.validation_share == 0 and not is_embedded(config):
        raise UserError(
            f"--part validation: {data.name} has no validation part; set training images aside "
            f"with --set data.validation_share=0.1"
        )
    for after in grid.at:
        if not 1 <= after <= rounds:
            raise UserError(f"--at {after}: choose 1 to {rounds}, or raise --rounds")


def _parts(entry: str) -> tuple[str, dict[str, str]]:
    """The name of an entry, and the settings in its brackets."""
    parts = re.fullmatch(r"([^\[\]]+?)(?:\[((?:[^\[\]=;]+=[^\[\];]*;?\s*)*)\])?", entry)
    if not parts:
        raise UserError(f"{entry!r}: expected NAME or NAME[section.field=value;...]")
    assignments = re.findall(r"([^=;\s]+)\s*=\s*([^;]*?)\s*(?:;|$)", parts[2] or "")
    return parts[1].strip(), dict(assignments)
