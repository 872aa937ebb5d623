"""A run folder to be changed, and pages without figures."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from semanticfl_ref.run.folder import SEAL


@pytest.fixture
def folder(unbroken_run, tmp_path) -> Path:
    """A copy of the small run, to be changed: nothing seals it, as in an earlier version."""
    copy = Path(shutil.copytree(unbroken_run, tmp_path / "run"))
    summary = json.loads((copy / "summary.json").read_text())
    del summary["sealed"], summary["sha256"]
    (copy / "summary.json").write_text(json.dumps(summary))
    config = copy / "config.toml"
    config.write_text(config.read_text().partition(SEAL)[0])
    (copy / "checkpoint.safetensors").unlink()
    return copy


@pytest.fixture
def undrawn(monkeypatch):
    """Without matplotlib, which takes a second per page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
