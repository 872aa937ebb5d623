"""An experiment from its grid to its tables and figures: plan, train, compare, write."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from semanticfl_ref.config.resolve import is_embedded
from semanticfl_ref.errors import UserError
from semanticfl_ref.run.environment import command_line
from semanticfl_ref.storage import write_atomic
from semanticfl_ref.tools.compare.figures import draw_curves, draw_gains
from semanticfl_ref.tools.compare.grid import Grid, Run, plan
from semanticfl_ref.tools.compare.statistics import Comparison, compare
from semanticfl_ref.tools.compare.tables import csv_text, markdown
from semanticfl_ref.tools.compare.training import train_all
from semanticfl_ref.tools.report.drawing import can_draw


def run_grid(grid: Grid, say: Callable[[str], None]) -> Comparison:
    """Train the runs of a grid that are not finished; write tables and figures beside them.

    Args:
        grid: the experiment.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see errors.py.
        KeyboardInterrupt: after all runs have saved a checkpoint.
    """
    runs = plan(grid)
    _check_reported(grid, runs)
    say(
        f"{len(runs)} runs in {grid.out}: methods {len(grid.methods)}, "
        f"scenarios {len({run.scenario for run in runs})}, seeds {grid.seeds}"
    )
    train_all(runs, grid)
    comparison = compare(runs, grid)
    say(f"wrote {write(comparison, grid.out)} to {grid.out}")
    return comparison


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
    draw_curves(comparison, folder / "curves.png", folder / "curves.svg")
    draw_gains(comparison, folder / "gains.png", folder / "gains.svg")
    return f"{tables}, curves and gains as PNG and SVG"


def _check_reported(grid: Grid, runs: Sequence[Run]) -> None:
    """Refuse, before anything is trained, to report what the runs will not have."""
    for run in runs:
        data, rounds = run.config.data, run.config.federation.rounds
        without = data.validation_share == 0 and not is_embedded(run.config)
        if grid.part == "validation" and without:
            raise UserError(
                f"--part validation: {data.name} has no validation part; set training images aside "
                f"with --set data.validation_share=0.1"
            )
        for after in grid.at:
            if not 1 <= after <= rounds:
                raise UserError(f"--at {after}: choose 1 to {rounds}, or raise --rounds")
