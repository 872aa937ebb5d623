"""The command line in a process of its own, and a small job for it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
JOB = [
    *(
        "--dataset",
        "digits",
        "--method",
        "fedavg",
        "--set",
        "model.width=2",
        "--set",
        "run.threads=1",
    ),
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


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "semanticfl_ref", *arguments]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def interruptible(words: list[str]) -> list[str]:
    """The command with SIGINT at its default.

    A suite started by nohup or in the background has SIGINT ignored, and its children inherit that.
    """
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *words]
