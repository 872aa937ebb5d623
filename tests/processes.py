"""The command line in a process of its own, and a small job for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
JOB = [
    *("--dataset", "digits", "--method", "fedavg", "--width", "2", "--threads", "1"),
    *("--clients", "3", "--clients-per-round", "2", "--rounds", "4", "--local-epochs", "1"),
]


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m semanticfl_ref` to its end, from the repository's root."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )


def start_cli(*arguments: str) -> subprocess.Popen:
    """Start `python -m semanticfl_ref`; it reacts to Ctrl-C even if this process ignores it.

    A suite that runs under nohup or in the background of a shell has SIGINT ignored, and a process
    inherits that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "semanticfl_ref", *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
