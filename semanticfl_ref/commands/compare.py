"""`compare`: methods side by side on the same splits, seeds and batches, with paired statistics."""

import json
import os
import shlex
import sys
from pathlib import Path

from semanticfl_ref.config.settings import Config
from semanticfl_ref.commands.settings_flags import add_settings, given
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.config import resolve as config
from semanticfl_ref.errors import UserError

HELP = "methods side by side: a grid of methods, scenarios and seeds; tables, figures, paired differences"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument(
        "--methods",
        default="fedavg,semanticfl",
        metavar="A,B",
        help="arms, separated by commas; an arm may have settings of its own: semanticfl[anchors.control=shuffled;semantic.tau=0.1]",
    )
    parser.add_argument(
        "--scenarios",
        default="",
        metavar="A,B",
        help="nid1:0.1 (alpha), nid2 (six clients), iid, nid1[partition.alpha=0.1;...]; by default the configured one",
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="arm that the others are paired with; the first by default",
    )
    parser.add_argument(
        "--part",
        choices=["test", "validation"],
        default="test",
        help="whose accuracy is told; tune on validation alone",
    )
    add_grid_flags(parser, Path("runs/compare"))
    add_settings(parser, argv)


def add_grid_flags(parser, out: Path) -> None:
    """The flags that every grid of runs takes."""
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (3)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time (1); they share the processor's threads",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        metavar="FOLDER",
        help=f"runs, tables and figures; finished runs in it are reused ({out})",
    )


def run(arguments) -> int:
    from semanticfl_ref.tools.compare import grid, tables

    refuse(arguments)
    arms = grid.split(arguments.methods)
    baseline = arguments.baseline or next(iter(arms), "")
    if baseline not in arms:
        raise UserError(f"--baseline {baseline!r} is not among --methods {arguments.methods!r}")
    return show(
        run_grid(arguments, arms, grid.split(arguments.scenarios), baseline, arguments.part),
        arguments.json,
        tables.markdown,
    )


def refuse(arguments) -> None:
    """Raise UserError for what no grid of runs takes."""
    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    for name in ("federation.method", "partition.scenario", "run.seed"):
        flag = f"{name.split('.')[1]}s"
        if name in written(arguments):
            raise UserError(
                f"{name} differs from run to run of a grid: leave it out, "
                + (f"--{flag} says which" if hasattr(arguments, flag) else "the cell says which")
            )


def written(arguments) -> set[str]:
    """The settings that flags and --set name."""
    return {*given(arguments), *(text.partition("=")[0].strip() for text in arguments.set)}


def run_grid(arguments, arms: list[str], scenarios: list[str], baseline: str, part: str) -> dict:
    """Run what is left of a grid; write its tables and figures beside the runs; return the
    comparison.
    """
    from semanticfl_ref.tools.compare import grid, statistics
    from semanticfl_ref.config.resolve import is_embedded

    threads = (
        {"run.threads": max(1, (os.cpu_count() or 1) // arguments.workers)}
        if arguments.workers > 1
        else {}
    )
    own = {
        **threads,
        **(config.read_toml(arguments.config) if arguments.config else {}),
        **given(arguments),
    }

    def settle(cell: dict[str, object]) -> Config:
        return config.resolve(
            own, None, [*arguments.set, *(f"{name}={value}" for name, value in cell.items())]
        )  # what a cell is wins

    jobs = grid.plan(
        arms, scenarios or [settle({}).partition.scenario], arguments.seeds, settle, arguments.out
    )
    if part == "validation" and any(
        job.config.data.validation_share == 0 and not is_embedded(job.config) for job in jobs
    ):
        raise UserError(
            f"--part validation: {jobs[0].config.data.name} has no validation part; set some of its training images aside: --set data.validation_share=0.1"
        )
    say(
        f"{len(arms)} methods x {len(jobs) // len(arms) // arguments.seeds} scenarios x {arguments.seeds} seeds = {len(jobs)} runs in {arguments.out}"
    )
    grid.run(jobs, workers=arguments.workers, offline=arguments.offline, methods=arguments.imports)
    result = statistics.compare(jobs, baseline, part)
    write(result, arguments.out)
    return result


def write(result: dict, out: Path) -> None:
    """compare.md, .csv, .json and, where matplotlib is, the figures."""
    from semanticfl_ref.storage import replace
    from semanticfl_ref.tools.compare import tables
    from semanticfl_ref.tools.report.drawing import can_draw

    command = shlex.join(["python", "-m", "semanticfl_ref", *sys.argv[1:]])
    replace(
        out / "compare.json",
        json.dumps({**result, "command": command}, sort_keys=True, indent=1) + "\n",
    )
    replace(out / "compare.csv", tables.csv_text(result))
    replace(out / "compare.md", tables.markdown(result, command) + "\n")
    if can_draw():
        tables.draw_curves(result, out / "curves.png", out / "curves.svg")
        tables.draw_gains(result, out / "gains.png", out / "gains.svg")
    say(
        f"written: compare.md, .csv and .json in {out}"
        + (
            ", curves and gains as PNG and SVG"
            if can_draw()
            else "; no figures without matplotlib (pip install matplotlib)"
        )
    )
