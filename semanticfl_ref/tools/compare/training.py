"""Trains the runs of a grid, each in a process of its own: finished runs are reused, interrupted
ones resumed.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from semanticfl_ref.config.command_line import to_flags
from semanticfl_ref.config.registry import IMPORTED
from semanticfl_ref.config.settings import NOT_IDENTITY, to_flat
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.formatting import progress_bar
from semanticfl_ref.parent import child_environment, lifeline
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare.grid import Grid, Run


def train_all(runs: Sequence[Run], grid: Grid) -> None:
    """Train the runs that are not finished; after a failure, no further one is started.

    Raises:
        MismatchError: a run folder was made with other settings.
        UserError: runs failed; with the exit code of the first and the last message of each.
        KeyboardInterrupt: after all runs have saved a checkpoint.
    """
    waiting = [run for run in runs if not is_finished(run)]
    bar = progress_bar(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit="run")
    processes: list[subprocess.Popen] = []
    failures: dict[str, int] = {}  # message -> exit code
    stop = threading.Event()

    def train(run: Run) -> None:
        if stop.is_set():
            return
        process = start(run, grid)
        processes.append(process)
        if stop.is_set():  # while it was being started
            process.send_signal(signal.SIGTERM)
        _, messages = process.communicate()
        if process.returncode:
            stop.set()
            failures[_failure(run, process.returncode, messages)] = max(process.returncode, 1)
        else:
            bar.update()

    with bar, ThreadPoolExecutor(grid.workers) as pool:
        try:
            list(pool.map(train, waiting))
        except KeyboardInterrupt:
            stop.set()
            for process in list(processes):  # a shell's background jobs ignore SIGINT
                process.send_signal(signal.SIGTERM)
            raise KeyboardInterrupt(
                "interrupted; finished runs are kept, and the same command resumes the others"
            ) from None
    if failures:
        error = UserError("; and ".join(failures))
        error.exit_code = next(iter(failures.values()))
        raise error


def is_finished(run: Run) -> bool:
    """Whether a run has been trained to its end.

    Raises:
        MismatchError: its folder was made with other settings, or a finished run was changed.
    """
    if not run.folder.exists():
        return False
    folder = RunFolder(run.folder)
    there = to_flat(folder.config("--out"))
    differing = [
        f"{name} = {there[name]!r} there, {value!r} here"
        for name, value in to_flat(run.config).items()
        if there[name] != value and name not in NOT_IDENTITY - {"federation.rounds"}
    ]
    if differing:
        raise MismatchError(
            f"{run.folder} was made with other settings: {'; '.join(differing[:4])}. Choose "
            f"another --out, or delete it"
        )
    if folder.finished:
        folder.verify()
    return folder.finished


def start(run: Run, grid: Grid) -> subprocess.Popen:
    """Start or resume a run in a child process, which ends with this one."""
    flags = [f"--import={file}" for file in IMPORTED] + ["--offline"] * grid.offline
    if run.folder.exists():
        there, here = to_flat(RunFolder(run.folder).config("--out")), to_flat(run.config)
        moved = [name for name in sorted(NOT_IDENTITY) if here[name] != there[name]]
        flags += ["--resume", str(run.folder), *(f"--set={name}={here[name]}" for name in moved)]
    else:
        flags += [*to_flags(run.config), "--out", str(run.folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "semanticfl_ref", "train", *flags],
        stdin=lifeline(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=child_environment(),
        text=True,
        errors="replace",
        # In a group of its own, Ctrl-C at a terminal reaches it once: through `train_all`.
        process_group=0,
    )


def _failure(run: Run, code: int, messages: str) -> str:
    """What is said of a run that ended with a nonzero exit code."""
    reason = (messages.strip().splitlines() or ["no message"])[-1]
    if code < 0:  # the last line is a progress bar
        reason = f"killed by signal {-code}"
    reason = reason.removeprefix("semanticfl_ref: error: ")
    return f"the run {run.method}, {run.scenario}, seed {run.seed} failed: {reason}"
