"""The runs of a grid: reuse, resume, interrupts, failures with the run's own message."""

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import ROOT, command, run_cli, start_cli

from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.storage import described
from semanticfl_ref.tools.compare import training
from semanticfl_ref.tools.compare.grid import Grid, Run, plan


def planned(folder: Path, methods: list[str], **fields) -> tuple[list[Run], Grid]:
    shared = {"seeds": 1, "settings": {}, "scenarios": ["iid"], **fields}
    grid = Grid(methods=methods, baseline=methods[0], out=folder, **shared)
    return plan(grid), grid


def times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("*")}


def test_a_folder_of_other_settings_is_refused(finished_grid):
    runs, grid = finished_grid({"fedavg": {"iid": [[0.5]]}})
    training.train_all(runs, grid)  # finished: nothing to do
    other = replace(grid, settings={**grid.settings, "federation.learning_rate": 0.5})
    with pytest.raises(MismatchError, match=r"federation\.learning_rate = 0\.1 there, 0\.5 here"):
        training.train_all(plan(other), other)


def test_every_failure_is_reported(tmp_path, monkeypatch):
    """Both of two runs at a time fail: the other seed's are not started."""
    both = threading.Barrier(2, timeout=10)

    def start(run, grid):
        both.wait()
        return SimpleNamespace(
            communicate=lambda: (None, f"100 %\nsemanticfl_ref: error: {run.method} is broken\n"),
            returncode=3,
            send_signal=lambda _: None,
        )

    monkeypatch.setattr(training, "start", start)
    runs, grid = planned(tmp_path, ["fedavg", "moon"], seeds=2, workers=2)
    with pytest.raises(UserError) as caught:
        training.train_all(runs, grid)
    assert sorted(str(caught.value).split("; and ")) == [
        "the run fedavg, iid, seed 0 failed: fedavg is broken",
        "the run moon, iid, seed 0 failed: moon is broken",
    ]
    assert caught.value.exit_code == 3


def test_a_killed_run_is_reported_as_such(tmp_path, monkeypatch):
    start = training.start

    def killed(run, grid):
        process = start(run, grid)
        process.kill()
        return process

    monkeypatch.setattr(training, "start", killed)
    with pytest.raises(UserError, match="seed 0 failed: killed by signal 9") as caught:
        training.train_all(*planned(tmp_path, ["fedavg"]))
    assert caught.value.exit_code == 1


def test_a_run_is_started_with_the_flags_of_its_settings(tmp_path, monkeypatch):
    """So that the command in its environment.json can be given again."""
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    monkeypatch.setattr(training, "IMPORTED", [Path("/own.py")])
    (run,), grid = planned(tmp_path, ["moon[moon.mu=5]"], offline=True)
    training.start(run, grid)
    assert commands[0][3:] == [
        *("train", "--import=/own.py", "--offline", "--method", "moon", "--scenario", "iid"),
        *("--set", "moon.mu=5.0", "--out", str(run.folder)),
    ]


@pytest.mark.heavy
def test_interrupted_compare_saves_and_goes_on(tmp_path, grid_job):
    """SIGINT to `compare` alone: its run ends with a checkpoint, no other begins, and the same
    command resumes it.
    """
    flags = [*grid_job, "--rounds", "6", "--seeds", "1", "--json", "--out", str(tmp_path)]
    process = start_cli("compare", "--methods", "fedavg,moon", *flags)
    while process.poll() is None and not list(tmp_path.glob("runs/fedavg*/checkpoint.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command resumes the others" in said.splitlines()[-1]
    (folder,) = tmp_path.glob("runs/[a-z]*")
    assert (folder / "checkpoint.safetensors").exists()
    assert not (folder / "summary.json").exists()
    begun = (folder / "metrics.jsonl").read_bytes()
    again = run_cli("compare", "--methods", "fedavg", *flags)
    assert again.returncode == 0, again.stderr
    assert (folder / "metrics.jsonl").read_bytes().startswith(begun)


def test_compare_from_end_to_end(trained_grid):
    """Two methods of a small job: tables and numbers; the second call trains nothing."""
    folder, result = trained_grid.folder, trained_grid.result
    gains = [method["gain"] and method["gain"]["values"] for method in result["results"]]
    assert gains == [None, [0.0]], "FedProx without its term is FedAvg"
    files = {file.name for file in folder.iterdir()}
    assert {"compare.md", "compare.csv", "compare.json"} <= files
    assert "python -m semanticfl_ref compare" in (folder / "compare.md").read_text()
    before = times(folder)
    again = run_cli(*trained_grid.arguments)
    assert json.loads(again.stdout) == result
    assert times(folder) == before


def test_reports_after_several_numbers_of_rounds_train_nothing(trained_grid, tmp_path):
    """`--at 1,2`: each number of rounds in Markdown, CSV and JSON."""
    before = times(trained_grid.folder)
    (tmp_path / "runs").symlink_to(trained_grid.folder / "runs")
    arguments = [*trained_grid.arguments[:-1], str(tmp_path), "--at", "2,1"]
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "compare.json").read_text())
    first, last = document["results"][:2], document["results"][2:]
    assert last == trained_grid.result["results"], "after all rounds"
    assert [result["rounds"] for result in first] == [1, 1]
    curve = document["curves"]["nid1"]["fedavg"]["mean"]
    assert first[0]["last"] == curve[:1]
    assert first[0]["last"] != last[0]["last"]
    text = (tmp_path / "compare.md").read_text()
    assert "**nid1, after round 1**" in text
    assert "**nid1, after round 2**" in text
    assert "mean of the last 1 |" in text
    assert "mean of the last 2 |" in text
    lines = csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text()))
    assert [line["rounds"] for line in lines] == ["1", "1", "2", "2"]
    assert times(trained_grid.folder) == before


def test_a_failing_run_gives_its_message_and_its_code(trained_grid):
    failing = list(trained_grid.arguments)
    failing[2] = "fedavg[federation.learning_rate=1e30]"
    done = run_cli(*failing)
    assert done.returncode == 6
    assert "federation.learning_rate=1e30" in done.stderr.splitlines()[-1]
    assert "NaN" in done.stderr.splitlines()[-1]


def test_compare_itself_needs_no_torch():
    code = (
        "import sys; from semanticfl_ref.tools.compare import experiment; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.heavy
def test_a_comparison_that_is_killed_takes_its_run_along(tmp_path, grid_job):
    """The run saves, as on SIGTERM; meanwhile a second comparison in the folder is refused."""
    flags = [*grid_job, "--rounds", "400", "--seeds", "1", "--out", str(tmp_path)]
    process = start_cli("compare", "--methods", "fedavg", *flags)
    while process.poll() is None and not list(tmp_path.glob("runs/fedavg*/checkpoint.safetensors")):
        time.sleep(0.01)
    second = run_cli("compare", "--methods", "fedavg", *flags)
    assert second.returncode == 2
    assert f"another process trains in {tmp_path}" in second.stderr.splitlines()[-1]
    process.kill()
    process.communicate()
    (folder,) = map(RunFolder, tmp_path.glob("runs/[a-z]*"))
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(UserError), folder.held():
            break
        time.sleep(0.05)
    with open(folder.checkpoint, "rb") as file:
        assert described(file)["round"] == len(folder.rounds()), "it was saved as it ended"


@pytest.mark.heavy
def test_a_comparison_in_the_background_can_be_ended(tmp_path, grid_job):
    """There SIGINT is ignored, by the runs too: they are sent SIGTERM."""
    flags = [*grid_job, "--rounds", "400", "--seeds", "1", "--out", str(tmp_path)]
    words = shlex.join(command("compare", "--methods", "fedavg", *flags))
    process = subprocess.Popen(
        ["bash", "-c", f"trap '' INT; exec {words}"], stderr=subprocess.DEVNULL, cwd=ROOT
    )
    while process.poll() is None and not list(tmp_path.glob("runs/fedavg*/checkpoint.safetensors")):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143
