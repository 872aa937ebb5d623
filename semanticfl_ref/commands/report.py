"""`report`: run folders as pages."""

from pathlib import Path

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.errors import UserError

HELP = "HTML pages of run folders: a report with figures in each, and with --out a comparison"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, finished or not"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="page to write that compares the runs, two or more (default: none)",
    )


def run(arguments) -> int:
    from semanticfl_ref.tools.report import html
    from semanticfl_ref.tools.report.drawing import can_draw
    from semanticfl_ref.tools.report.runs import read_run

    out = arguments.out
    if out is not None:
        _check(out, len(arguments.runs))
    # All are read before anything is written.
    runs = [read_run(path) for path in arguments.runs]
    if not can_draw():
        say("note: tables without figures: matplotlib is not installed; pip install matplotlib")
    elif out is None and len(runs) > 1:
        say("note: --out FILE.html adds a page that compares these runs")
    document = {
        "reports": [str(html.write_report(each)) for each in runs],
        "comparison": None if out is None else str(html.write_comparison(runs, out)),
        "figures": can_draw(),
        "unfinished": [str(each.path) for each in runs if not each.finished],
    }
    return show(document, arguments.json, _paths)


def _check(out: Path, runs: int) -> None:
    if runs < 2:
        raise UserError(
            f"--out {out}: it is for a page that compares several runs; name two or more, or leave "
            f"--out out (the report of a run goes into its folder)"
        )
    if out.suffix != ".html" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: give a name that ends in .html, in a folder that exists")


def _paths(document: dict) -> str:
    comparison = [document["comparison"]] if document["comparison"] else []
    return "\n".join([*comparison, *document["reports"]])
