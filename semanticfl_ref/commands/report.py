"""`report`: run folders as pages."""

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import user_path

HELP = "write RUN/report.html for each run; with --out, also a page that compares them"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="run folder, finished or not"
    )
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FILE.html",
        help="page to write that compares the runs, two or more (default: none)",
    )


def run(arguments) -> int:
    out, several = arguments.out, len(arguments.runs) > 1
    if out and not several:
        raise UserError(
            f"--out {out}: this page compares several runs; name two or more, or leave --out out "
            f"(the report of each run goes into its folder)"
        )
    if out and (out.suffix != ".html" or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out}: give a name that ends in .html, in a folder that exists")
    from semanticfl_ref.tools.report import html, runs
    from semanticfl_ref.tools.report.drawing import can_draw

    # All are read before anything is written.
    found = [runs.read_run(path) for path in arguments.runs]
    if not can_draw():
        say("note: tables without figures: matplotlib is not installed; pip install matplotlib")
    elif several and not out:
        say("note: --out FILE.html adds a page that compares these runs")
    reports = [str(html.write_report(each)) for each in found]
    comparison = str(html.write_comparison(found, out)) if out else None
    document = {
        "reports": reports,
        "comparison": comparison,
        "figures": can_draw(),
        "unfinished": [str(each.path) for each in found if not each.finished],
    }
    pages = "\n".join(filter(None, [comparison, *reports]))
    return show(document, arguments.json, lambda _: pages)
