"""A small job that tests share: its command, and one unbroken run of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
JOB = ["--dataset", "digits", "--method", "fedavg", "--set", "model.width=2", "--clients", "3", "--clients-per-round", "2", "--rounds", "4", "--local-epochs", "1"]


@pytest.fixture(scope="session")
def job() -> list[str]:
    """Flags of a job of some seconds."""
    return list(JOB)


@pytest.fixture(scope="session")
def unbroken_run(tmp_path_factory) -> Path:
    """The folder of the small job, run to its end without a break."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = run_cli("train", *JOB, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def run_cli(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`python -m semanticfl_ref` in a process of its own, from the repository's root."""
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=300, **options)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "semanticfl_ref", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
