"""The command line: dispatches to a command, and turns a user's mistakes into one line.

Nothing heavy is imported here, so that `--help` is instant.
"""

import argparse
import difflib
import errno
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

from semanticfl_ref import __version__, formatting
from semanticfl_ref.commands import (
    anchors,
    compare,
    config,
    doctor,
    export,
    features,
    partition,
    report,
    reproduce,
    runs,
    search,
    trace,
    train,
)
from semanticfl_ref.commands.output import replace_streams, say
from semanticfl_ref.config.registry import IMPORTED
from semanticfl_ref.config.settings import setting_fields
from semanticfl_ref.cores import rank, ranks
from semanticfl_ref.errors import DataError, RankLost, UserError, unknown
from semanticfl_ref.parent import end_with_parent

COMMANDS = {
    "train": train,
    "trace": trace,
    "features": features,
    "anchors": anchors,
    "compare": compare,
    "search": search,
    "reproduce": reproduce,
    "report": report,
    "runs": runs,
    "export": export,
    "partition": partition,
    "config": config,
    "doctor": doctor,
}
PATIENCE = 5.0  # seconds that another rank gives the first one to tell its error
# Flags of other tools -> what to do here.
ELSEWHERE = {
    "--learning-rate": "did you mean --lr?",
    "--num-clients": "did you mean --clients?",
    "--gpus": "use --device cuda for one; for several, torchrun --nproc-per-node N (docs/scale.md)",
    "--gpu": "use --device cuda; select the GPU with CUDA_VISIBLE_DEVICES",
    "--num-workers": "data stay in memory, without worker processes",
}


def program() -> int:
    """`main` as a process: its signals and streams are handled too; returns the exit code.

    SIGTERM, which job schedulers send, saves a run as Ctrl-C does, and ends with 143. A second
    signal is ignored: it would break off the saving.
    """
    received = []

    def stop(number: int, frame) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: None)  # a child would inherit SIG_IGN
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, stop)
    replace_streams()
    os.environ["MPLBACKEND"] = "agg"  # figures go to files, whatever a notebook has set
    end_with_parent()
    code = main()
    return 128 + received[0] if received else code


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    formatting.quiet = rank() > 0
    try:
        arguments = parse(run_imports(argv))
        if ranks() > 1 and arguments.command not in ("train", "features"):
            raise UserError(
                f"torchrun cannot share the work of {arguments.command}: start it with python -m "
                f"semanticfl_ref (compare runs side by side with --workers)"
            )
        formatting.quiet = arguments.quiet or rank() > 0
        return COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        return _tell(error)
    except (MemoryError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or "out of memory"
        if re.search(r"find C compiler|No working C\+\+ compiler", reason):  # Triton, torch.compile
            remedy = "install gcc and g++, or set SEMANTICFL_KERNELS=torch, diffusion.compile=false"
            return _tell(UserError(f"{reason}: {remedy}"))
        if not _is_shortage(error):
            raise
        return _tell(
            DataError(
                f"the machine's memory or processes do not suffice ({reason}): end other programs, "
                f"or lower --replicas, --batch-size, --width or --clients"
            )
        )
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted", always=True)
        return 130


def _tell(error: UserError) -> int:
    """Print an error; returns its exit code.

    A rank after the first waits: most often the first has the same error, and ends them all.
    """
    if rank() > 0 and not isinstance(error, RankLost):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    say(f"error: {' '.join(str(error).split())}", always=True)
    return error.exit_code


def run_imports(argv: list[str]) -> list[str]:
    """Run the files that --import names, before anything is parsed: they may register names.

    Returns:
        The other arguments.

    Raises:
        DataError: there is no such file.
        UserError: it raised.
    """
    parser = _Parser(prog="semanticfl_ref", add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="files", action="append", type=Path, default=[])
    found, others = parser.parse_known_args(argv)
    for file in found.files:
        if not file.is_file():
            raise DataError(f"--import {file}: there is no such file")
        sys.path.insert(0, str(file.resolve().parent))  # as `python FILE` does
        try:
            runpy.run_path(str(file))
        except UserError as error:
            raise type(error)(f"--import {file}: {error}") from None
        except Exception as error:
            raise UserError(f"--import {file} raised {type(error).__name__}: {error}") from error
    IMPORTED[:] = [file.absolute() for file in found.files]
    return others


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command.

    Raises:
        UserError: an unknown command or flag (the nearest is suggested), a flag without its value.
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
        help="Python file to run first, which may register methods, data sets, models or scenarios "
        "(with any command; repeatable)",
    )
    parser.add_argument("--version", action="version", version=f"semanticfl_ref {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = parser
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            allow_abbrev=False,
        )
        if name in argv[:1]:
            chosen = command
            module.add_flags(command, argv[1:])
            command.add_argument(
                "--json", action="store_true", help="print one JSON object on stdout"
            )
            command.add_argument(
                "--quiet", action="store_true", help="no progress on stderr, only errors"
            )
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        raise _unknown_argument(extra[0], chosen)
    if arguments.command is None:
        raise UserError(
            f"no command given; choose one of: {', '.join(COMMANDS)}. `train` alone runs the "
            f"embedded default; see --help"
        )
    return arguments


def _is_shortage(error: Exception) -> bool:
    """Whether memory, threads or processes ran out: in Python, torch, CUDA or the system."""
    words = ("can't allocate memory", "can't start new thread", "out of memory")
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN)
        or any(text in str(error) for text in words)
    )


class _Parser(argparse.ArgumentParser):
    """Errors become UserError: one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def _unknown_argument(text: str, parser: argparse.ArgumentParser) -> UserError:
    if not text.startswith("-"):
        return UserError(
            f"unexpected argument {text!r}; settings are given as flags or as --set name=value"
        )
    name = text.split("=")[0]
    known = ["--help", *re.findall(r"--[a-z0-9-]+", parser.format_usage())]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if name in ELSEWHERE:
        hint = ELSEWHERE[name]
    elif name[2:] in setting_fields():
        hint = f"use --set {name[2:]}=..."
    elif near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"`{parser.prog} --help` lists the flags"
    return UserError(f"unknown flag {name}; {hint}")
