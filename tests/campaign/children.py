"""Commands in forked children, which may be killed at any write and at any moment, and what became
of them.
"""

import errno
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from processes import JOB

from semanticfl_ref import cli

# Three rounds in less than half a second.
SMALL = [*JOB, "--width", "1", "--rounds", "3", "--set", "data.image_size=12"]
RESULTS = ("checkpoint.safetensors", "metrics.jsonl")
TIMEOUT = 120  # seconds, after which a child hangs
ALLOWED = {0, 2, 3, 4, 5, 6, 130, 143}  # exit codes; 1 is a bug of ours
WRITES = ("fsync", "replace", "rename")


class Done(NamedTuple):
    """A child that ended: exit code (negative: a signal's), stdout and stderr; None: it hung."""

    code: int | None
    out: str
    told: str


class Child:
    """A command in a forked child.

    Args:
        arguments: of the command line.
        prepare: called in the child before the command.
    """

    def __init__(self, arguments: list[str], prepare: Callable[[], None] = lambda: None):
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments, prepare)

    def _become(self, arguments: list[str], prepare: Callable[[], None]) -> None:
        code = 1
        try:
            for descriptor, file in enumerate(self._files, 1):
                os.dup2(file.fileno(), descriptor)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["semanticfl_ref", *arguments]
            prepare()
            code = cli.program()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def end(self, moment: float = TIMEOUT, sent: int = signal.SIGKILL) -> Done:
        """Wait for the end; a signal is sent after `moment` seconds."""
        began, is_sent = time.monotonic(), False
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return Done(os.waitstatus_to_exitcode(status), *self._told())
            seconds = time.monotonic() - began
            if seconds > TIMEOUT:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Done(None, *self._told())
            if seconds > moment and not is_sent:
                os.kill(self.pid, sent)
                is_sent = True
            time.sleep(0.002)

    def _told(self) -> list[str]:
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return texts


def run(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> Done:
    """A command from its start to its end."""
    return Child(arguments, prepare).end()


def classified(done: Done, same: bool, names: str) -> str:
    """What became of a damage.

    Args:
        done: the command that met it.
        same: whether the result is the one without the damage.
        names: of what a refusal must contain.

    Returns:
        "named", "harmless", "silent", "unnamed", "traceback" or "hang"; the first two are good.
    """
    if done.code is None:
        return "hang"
    if done.code not in ALLOWED or "Traceback" in done.told:
        return "traceback"
    if done.code == 0:
        return "harmless" if same else "silent"
    return "named" if names in (done.told.splitlines() or [""])[-1] else "unnamed"


def count_writes(arguments: list[str]) -> int:
    """How many flushes and renames a command makes."""
    reading, writing = os.pipe()

    def count() -> None:
        for name in WRITES:
            real = getattr(os, name)
            setattr(os, name, lambda *a, real=real: (os.write(writing, b"."), real(*a))[1])

    assert run(arguments, count).code == 0
    os.close(writing)
    with open(reading, "rb") as file:
        return len(file.read())


def fail_at(number: int, fail: Callable[[str, tuple], None]) -> Callable[[], None]:
    """For a child: its write `number`, counted from 0, is handed to `fail` before it is made."""

    def install() -> None:
        left = [number]
        for name in WRITES:
            real = getattr(os, name)

            def write(*arguments, name=name, real=real):
                left[0] -= 1
                if left[0] == -1:
                    fail(name, arguments)
                return real(*arguments)

            setattr(os, name, write)

    return install


def die(name: str, arguments: tuple) -> None:
    """The write is never made."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_torn(name: str, arguments: tuple) -> None:
    """Half of what is being flushed reaches the disk; of a rename, nothing."""
    if name == "fsync":
        file = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        content = file.read_bytes()
        # Of a file of lines, those before the last were flushed earlier.
        flushed = content[:-1].rfind(b"\n") + 1 if file.suffix == ".jsonl" else 0
        os.truncate(file, (flushed + len(content)) // 2)
    die(name, arguments)


def full(number: int = errno.ENOSPC) -> Callable[[str, tuple], None]:
    """The write fails: the disk is full, or another error of the system."""

    def fail(name: str, arguments: tuple) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def start_or_resume(path: Path) -> list[str]:
    """Arguments that start the small run, or resume it once its folder is there."""
    return (
        ["train", "--resume", str(path)] if path.exists() else ["train", *SMALL, "--out", str(path)]
    )


def same_files(one: Path, other: Path, names: tuple[str, ...] = RESULTS) -> bool:
    """Whether both folders have these files, with the same bytes."""
    there = all((folder / name).is_file() for folder in (one, other) for name in names)
    return there and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)
