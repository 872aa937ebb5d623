"""An experiment from its grid to its tables and figures: plan, train, compare, write."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.errors import UserError
from semanticfl_ref.formatting import Say
from semanticfl_ref.run.environment import command_line
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.storage import write_atomic, write_errors
from semanticfl_ref.tools.compare.alike import require_alike
from semanticfl_ref.tools.compare.figures import curves_figure, gains_figure
from semanticfl_ref.tools.compare.grid import Grid, Run, plan
from semanticfl_ref.tools.compare.statistics import Comparison, compare
from semanticfl_ref.tools.compare.tables import csv_text, markdown
from semanticfl_ref.tools.compare.training import train_all
from semanticfl_ref.tools.report.drawing import can_draw, save_figure


def run_grid(grid: Grid, say: Say) -> Comparison:
    """Train the runs of a grid that are not finished; write tables and figures beside them.

    Args:
        grid: the experiment.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see errors.py; another process trains in the folder.
        KeyboardInterrupt: after all runs have saved a checkpoint.
    """
    runs = plan(grid)
    say(
        f"{len(runs)} runs in {grid.out}: methods {len(grid.methods)}, "
        f"scenarios {len({run.scenario for run in runs})}, seeds {grid.seeds}"
    )
    check = (lambda runs: None) if grid.any_environment else require_alike
    with write_errors(grid.out):
        grid.out.mkdir(parents=True, exist_ok=True)
    with RunFolder(grid.out).held():
        check(runs)
        check_first(runs, grid)
        train_all(runs, grid)
        check(runs)  # what was not there before
        comparison = compare(runs, grid)
        say(f"wrote {write(comparison, grid.out)} to {grid.out}")
    return comparison


def check_first(runs: Sequence[Run], grid: Grid) -> None:
    """Refuse, before anything is trained, what the first seed of some method cannot be trained
    with: settings that do not fit, data or weights that are not there.

    Raises:
        UserError: and its kinds; names the run.
    """
    started = {(run.method, run.scenario) for run in runs if run.folder.exists()}
    first = {(run.method, run.scenario): run for run in reversed(runs)}
    new = sorted(first.keys() - started)
    if not new:
        return
    # Here, since they import torch.
    from semanticfl_ref.diffusion.model_files import locate
    from semanticfl_ref.run.dry_run import dry_run

    for key in new:
        config = first[key].config
        try:
            dry_run(config, offline=grid.offline)
            if METHODS[config.federation.method].needs_anchors:
                locate(config.diffusion.source, offline=grid.offline)
        except UserError as error:
            raise type(error)(f"{', '.join(key)}: {error}") from None


def write(comparison: Comparison, folder: Path) -> str:
    """Write tables and, with matplotlib, figures; returns what was written.

    Raises:
        DataError: a file cannot be written.
    """
    command = command_line()
    document = {**asdict(comparison), "command": command}
    write_atomic(folder / "compare.json", json.dumps(document, sort_keys=True, indent=1) + "\n")
    write_atomic(folder / "compare.csv", csv_text(comparison))
    write_atomic(folder / "compare.md", markdown(comparison, command) + "\n")
    tables = "compare.md, .csv and .json"
    if not can_draw():
        return f"{tables}, without figures (for these: pip install matplotlib),"
    figures = {"curves": curves_figure(comparison), "gains": gains_figure(comparison)}
    for earlier in folder.glob("gains.*"):  # a single method has none
        earlier.unlink()
    for name, figure in figures.items():
        if figure:
            save_figure(figure, folder / f"{name}.png", folder / f"{name}.svg")
    drawn = " and ".join(name for name, figure in figures.items() if figure)
    return f"{tables}, {drawn} as PNG and SVG"
