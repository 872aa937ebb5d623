"""A run folder to be changed, and pages without figures."""

import json
import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture
def folder(unbroken_run, tmp_path) -> Path:
    """A copy of the small run, to be changed: its end does not seal it."""
    copy = Path(shutil.copytree(unbroken_run, tmp_path / "run"))
    summary = json.loads((copy / "summary.json").read_text())
    unsealed = {key: value for key, value in summary.items() if key not in ("sealed", "sha256")}
    (copy / "summary.json").write_text(json.dumps(unsealed))
    return copy


@pytest.fixture
def undrawn(monkeypatch):
    """Without matplotlib, which takes a second per page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
