"""A run that is killed, interrupted or out of disk goes on bit for bit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, command, environment

from semanticfl_ref import cli
from semanticfl_ref.run import train

RESULTS = ("checkpoint.safetensors", "metrics.jsonl")


def same_results(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"
    parts = [p.name for p in other.iterdir() if p.suffix in (".tmp", ".part")]
    assert not parts, f"half-written files stayed: {parts}"


def go_on(run: Path, job: list[str]) -> list[str]:
    """Arguments that start the run, or resume it once its folder is there."""
    return ["train", "--resume", str(run)] if run.exists() else ["train", *job, "--out", str(run)]


def lines_of(run: Path) -> int:
    return (
        (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
    )


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_the_run_folder(unbroken_run):
    expected = {
        "config.toml",
        "environment.json",
        "partition.json",
        "anchors.json",
        "metrics.jsonl",
        "timings.jsonl",
        "checkpoint.safetensors",
        "summary.json",
    }
    assert {p.name for p in unbroken_run.iterdir()} == expected
    rows = [json.loads(line) for line in (unbroken_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert all(
        0 <= row["test_accuracy"] <= 1 and not {"seconds", "time"} & set(row) for row in rows
    )
    assert json.loads((unbroken_run / "environment.json").read_text())["threads"] >= 1
    assert json.loads((unbroken_run / "summary.json").read_text())["rounds"] == 4


def test_killed_at_several_moments(tmp_path, job, unbroken_run):
    """SIGKILL, six times in one run: while it loads, as its folder appears, and in each round."""
    run, moments, kills = tmp_path / "run", random.Random(0), 0
    for wanted in (-1, 0, 1, 2, 3, 4):
        process = start(go_on(run, job))
        if wanted < 0:
            time.sleep(1.0)
        while (
            wanted >= 0
            and process.poll() is None
            and not (run.exists() and lines_of(run) >= wanted)
        ):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 5
    assert cli.main(go_on(run, job)) == 0
    same_results(unbroken_run, run)


@pytest.mark.heavy
def test_killed_at_random_moments(tmp_path, job, unbroken_run):
    """Twenty-five runs, each killed at a random moment after its loading, then resumed to its end."""
    moments = random.Random(1)
    for trial in range(25):
        (tmp_path / str(trial)).mkdir()
        run = tmp_path / str(trial) / "run"
        process = start(go_on(run, job))
        while process.poll() is None and not run.exists():
            time.sleep(0.001)
        time.sleep(moments.random() * 1.5)
        process.kill()
        process.communicate()
        assert cli.main(go_on(run, job)) == 0
        same_results(unbroken_run, run)


class Killed(BaseException):
    """Stands for the machine's end: nobody catches it."""


def test_killed_at_every_write(tmp_path, job, unbroken_run, monkeypatch):
    """In this process, at each flush and each rename of the run in turn: the write before it is on
    the disk, those after it are not.
    """
    run = tmp_path / "run"
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
    calls = {"left": 0}

    def dying(name):
        def call(*arguments):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise Killed
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, dying(name))
    deaths = 0
    for step in range(1, 200):
        calls["left"] = 9 if not run.exists() else 1 + step % 11
        try:
            assert cli.main(go_on(run, job)) == 0
            break
        except Killed:
            deaths += 1
    assert deaths >= 4
    for name in real:
        monkeypatch.setattr(os, name, real[name])
    same_results(unbroken_run, run)


def test_an_interrupted_run_goes_on(tmp_path, job, unbroken_run, monkeypatch, capsys):
    """Ctrl-C in the third round, with no checkpoint due before the last: two rounds are saved."""
    from semanticfl_ref.run import train

    run, real = tmp_path / "run", train.run_round

    def interrupting(state, context):
        if state.round == 2:
            raise KeyboardInterrupt
        return real(state, context)

    monkeypatch.setattr(train, "run_round", interrupting)
    assert cli.main([*go_on(run, job), "--set", "run.checkpoint_every=4"]) == 130
    assert "interrupted after round 2 of 4" in capsys.readouterr().err
    monkeypatch.setattr(train, "run_round", real)
    assert cli.main(go_on(run, job)) == 0
    same_results(unbroken_run, run)


def test_interrupted(tmp_path, job):
    """Ctrl-C in a process of its own: a checkpoint, one line that says how to go on, exit 130."""
    run = tmp_path / "run"
    many = [*job, "--set", "run.checkpoint_every=1000", "--rounds", "400"]
    process = start(["train", *many, "--out", str(run)])
    while process.poll() is None and lines_of(run) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    words = process.communicate()[1].decode()
    assert process.returncode == 130, words
    assert "Traceback" not in words and f"--resume {run}" in words.splitlines()[-1]
    assert (run / "checkpoint.safetensors").exists()


def test_disk_full_while_saving(tmp_path, job, unbroken_run, monkeypatch, capsys):
    """The second checkpoint does not fit: exit 3 names the file, the first survives, and a resume
    reaches the same end.
    """
    run, real, saves = tmp_path / "run", os.fsync, []

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("checkpoint.safetensors.part"):
            saves.append(handle)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(go_on(run, job)) == 3
    err = capsys.readouterr().err
    assert "checkpoint.safetensors: No space left on device" in err and "Traceback" not in err
    assert cli.main(go_on(run, job)) == 0
    same_results(unbroken_run, run)


def test_disk_full_while_the_folder_is_made(tmp_path, job, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(go_on(tmp_path / "run", job)) == 3
    assert "No space left" in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_a_finished_run_is_left_alone(unbroken_run, capsys):
    before = {p.name: p.read_bytes() for p in unbroken_run.iterdir()}
    assert cli.main(["train", "--resume", str(unbroken_run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "finished" in err and json.loads(out)["rounds"] == 4
    assert before == {p.name: p.read_bytes() for p in unbroken_run.iterdir()}


@pytest.fixture
def unfinished(tmp_path, unbroken_run):
    """A copy of the unbroken run without its summary: it counts as killed just before its end."""
    run = tmp_path / "run"
    shutil.copytree(unbroken_run, run)
    (run / "summary.json").unlink()
    return run


def test_the_summary_of_a_run_that_was_killed_just_before_it(unfinished, unbroken_run):
    """The confusion matrix comes from the final row, whether or not a round was played in this
    session.
    """
    assert cli.main(["train", "--resume", str(unfinished)]) == 0
    here, there = (
        json.loads((run / "summary.json").read_text()) for run in (unfinished, unbroken_run)
    )
    assert {**here, "folder": there["folder"]} == there and here["rounds"] == 4
    last = json.loads((unfinished / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        [row[c] / sum(row) for c, row in enumerate(there["confusion"])]
        == last["class_accuracy"]
        == there["class_accuracy"]
    )


def test_flags_that_contradict_the_run(unfinished, capsys):
    assert (
        cli.main(["train", "--resume", str(unfinished), "--seed", "0", "--set", "model.width=3"])
        == 4
    )
    assert "model.width = 2 there, 3 here" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration(unfinished, capsys):
    text = (unfinished / "config.toml").read_text()
    (unfinished / "config.toml").write_text(
        text.replace("width = 2", "width = 3").replace("tau = 0.05", "tau = 0.06")
    )
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    err = capsys.readouterr().err
    assert "model.width" in err and "semantic.tau" in err


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint(unfinished, capsys, damage):
    path = unfinished / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-7])
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    assert "damaged" in capsys.readouterr().err


def test_metrics_that_lost_a_line(unfinished, capsys):
    path = unfinished / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_run_goes_on_when_its_images_have_moved(tmp_path, job, monkeypatch, capsys):
    """Flags beside --resume may say where things lie now; the content is what must agree."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    for c, name in enumerate(("cat", "dog", "eel")):
        (images / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (32, 32), (40 * c + i, 60, 90)).save(images / name / f"{i}.png")
    run, given = str(tmp_path / "run"), [*job, "--dataset", "folder", "--alpha", "5"]
    monkeypatch.setattr(
        train, "play", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("stopped"))
    )
    assert cli.main(["train", *given, "--data-dir", str(images), "--out", run]) == 130
    monkeypatch.undo()
    images.rename(tmp_path / "elsewhere")
    assert cli.main(["train", "--resume", run]) == 3, "they are no longer where the run found them"
    assert cli.main(["train", "--resume", run, "--alpha", "6"]) == 4
    assert cli.main(["train", "--resume", run, "--data-dir", str(tmp_path / "elsewhere")]) == 0
    capsys.readouterr()
