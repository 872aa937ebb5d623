"""Runs whose numbers depend on different environments or data are not compared unawares."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from semanticfl_ref.errors import MismatchError
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare import training
from semanticfl_ref.tools.compare.alike import require_alike
from semanticfl_ref.tools.compare.grid import plan
from semanticfl_ref.tools.compare.statistics import compare
from semanticfl_ref.tools.compare.tables import markdown

METHODS = {"fedavg": {"iid": [[0.5]]}, "moon": {"iid": [[0.6]]}}


def edit(folder: Path, name: str, **entries) -> None:
    """Change entries of a JSON file; one that is not there is made."""
    file = folder / name
    document = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**document, **entries}))


@pytest.fixture
def grid(finished_grid):
    """Two finished runs of the same data, and their grid."""
    runs, grid = finished_grid(METHODS)
    for run in runs:
        edit(run.folder, "identity.json", data="0" * 64, partition="1" * 64, anchors=None)
    return runs, grid


@pytest.mark.parametrize(
    ("name", "other"),
    [("threads", 2), ("precision", "bf16"), ("device", "H100"), ("processor", "another")],
)
def test_what_numbers_depend_on_is_the_same(grid, name, other):
    runs, _ = grid
    require_alike(runs)
    edit(runs[1].folder, "environment.json", **{name: other})
    with pytest.raises(MismatchError, match=f"{other}.*--any-environment"):
        require_alike(runs)


def test_versions_and_the_rounds_before_a_resume_count_too(grid):
    runs, _ = grid
    now = json.loads((runs[1].folder / "environment.json").read_text())
    before = {**now, "versions": {"torch": "1.0"}}
    edit(runs[1].folder, "environment.json", earlier=[{**before, "last_round": 0}])
    require_alike(runs)  # it ended before its first round
    edit(runs[1].folder, "environment.json", earlier=[{**before, "last_round": 1}])
    with pytest.raises(MismatchError, match=r"torch \(1.0, 2.13.0\)|torch \(2.13.0, 1.0\)"):
        require_alike(runs)


def test_equal_settings_stand_for_equal_data(grid):
    runs, _ = grid
    edit(runs[1].folder, "identity.json", data="f" * 64)
    with pytest.raises(MismatchError, match="differ in data"):
        require_alike(runs)
    other = replace(runs[1].config.data, augment=not runs[1].config.data.augment)
    require_alike([runs[0], replace(runs[1], config=replace(runs[1].config, data=other))])


def test_a_run_that_will_be_trained_here_has_this_environment(grid):
    runs, _ = grid
    (runs[1].folder / "summary.json").unlink()
    with pytest.raises(MismatchError, match="this environment"):  # no processor is an abacus
        require_alike(runs)


def test_a_setting_of_a_methods_own_is_no_other_environment(grid):
    runs, _ = grid
    edit(runs[1].folder, "environment.json", precision="bf16")
    own = replace(runs[1].config, run=replace(runs[1].config.run, precision="bf16"))
    require_alike([runs[0], replace(runs[1], config=own)])


def test_every_environment_is_below_the_table(grid):
    runs, settings = grid
    edit(runs[1].folder, "environment.json", threads=2)
    text = markdown(compare(runs, settings))
    assert "threads per run: 1" in text
    assert "threads per run: 2" in text


def test_where_and_how_fast_is_no_other_run(grid, monkeypatch):
    """More workers mean fewer clients side by side: finished runs are reused, others resumed."""
    runs, settings = grid
    monkeypatch.setattr("semanticfl_ref.tools.compare.grid.cores", lambda: 8)
    moved = plan(
        replace(settings, workers=2, settings={**settings.settings, "data.dir": "elsewhere"})
    )
    assert moved[0].config.run.replicas != runs[0].config.run.replicas
    assert all(map(training.is_finished, moved))
    commands = []
    monkeypatch.setattr(training.subprocess, "Popen", lambda words, **_: commands.append(words))
    training.start(moved[0], settings)
    assert commands[0][3:] == [
        *("train", "--resume", str(runs[0].folder)),
        *("--set=data.dir=elsewhere", "--set=run.replicas=4"),
    ]
    assert RunFolder(runs[0].folder).finished
