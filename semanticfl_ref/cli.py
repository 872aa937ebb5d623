"""The command line: finds the command, and turns what a user did wrong into one line. Nothing heavy
is imported here.
"""

import argparse
import difflib
import os
import re
import runpy
import sys
from pathlib import Path

from semanticfl_ref import __version__
from semanticfl_ref.commands import (
    compare,
    config,
    doctor,
    features,
    partition,
    report,
    reproduce,
    trace,
    train,
)
from semanticfl_ref.commands.output import say
from semanticfl_ref.errors import DataError, UserError, unknown

COMMANDS = {
    "train": train,
    "trace": trace,
    "features": features,
    "compare": compare,
    "reproduce": reproduce,
    "report": report,
    "partition": partition,
    "config": config,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's error is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        argv, files = take_imports(argv)
        arguments = parse(argv)
        arguments.imports = files
        code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        say(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted; nothing was saved")
        return 130
    except BrokenPipeError:
        # The reader went away, as in `... | head`. Python flushes once more on exit: let it flush
        # into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def take_imports(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Run the files that --import names, before anything is parsed: they may add methods and
    settings. Returns the other arguments and the files.

    Raises:
        DataError: there is no such file. UserError: it raised.
    """
    finder = _Parser(prog="semanticfl_ref", add_help=False, allow_abbrev=False)
    finder.add_argument("--import", dest="files", action="append", type=Path, default=[])
    found, others = finder.parse_known_args(argv)
    for file in found.files:
        if not file.is_file():
            raise DataError(f"--import {file}: there is no such file")
        try:
            runpy.run_path(str(file))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--import {file} raised {type(error).__name__}: {error}") from error
    return others, [file.absolute() for file in found.files]


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command.

    Raises:
        UserError: an unknown command or flag (the nearest is offered), a flag without its value.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise unknown("command", argv[0], COMMANDS)
    parser = _Parser(
        prog="semanticfl_ref",
        description="Federated learning guided by a frozen diffusion model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--import",
        metavar="FILE",
        help="with any command: run a Python file first, which may add a method of your own; repeatable",
    )
    parser.add_argument("--version", action="version", version=f"semanticfl_ref {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {
        name: commands.add_parser(
            name, help=module.HELP, description=f"{module.HELP.capitalize()}.", allow_abbrev=False
        )
        for name, module in COMMANDS.items()
    }
    for name, module in COMMANDS.items():
        if name in argv[:1]:
            module.add_flags(parsers[name])
            parsers[name].add_argument(
                "--json", action="store_true", help="one JSON object on stdout"
            )
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        raise _unknown_argument(
            extra[0], arguments.command, parsers.get(arguments.command, parser).format_usage()
        )
    if arguments.command is None:
        raise UserError(
            f"say what to do: {', '.join(COMMANDS)}; `train` alone runs the embedded default, --help explains"
        )
    return arguments


class _Parser(argparse.ArgumentParser):
    """Errors become UserError: one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def _unknown_argument(text: str, command: str | None, usage: str) -> UserError:
    if not text.startswith("-"):
        return UserError(
            f"unexpected argument {text!r}; settings are written as flags or as --set a.b=c"
        )
    name = text.split("=")[0]
    near = difflib.get_close_matches(
        name, ["--help", *re.findall(r"--[a-z0-9-]+", usage)], n=1, cutoff=0.5
    )
    hint = (
        f"; did you mean {near[0]}?"
        if near
        else f"; `semanticfl_ref {command or ''} --help` lists the flags"
    )
    return UserError(f"unknown flag {name}{hint}")
