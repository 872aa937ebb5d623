"""A run folder to be changed, and pages without figures."""

import shutil
import sys
from pathlib import Path

import pytest
from run_files import change


@pytest.fixture
def folder(unbroken_run, tmp_path) -> Path:
    """A copy of the small run, to be changed: its end does not seal it."""
    copy = Path(shutil.copytree(unbroken_run, tmp_path / "run"))
    change(copy / "summary.json", sealed={})
    return copy


@pytest.fixture
def undrawn(monkeypatch):
    """Without matplotlib, which takes a second per page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
