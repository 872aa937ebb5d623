"""What differs between machines: no fcntl, as on Windows; a notebook's variables."""

import importlib.util
import os
import subprocess
import sys

import pytest
from processes import JOB, environment

WITHOUT_FCNTL = """
import os, sys
sys.modules["fcntl"] = None
os.environ["MPLBACKEND"] = "module://no_such_backend"  # what a notebook sets for its children
sys.argv = ["semanticfl_ref", *sys.argv[1:]]
from semanticfl_ref.cli import program
sys.exit(program())
"""


def run(folder, *arguments: str) -> subprocess.CompletedProcess:
    """A command in a Python without fcntl, in a notebook's environment and a foreign locale."""
    variables = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_FCNTL, *arguments],
        cwd=folder,
        env={**variables, "SEMANTICFL_CACHE": str(folder / "cache")},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def test_training_needs_no_locks(tmp_path):
    done = run(tmp_path, "train", *JOB, "--rounds", "1", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert {"summary.json", "checkpoint.safetensors"} <= set(os.listdir(tmp_path / "run"))


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed here"
)
def test_a_notebooks_backend_does_not_matter(tmp_path):
    done = run(tmp_path, "partition", "show", "--dataset", "digits", "--figure", "p.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
