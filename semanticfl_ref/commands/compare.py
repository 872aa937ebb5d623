"""`compare`: methods side by side on the same splits, seeds and batches, with paired statistics."""

import json
import shlex
import sys
from pathlib import Path

from semanticfl_ref import config
from semanticfl_ref.commands.flags import add_settings, given
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.errors import UserError

HELP = "methods side by side: a grid of methods, scenarios and seeds; tables, figures, paired differences"


def add_flags(parser) -> None:
    parser.add_argument("--methods", default="fedavg,semanticfl", metavar="A,B", help="arms, separated by commas; an arm may have settings of its own: semanticfl[anchors.control=shuffled;semantic.tau=0.1]")
    parser.add_argument("--scenarios", default="", metavar="A,B", help="nid1:0.1 (alpha), nid2 (six clients), iid, nid1[partition.alpha=0.1;...]; by default the configured one")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (3)")
    parser.add_argument("--baseline", metavar="ARM", help="arm that the others are paired with; the first by default")
    parser.add_argument("--part", choices=["test", "validation"], default="test", help="whose accuracy is told; tune on validation alone")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (1); they share the processor's threads")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="runs, tables and figures; finished runs in it are reused (runs/compare)")
    add_settings(parser)


def run(arguments) -> int:
    from semanticfl_ref.comparison import grid

    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    arms = grid.split(arguments.methods)
    threads = {"run.threads": grid.threads_each(arguments.workers)} if arguments.workers > 1 else {}
    own = given(arguments)
    for name in ("federation.method", "partition.scenario", "run.seed"):
        if name in own:
            raise UserError(f"compare takes its {name.split('.')[1]}s from --{name.split('.')[1]}s; leave the single flag out")

    def settle(cell: dict) -> config.Config:
        return config.build({**threads, **own, **cell}, arguments.config, arguments.set)

    scenarios = grid.split(arguments.scenarios) or [settle({}).partition.scenario]
    jobs = grid.plan(arms, scenarios, arguments.seeds, settle, arguments.out)
    baseline = arguments.baseline or arms[0]
    if baseline not in arms:
        raise UserError(f"--baseline {baseline!r} is not among --methods {arguments.methods}")
    say(f"{len(arms)} methods x {len(scenarios)} scenarios x {arguments.seeds} seeds = {len(jobs)} runs in {arguments.out}")
    grid.run(jobs, workers=arguments.workers, offline=arguments.offline, methods=arguments.imports)
    return finish(jobs, baseline, arguments.part, arguments.out, arguments.json)


def finish(jobs, baseline: str, part: str, out: Path, as_json: bool) -> int:
    """Write compare.md, .csv, .json and the figures beside the runs, and print the table."""
    from semanticfl_ref.comparison import statistics, tables
    from semanticfl_ref.report.drawing import can_draw
    from semanticfl_ref.storage import replace

    result = statistics.compare(jobs, baseline, part)
    command = shlex.join(["python", "-m", "semanticfl_ref", *sys.argv[1:]])
    replace(out / "compare.json", json.dumps({**result, "command": command}, sort_keys=True, indent=1) + "\n")
    replace(out / "compare.csv", tables.csv_text(result))
    replace(out / "compare.md", tables.markdown(result, command) + "\n")
    if can_draw():
        tables.draw_curves(result, out / "curves.png", out / "curves.svg")
        if len({job.arm for job in jobs}) > 1:
            tables.draw_gains(result, out / "gains.png", out / "gains.svg")
    else:
        say("no figures: they need matplotlib (pip install matplotlib); the tables are there")
    say(f"written: {out}/compare.md, compare.csv, compare.json" + (", curves and gains as PNG and SVG" if can_draw() else ""))
    return show(result, as_json, tables.markdown)
