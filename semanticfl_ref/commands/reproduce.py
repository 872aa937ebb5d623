"""`reproduce`: a published result, run and printed beside its number."""

from dataclasses import asdict
from pathlib import Path

from semanticfl_ref.commands.compare import VARIED, add_grid_flags, grid_of
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, given
from semanticfl_ref.config.resolve import read_toml
from semanticfl_ref.errors import UserError, unknown
from semanticfl_ref.tools import reproduce
from semanticfl_ref.tools.compare.grid import scenario_settings

HELP = "run a published result of the paper, and print its number beside ours"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="published result (default: list them)"
    )
    add_grid_flags(parser, Path("runs/reproduce"))
    files = [result.file for name, result in reproduce.published().items() if name in argv]
    preset = read_toml(files[0]) if files else None
    add_settings(parser, argv, preset, hidden=VARIED)


def run(arguments) -> int:
    results, name = reproduce.published(), arguments.name
    if name is None:
        document = {key: asdict(result) for key, result in results.items()}
        return show(document, arguments.json, reproduce.listing)
    if name not in results:
        raise unknown("published result", name, results)
    if arguments.config is not None:
        raise UserError(
            "--config: a published result has its own configuration; change single settings with "
            "flags or --set"
        )
    result, changes = results[name], given(arguments)
    scenarios = {key for entry in result.scenarios for key in scenario_settings(entry)}
    for setting in sorted(changes.keys() & {"federation.method", *scenarios}):
        raise UserError(f"{setting} belongs to {name}: leave it out, or use `compare`")
    arguments.config, arguments.out = result.file, arguments.out / name
    methods = list(result.accuracy)
    grid = grid_of(arguments, methods=methods, scenarios=result.scenarios, baseline=methods[0])
    document = reproduce.reproduce(result, grid, say)
    document |= {"name": name, "seeds": grid.seeds, "changed": sorted(changes)}
    return show(document, arguments.json, reproduce.side_by_side)
