"""A run that lacks its end."""

import shutil

import pytest


@pytest.fixture
def unfinished(tmp_path, unbroken_run):
    """A copy of the unbroken run without its summary: as if killed just before its end."""
    run = tmp_path / "run"
    shutil.copytree(unbroken_run, run)
    (run / "summary.json").unlink()
    return run
