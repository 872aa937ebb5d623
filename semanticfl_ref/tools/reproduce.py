"""Published results of the paper: their settings, and their numbers beside ours."""

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import DownloadError
from semanticfl_ref.formatting import Say
from semanticfl_ref.tools.compare.grid import Grid

FOLDER = Path(__file__).parent.parent / "configs" / "paper"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published result.

    Attributes:
        title: what it is of.
        source: where its numbers are from.
        config: file name of its configuration.
        scenarios: entries of a grid; the accuracy is the mean over them.
        accuracy: method -> published accuracy, in per cent.
        unknown: what is not known of the published set-up.
    """

    title: str
    source: str
    config: str
    scenarios: list[str]
    accuracy: dict[str, float]
    unknown: list[str]

    @property
    def file(self) -> Path:
        """The TOML file of its configuration."""
        return FOLDER / self.config


def published() -> dict[str, Published]:
    """Name -> published result."""
    tables = tomllib.loads((FOLDER / "published.toml").read_text(encoding="utf-8"))
    return {name: Published(**table) for name, table in tables.items()}


def reproduce(result: Published, grid: Grid, say: Say) -> dict:
    """Run the experiment of a published result.

    Returns:
        The fields of the published result, and "ours": a `Result` per method, over all scenarios;
        JSON values.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    from semanticfl_ref.tools.compare.experiment import run_grid

    fetch(resolve({**grid.settings, "federation.method": "semanticfl"}), grid.offline, say)
    results = run_grid(grid, say).results[-len(grid.methods) :]
    return {**asdict(result), "ours": {own.method: asdict(own) for own in results}}


def fetch(config: Config, offline: bool, say: Say) -> None:
    """Fetch the data set and the diffusion model before anything is trained.

    Raises:
        DownloadError: one of them, or both, cannot be fetched; the message names each.
    """
    data, source = config.data.name, config.diffusion.source
    say(f"{data}, {source}: looking for both ...")
    from semanticfl_ref.diffusion.model_files import locate
    from semanticfl_ref.run.setup import load_images

    fetched = {
        data: lambda: load_images(config, offline=offline),
        source: lambda: locate(source, offline=offline),
    }
    missing = []
    for name, fetch_it in fetched.items():
        try:
            fetch_it()
        except DownloadError as error:
            missing.append(f"{name} is not available: {error}")
    if missing:
        raise DownloadError("; and ".join(missing))


def listing(results: dict[str, dict]) -> str:
    """The published results, one per line."""
    return "\n".join(
        f"{name:<18}{result['title']}: "
        + ", ".join(f"{method} {value}" for method, value in result["accuracy"].items())
        for name, result in results.items()
    )


def side_by_side(document: dict) -> str:
    """Published and our numbers, their difference, and what differs in the set-up.

    Args:
        document: as `reproduce` returns it, with the number of seeds and the changed settings.
    """
    from semanticfl_ref.tools.compare.tables import mean_and_deviation
    from semanticfl_ref.tools.report.page import render

    return render(
        Path(__file__).parent, "reproduce.md.jinja", spread=mean_and_deviation, **document
    )
