"""`compare`: methods side by side on the same partitions, seeds and batches."""

from dataclasses import asdict
from pathlib import Path

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import (
    add_settings,
    from_file,
    given,
    integers,
    natural,
    positive,
)
from semanticfl_ref.config.registry import METHODS, SCENARIOS
from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import user_path
from semanticfl_ref.tools.compare.grid import Grid, short_name, split_entries

HELP = "compare methods in a grid of scenarios and seeds; writes tables and figures"
# Settings that differ between the runs of a grid -> what to do instead of setting them.
VARIED = {
    "federation.method": "list the methods with --methods A,B",
    "partition.scenario": "list the scenarios with --scenarios A,B",
    "run.seed": "--seeds N runs N seeds, the first of which is --first-seed",
}


def add_flags(parser, argv: list[str]) -> None:
    add_entries(parser)
    parser.add_argument(
        "--baseline",
        metavar="METHOD",
        help="entry of --methods that the others are compared with (default: the first)",
    )
    parser.add_argument(
        "--tuned",
        type=user_path,
        metavar="FILE",
        help="search.json of `search`: each method with the settings that it chose",
    )
    parser.add_argument(
        "--part",
        choices=["test", "validation"],
        default="test",
        help="images whose accuracy is reported; tune on validation (default: %(default)s)",
    )
    parser.add_argument(
        "--at",
        type=integers,
        default=[],
        metavar="N,N",
        help="rounds at which to report, such as 40,80 (default: the last)",
    )
    add_grid_flags(parser, Path("runs/compare"))
    add_settings(parser, argv, hidden=VARIED)


def add_entries(parser) -> None:
    """The flags that list methods and scenarios."""
    parser.add_argument(
        "--methods",
        default="fedavg,semanticfl",
        metavar="A,B",
        help="methods, separated by commas, each with settings of its own in brackets if needed, "
        "such as 'semanticfl[anchors.control=shuffled;semanticfl.tau=0.1]', quoted for the shell, "
        "and with a short name for figures and folders: 'tuned=semanticfl[...]' "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--scenarios",
        metavar="A,B",
        help="scenarios, separated by commas: iid, nid1:0.1 (alpha), nid2 (six clients), "
        "'nid1[partition.alpha=0.1;...]' (default: the configured one)",
    )


def add_grid_flags(parser, out: Path, seeds: int = 3, first: int = 0) -> None:
    """The flags of every command that runs an experiment grid.

    Args:
        parser: the command's parser.
        out: default folder.
        seeds: default number of seeds.
        first: default of the first seed.
    """
    parser.add_argument(
        "--seeds",
        type=positive,
        default=seeds,
        metavar="N",
        help="number of seeds; intervals need 5 (default: %(default)s)",
    )
    parser.add_argument(
        "--first-seed",
        type=natural,
        default=first,
        metavar="N",
        help="the first seed; the others follow (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="runs in parallel, which share the CPU threads (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=out,
        metavar="FOLDER",
        help="folder of runs, tables and figures; finished runs are reused (default: %(default)s)",
    )
    parser.add_argument(
        "--any-environment",
        action="store_true",
        help="compare runs although their versions, devices, precision, threads or data differ",
    )


def run(arguments) -> int:
    from semanticfl_ref.tools.compare.experiment import run_grid
    from semanticfl_ref.tools.compare.search import tuned
    from semanticfl_ref.tools.compare.tables import markdown

    methods, scenarios = entries_of(arguments)
    by_name = {short_name(entry): entry for entry in methods}
    baseline = by_name.get(arguments.baseline, arguments.baseline or methods[0])
    if baseline not in methods:
        raise UserError(f"--baseline {baseline!r}: choose one of --methods, {', '.join(methods)}")
    grid = grid_of(
        arguments,
        methods=methods,
        scenarios=scenarios,
        baseline=baseline,
        part=arguments.part,
        at=sorted(set(arguments.at)),
    )
    if arguments.tuned:
        grid = tuned(grid, arguments.tuned)
    comparison = run_grid(grid, say)
    return show(asdict(comparison), arguments.json, lambda _: markdown(comparison))


def entries_of(arguments) -> tuple[list[str], list[str]]:
    """The methods and the scenarios that the flags of `add_entries` list."""
    methods, scenarios = split_entries("--methods", arguments.methods, METHODS), []
    if arguments.scenarios is not None:
        scenarios = split_entries("--scenarios", arguments.scenarios, SCENARIOS)
    return methods, scenarios


def grid_of(arguments, **entries) -> Grid:
    """The grid that the flags of `add_grid_flags` and of settings describe.

    Args:
        arguments: the command's arguments.
        entries: the other fields of `Grid`.

    Raises:
        UserError: a setting that the grid varies.
    """
    settings = given(arguments)
    for name in settings:
        if name in VARIED:
            raise UserError(f"a grid has no single {name}: {VARIED[name]}")
    return Grid(
        seeds=arguments.seeds,
        first_seed=arguments.first_seed,
        settings={**from_file(arguments), **settings},
        out=arguments.out,
        workers=arguments.workers,
        offline=arguments.offline,
        any_environment=arguments.any_environment,
        **entries,
    )
