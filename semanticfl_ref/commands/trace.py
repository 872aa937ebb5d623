"""`trace`: one round, statement by statement; and the map from equations to functions and tests."""

import contextlib
import sys
from pathlib import Path

from semanticfl_ref.commands.settings_flags import add_settings, given
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.config import resolve as config
from semanticfl_ref.errors import UserError

HELP = "show one round statement by statement: where it stands, its equation, its numbers; or --map, which function computes which equation"
# A round small enough to read, in the precision in which its numbers add up; the file and the flags
# win.
SMALL = {
    "partition.clients": 2,
    "federation.clients_per_round": 2,
    "federation.rounds": 1,
    "federation.local_epochs": 1,
    "federation.batch_size": 4,
    "run.precision": "fp32",
}


def add_flags(parser, argv: list[str]) -> None:
    add_settings(parser, argv)
    parser.add_argument(
        "--images", type=int, default=8, metavar="N", help="images of each client, at most (8)"
    )
    parser.add_argument(
        "--round",
        type=int,
        default=1,
        metavar="N",
        help="which round to show; those before are played unseen (1). SCAFFOLD's and MOON's memory is empty in the first",
    )
    parser.add_argument("--step", action="store_true", help="wait for Enter after each step")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write one page with source, equations, numbers and pictures",
    )
    parser.add_argument(
        "--map",
        action="store_true",
        help="only the table of equations, the functions that compute them, and the tests that show them",
    )
    parser.add_argument("--markdown", action="store_true", help="with --map: as Markdown")


def run(arguments) -> int:
    _refuse(arguments)
    if arguments.map:
        from semanticfl_ref.tools.trace import equations

        found = equations.equations()
        return show(
            {"equations": [vars(e) for e in found]},
            arguments.json,
            lambda _: (equations.as_markdown if arguments.markdown else equations.as_text)(found),
        )
    settings = config.resolve(
        {
            **SMALL,
            **(config.read_toml(arguments.config) if arguments.config else {}),
            **given(arguments),
        },
        None,
        arguments.set,
    )
    say(
        f"{settings.data.name}, {settings.federation.method}, round {arguments.round}: loading torch ..."
    )
    from semanticfl_ref.tools.trace import page as trace_page
    from semanticfl_ref.tools.trace import trace, words

    document, context = trace.observe(
        settings, images=arguments.images, round=arguments.round, offline=arguments.offline, say=say
    )
    if arguments.html:
        trace_page.write(arguments.html, document, context, arguments.offline)
        say(f"written: {arguments.html}")
    if arguments.json or not (arguments.html or arguments.step):
        return show(
            document,
            arguments.json,
            lambda _: "\n".join(words.blocks(document, words.colourful(sys.stdout))),
        )
    with contextlib.suppress(EOFError):
        for block in words.blocks(document, words.colourful(sys.stdout)) if arguments.step else ():
            print(block, flush=True)
            input()
    return 0


def _refuse(arguments) -> None:
    mistakes = {
        "--markdown belongs to `trace --map`": arguments.markdown and not arguments.map,
        "--step shows the round in the terminal: it takes neither --json, --html nor --map": arguments.step
        and (arguments.json or arguments.html or arguments.map),
        "--step waits for a key, and standard input is no terminal: leave --step out": arguments.step
        and not sys.stdin.isatty(),
        "--images and --round: must be at least 1": min(arguments.images, arguments.round) < 1,
        f"--html {arguments.html} is there already: choose another name, or remove it": arguments.html
        and arguments.html.exists(),
        f"--html {arguments.html}: its folder does not exist; make it first": arguments.html
        and not arguments.html.parent.is_dir(),
    }
    for message, made in mistakes.items():
        if made:
            raise UserError(message)
