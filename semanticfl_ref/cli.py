"""The command line: finds the command, and turns what a user did wrong into one line. Nothing heavy is imported here."""

import argparse
import difflib
import os
import re
import sys

from semanticfl_ref import __version__
from semanticfl_ref.commands import config, features, partition, trace, train
from semanticfl_ref.commands.output import say
from semanticfl_ref.errors import UserError, unknown

COMMANDS = {"train": train, "trace": trace, "features": features, "partition": partition, "config": config}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's error is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(argv)
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
        # The reader went away, as in `... | head`. Python flushes once more on exit: let it flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command.

    Raises:
        UserError: an unknown command or flag (the nearest is offered), a flag without its value.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise unknown("command", argv[0], COMMANDS)
    parser = _Parser(prog="semanticfl_ref", description="Federated learning guided by a frozen diffusion model.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"semanticfl_ref {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=module.HELP, description=f"{module.HELP.capitalize()}.", allow_abbrev=False) for name, module in COMMANDS.items()}
    for name, module in COMMANDS.items():
        if name in argv[:1]:
            module.add_flags(parsers[name])
            parsers[name].add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        raise _unknown_argument(extra[0], arguments.command, parsers.get(arguments.command, parser).format_usage())
    if arguments.command is None:
        raise UserError(f"say what to do: {', '.join(COMMANDS)}; `train` alone runs the embedded default, --help explains")
    return arguments


class _Parser(argparse.ArgumentParser):
    """Errors become UserError: one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def _unknown_argument(text: str, command: str | None, usage: str) -> UserError:
    if not text.startswith("-"):
        return UserError(f"unexpected argument {text!r}; settings are written as flags or as --set a.b=c")
    name = text.split("=")[0]
    near = difflib.get_close_matches(name, ["--help", *re.findall(r"--[a-z0-9-]+", usage)], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; `semanticfl_ref {command or ''} --help` lists the flags"
    return UserError(f"unknown flag {name}{hint}")
