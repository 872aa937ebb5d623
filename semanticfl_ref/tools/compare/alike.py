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

# Settings with these prefixes decide what a run's data are, and how it is computed.
DATA = ("data.", "partition.", "anchors.images", "run.seed")
CHOSEN = ("run.device", "run.precision", "run.threads")


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
    folder, environments = RunFolder(run.folder), []
    if not folder.finished:
        environments.append(("this environment", environment_here(run.config)))
    if run.folder.exists():
        now, identity = folder.read("environment.json"), folder.read("identity.json")
        earlier = (each for each in now.get("earlier", []) if each["last_round"])
        environments += [(str(run.folder), each) for each in (now, *earlier)]
        for name in ("data", "partition"):
            yield name, _settings(run.config, DATA), str(run.folder), identity[name][:16]
    for where, environment in environments:
        if environment["device"] == "cpu":  # then the processor's name is its kind
            environment = {**environment, "device": environment["processor"]}
        for name in ("device", "precision", "threads"):
            yield name, _settings(run.config, CHOSEN), where, environment[name]
        versions = {**environment["versions"], "semanticfl_ref": environment["semanticfl_ref"]}
        for name, value in versions.items():
            yield name, None, where, value


def _settings(config: Config, prefixes: tuple[str, ...]) -> tuple:
    return tuple(
        (name, value)
        for name, value in to_flat(config).items()
        if name.startswith(prefixes) and name not in NOT_IDENTITY
    )
