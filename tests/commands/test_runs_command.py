"""`runs`: the table of a folder of runs, and their metrics as CSV."""

import csv
import io
import json
import shutil
import sys

import pytest
from processes import JOB

from semanticfl_ref import cli
from semanticfl_ref.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path, unbroken_run):
    """A finished run, one that lacks its end, and a damaged one, at two depths."""
    for name in ("a", "deeper/b", "c"):
        shutil.copytree(unbroken_run, tmp_path / name)
    (tmp_path / "deeper/b/summary.json").unlink()
    metrics = tmp_path / "deeper/b/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "c/metrics.jsonl").write_text("[1]\n")
    return tmp_path


def test_a_table_of_runs(folder, unbroken_run, capsys):
    accuracy = [line["test_accuracy"] for line in RunFolder(unbroken_run).rounds()]
    assert cli.main(["runs", "list", str(folder), "--json"]) == 0
    first, damaged, second = json.loads(capsys.readouterr().out)["runs"]
    common = {"method": "fedavg", "data": "digits", "scenario": "nid1", "seed": 0}
    assert first == {
        **common,
        "run": str(folder / "a"),
        "rounds": "4 of 4",
        "last": accuracy[3],
        "last_five": pytest.approx(sum(accuracy) / 4),
        "state": "finished",
    }
    assert second["rounds"] == "2 of 4"
    assert second["last_five"] == pytest.approx(sum(accuracy[:2]) / 2)
    assert second["state"] == "unfinished"
    assert "metrics.jsonl is not what a run writes" in damaged["state"]
    assert cli.main(["runs", "list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["run", "method", "data"]
    assert f"{accuracy[3]:.1%}" in lines[1]
    assert "not what a run writes" in lines[2]


def test_metrics_as_csv(folder, unbroken_run, capsys):
    shutil.rmtree(folder / "c")
    assert cli.main(["runs", "csv", str(folder)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    lines = RunFolder(unbroken_run).rounds()
    config = RunFolder(unbroken_run).config()
    named = (config.federation.method, config.data.name, config.partition.scenario)
    assert (*named, str(config.run.seed)) == tuple(
        rows[0][column] for column in ("method", "data", "scenario", "seed")
    )
    assert [int(row["round"]) for row in rows] == [1, 2, 3, 4, 1, 2]
    for row, line in zip(rows, lines, strict=False):
        assert float(row["test_accuracy"]) == line["test_accuracy"]
        assert float(row["terms.cross_entropy"]) == line["terms"]["cross_entropy"]
        assert int(row["bytes.down.model"]) == line["bytes"]["down"]["model"]
        assert json.loads(row["client_accuracy"]) == line["client_accuracy"]


def test_what_is_no_folder_of_runs(folder, capsys):
    assert cli.main(["runs", "csv", str(folder)]) == 3
    assert "not what a run writes" in capsys.readouterr().err
    assert cli.main(["runs", "list", str(folder / "absent")]) == 3
    assert "there is no such folder" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert cli.main(["runs", "list", str(folder / "empty")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_quiet_and_verbose(tmp_path, job, capsys):
    """Without a terminal there is no bar; --quiet leaves errors only."""
    job += ["--rounds", "1"]
    assert cli.main(["train", *job, "--quiet", "--out", str(tmp_path / "q")]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["train", *job, "--quiet", "--out", str(tmp_path / "q")]) == 2
    assert "error: " in capsys.readouterr().err
    assert cli.main(["train", *job, "--verbose", "--out", str(tmp_path / "v")]) == 0
    error = capsys.readouterr().err
    (line,) = RunFolder(tmp_path / "v").rounds()
    assert f"round 1: test accuracy {line['test_accuracy']:.1%}, loss {line['loss']:.3f}" in error
    assert "round/s" not in error


def test_tensorboard_has_every_number_of_every_round(tmp_path):
    """A resumed run goes on where its checkpoint is."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    assert cli.main(["train", *JOB, "--rounds", "2", "--tensorboard", "--out", str(run)]) == 0
    assert cli.main(["train", "--resume", str(run), "--rounds", "3", "--tensorboard"]) == 0
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("loss", "loss"), ("test_accuracy", "test_accuracy")):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["round"], pytest.approx(line[key])) for line in lines]
    assert "terms/cross_entropy" in events.Tags()["scalars"]


def test_tensorboard_is_an_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["train", *JOB, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install -e '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
