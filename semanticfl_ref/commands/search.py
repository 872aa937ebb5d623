"""`search`: settings of every method, chosen on the validation part with the same budget."""

from dataclasses import asdict
from pathlib import Path

from semanticfl_ref.commands.compare import (
    VARIED,
    add_entries,
    add_grid_flags,
    entries_of,
    grid_of,
)
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, positive
from semanticfl_ref.config.resolve import parse_assignment
from semanticfl_ref.errors import UserError

HELP = "choose each method's settings by validation accuracy, with the same budget for all"


def add_flags(parser, argv: list[str]) -> None:
    add_entries(parser)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="a setting and its values, such as federation.learning_rate=0.05,0.1; those of a "
        "method's section, such as moon.mu=1,5, are for this method; repeatable",
    )
    parser.add_argument(
        "--configurations",
        type=positive,
        default=4,
        metavar="N",
        help="configurations per method, drawn from the combinations (default: %(default)s)",
    )
    add_grid_flags(parser, Path("runs/search"), seeds=2, first=100)
    add_settings(parser, argv, hidden=VARIED)


def run(arguments) -> int:
    from semanticfl_ref.tools.compare.search import Search, search, table

    varied = {
        name: [value.strip() for value in values.split(",")]
        for name, values in map(parse_assignment, arguments.vary)
    }
    if not varied:
        raise UserError("nothing to search: name settings with --vary NAME=A,B")
    for name in varied:
        if name in VARIED:
            raise UserError(f"--vary {name}: {VARIED[name]}")
    methods, scenarios = entries_of(arguments)
    grid = grid_of(
        arguments, methods=methods, scenarios=scenarios, baseline=methods[0], part="validation"
    )
    result = search(grid, varied, arguments.configurations, say)
    return show(asdict(result), arguments.json, lambda document: table(Search(**document)))
