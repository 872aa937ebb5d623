"""Trains the runs of a grid, each in a process of its own: finished runs are reused, interrupted
ones resumed.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from semanticfl_ref.config.command_line import to_flags
from semanticfl_ref.config.settings import to_flat
from semanticfl_ref.errors import MismatchError, UserError
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
    done = len(runs) - len(waiting)
    bar = tqdm(total=len(runs), initial=done, desc="runs", unit="run", file=sys.stderr)
    processes: list[subprocess.Popen] = []
    failures: list[UserError] = []
    stop = threading.Event()

    def train(run: Run) -> None:
        if stop.is_set():
            return
        process = start(run, grid)
        processes.append(process)
        if stop.is_set():  # while it was being started
            process.send_signal(signal.SIGINT)
        _, messages = process.communicate()
        if process.returncode:
            stop.set()
            failures.append(_failure(run, process.returncode, messages))
        else:
            bar.update()

    with bar, ThreadPoolExecutor(grid.workers) as pool:
        try:
            list(pool.map(train, waiting))
        except KeyboardInterrupt:
            stop.set()
            for process in list(processes):
                process.send_signal(signal.SIGINT)
            raise KeyboardInterrupt(
                "interrupted; finished runs are kept, and the same command resumes the others"
            ) from None
    if failures:
        error = UserError("; and ".join(map(str, failures)))
        error.exit_code = failures[0].exit_code
        raise error


def is_finished(run: Run) -> bool:
    """Whether a run has been trained to its end.

    Raises:
        MismatchError: its folder was made with other settings.
    """
    if not run.folder.exists():
        return False
    folder = RunFolder(run.folder)
    there, here = to_flat(folder.config("--out")), to_flat(run.config)
    differing = [
        f"{name} = {there[name]!r} there, {value!r} here"
        for name, value in here.items()
        if there[name] != value
    ]
    if differing:
        raise MismatchError(
            f"{run.folder} was made with other settings: {'; '.join(differing[:4])}. Choose "
            f"another --out, or delete it"
        )
    return folder.finished


def start(run: Run, grid: Grid) -> subprocess.Popen:
    """Start or resume a run in a child process."""
    command = [sys.executable, "-m", "semanticfl_ref", "train"]
    command += [f"--import={file}" for file in grid.imports]
    command += ["--offline"] * grid.offline
    if run.folder.exists():
        command += ["--resume", str(run.folder)]
    else:
        command += [*to_flags(run.config), "--out", str(run.folder)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # In a group of its own, Ctrl-C at a terminal reaches it once: through `train_all`.
        process_group=0,
    )


def _failure(run: Run, code: int, messages: str) -> UserError:
    """The error of a run that ended with a nonzero exit code."""
    reason = (messages.strip().splitlines() or ["no message"])[-1]
    if code < 0:  # the last line is a progress bar
        reason = f"killed by signal {-code}"
    reason = reason.removeprefix("semanticfl_ref: error: ")
    error = UserError(f"the run {run.method}, {run.scenario}, seed {run.seed} failed: {reason}")
    error.exit_code = max(code, 1)
    return error
