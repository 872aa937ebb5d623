"""A run folder to be changed, and pages without figures."""

import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture
def folder(unbroken_run, tmp_path) -> Path:
    """A copy of the small run, to be changed."""
    return Path(shutil.copytree(unbroken_run, tmp_path / "run"))


@pytest.fixture
def undrawn(monkeypatch):
    """Without matplotlib, which takes a second per page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
