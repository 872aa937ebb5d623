"""What the runs of a comparison must share beside their settings: what their numbers depend on.

Threads, precision, versions and the kind of device do; where a run lies and how many run side by
side do not.
"""

from collections.abc import Iterator, Sequence

from semanticfl_ref.config.settings import NOT_IDENTITY, Config, to_flat
from semanticfl_ref.errors import MismatchError
from semanticfl_ref.run.environment import environment_here
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare.grid import Run

# Settings with these prefixes decide what a run's data are, and which features make its anchors.
DATA = ("data.", "partition.", "anchors.images", "run.seed")
FEATURES = (*DATA, "diffusion.", "anchors.", "run.")


def require_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that were made in different environments, or from different data.

    Runs that are not finished will be trained here: then the others must be from this environment.

    Raises:
        MismatchError: names two runs, and what differs.
    """
    seen: dict[tuple, tuple[str, object]] = {}
    for run in runs:
        for name, decided_by, where, value in _numeric(run):
            first, known = seen.setdefault((name, decided_by), (where, value))
            if value != known:
                raise MismatchError(
                    f"{where} and {first} differ in {name} ({value}, {known}), so a difference "
                    f"between them is not one between methods: use the same environment and data, "
                    f"delete the older runs, choose another --out, or allow it with "
                    f"--any-environment"
                )


def _numeric(run: Run) -> Iterator[tuple[str, object, str, object]]:
    """Name, settings that decide it, place, and value of all that a run's numbers depend on."""
    if run.folder.exists():
        folder = RunFolder(run.folder)
        now = folder.read("environment.json")
        earlier = [each for each in now.get("earlier", []) if each["last_round"]]
        for environment in (*earlier, now):
            yield from _of_environment(environment, run.config, str(run.folder))
        identity = folder.read("identity.json")
        for name, prefixes in (("data", DATA), ("partition", DATA), ("anchors", FEATURES)):
            value = identity[name]
            if name == "anchors":  # none, or the features that they are made from
                value = value and value["cache"]
            if value:
                yield name, _settings(run.config, prefixes), str(run.folder), str(value)[:16]
    if not run.folder.exists() or not RunFolder(run.folder).finished:
        yield from _of_environment(environment_here(run.config), run.config, "this environment")


def _of_environment(
    environment: dict, config: Config, where: str
) -> Iterator[tuple[str, object, str, object]]:
    # The name of a processor is the kind of a CPU.
    on_cpu = environment["device"] == "cpu"
    chosen = {
        "device": environment["processor"] if on_cpu else environment["device"],
        "precision": environment["precision"],
        "threads": environment["threads"],
    }
    for name, value in chosen.items():
        yield name, _settings(config, ("run.device", "run.precision", "run.threads")), where, value
    versions = {**environment["versions"], "semanticfl_ref": environment["semanticfl_ref"]}
    for name, value in versions.items():
        yield name, None, where, value


def _settings(config: Config, prefixes: tuple[str, ...]) -> tuple:
    return tuple(
        (name, value)
        for name, value in to_flat(config).items()
        if name.startswith(prefixes) and name not in NOT_IDENTITY
    )
