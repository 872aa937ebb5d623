"""`trace`: one round, statement by statement; or the map from equations to functions and tests."""

import sys

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, positive, settings_of
from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import user_path

HELP = (
    "show one round statement by statement, with its equations and values; or, with --map, which "
    "function computes which equation"
)
# A round small enough to read, in a precision in which its numbers add up.
SMALL = {
    "partition.clients": 2,
    "federation.clients_per_round": 2,
    "federation.rounds": 1,
    "federation.local_epochs": 1,
    "federation.batch_size": 4,
    "run.precision": "fp32",
    "run.replicas": 1,  # the tracer follows one thread
}
PROMPT = "Enter: next step, q: quit "


def add_flags(parser, argv: list[str]) -> None:
    add_settings(parser, argv, preset=SMALL)
    parser.add_argument(
        "--images",
        type=positive,
        default=8,
        metavar="N",
        help="maximum number of images per client (default: 8)",
    )
    parser.add_argument(
        "--round",
        type=positive,
        default=1,
        metavar="N",
        help="round to show, after running those before it; the state of SCAFFOLD and MOON is "
        "empty in the first (default: 1)",
    )
    parser.add_argument(
        "--all", action="store_true", help="every statement, also those without an equation"
    )
    parser.add_argument("--step", action="store_true", help="one step at a time, after Enter")
    parser.add_argument(
        "--html",
        type=user_path,
        metavar="FILE",
        help="page with code, equations, values and pictures",
    )
    parser.add_argument(
        "--map",
        action="store_true",
        help="only the table of equations, the functions that compute them, and their tests",
    )
    parser.add_argument("--markdown", action="store_true", help="Markdown, with --map")


def run(arguments) -> int:
    _check(arguments)
    if arguments.map:
        return _show_map(arguments)
    config = settings_of(arguments, SMALL)
    say(
        f"{config.data.name}, {config.federation.method}, round {arguments.round}: "
        f"loading torch ..."
    )
    from semanticfl_ref.tools.trace.page import write_page
    from semanticfl_ref.tools.trace.text import blocks, has_colours
    from semanticfl_ref.tools.trace.trace import trace_round

    traced = trace_round(
        config,
        images=arguments.images,
        round=arguments.round,
        offline=arguments.offline,
        say=say,
    )
    if arguments.html:
        write_page(arguments.html, traced)
        say(f"written: {arguments.html}")
        if not arguments.json:
            return 0
    shown = blocks(traced.document, everything=arguments.all, colours=has_colours(sys.stdout))
    if arguments.step:
        _step_through(shown)
        return 0
    return show(traced.document, arguments.json, lambda _: "\n".join(shown))


def _check(arguments) -> None:
    mistakes = {
        "--markdown: only with --map": arguments.markdown and not arguments.map,
        "--step shows the round in the terminal: use it without --json, --html and --map": (
            arguments.step and (arguments.json or arguments.html or arguments.map)
        ),
        "--step waits for a key, but standard input is not a terminal: leave --step out": (
            arguments.step and not sys.stdin.isatty()
        ),
        f"--html {arguments.html} exists already: choose another name, or remove it": (
            arguments.html and arguments.html.exists()
        ),
        f"--html {arguments.html}: its folder does not exist; make it first": (
            arguments.html and not arguments.html.parent.is_dir()
        ),
    }
    for message, made in mistakes.items():
        if made:
            raise UserError(message)


def _show_map(arguments) -> int:
    from semanticfl_ref.tools.report.page import render
    from semanticfl_ref.tools.trace.equations import TEMPLATES, equations

    document = {"equations": [vars(equation) for equation in equations()]}
    template = "equations.md.jinja" if arguments.markdown else "equations.txt.jinja"
    return show(document, arguments.json, lambda it: render(TEMPLATES, template, **it).rstrip())


def _step_through(blocks: list[str]) -> None:
    for block in blocks:
        print(block, flush=True)
        print(PROMPT, end="", file=sys.stderr, flush=True)
        try:
            answer = input()
        except EOFError:
            return
        if answer.strip() == "q":
            return
