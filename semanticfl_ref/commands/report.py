"""`report`: run folders as pages to look at."""

from pathlib import Path

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.errors import UserError

HELP = "run folders as pages: report.html in each, with its figures; --out FILE compares several"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, finished or not"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="with several runs: a page that lists and compares them",
    )


def run(arguments) -> int:
    from semanticfl_ref.tools.report import html
    from semanticfl_ref.tools.report.drawing import can_draw

    if arguments.out is not None and len(arguments.runs) < 2:
        raise UserError(
            "--out is the page that compares several runs: name more of them, or leave it out; a run's own report goes into its folder"
        )
    if arguments.out is not None and not (
        arguments.out.suffix == ".html" and arguments.out.absolute().parent.is_dir()
    ):
        raise UserError(
            f"--out {arguments.out}: give a name that ends in .html, in a folder that exists"
        )
    runs = [
        html.read_run(path) for path in arguments.runs
    ]  # all are read before anything is written
    if not can_draw():
        say("note: no figures without matplotlib: pip install matplotlib; the tables are all there")
    elif arguments.out is None and len(runs) > 1:
        say("note: --out FILE.html adds a page that compares these runs")
    pages = [str(html.write_report(each)) for each in runs]
    compared = None if arguments.out is None else str(html.write_comparison(runs, arguments.out))
    document = {
        "reports": pages,
        "comparison": compared,
        "figures": can_draw(),
        "unfinished": [str(each.path) for each in runs if not each.finished],
    }
    return show(
        document,
        arguments.json,
        lambda found: "\n".join(
            [*([found["comparison"]] if found["comparison"] else []), *found["reports"]]
        ),
    )
