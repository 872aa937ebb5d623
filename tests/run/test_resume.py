"""A run that is killed, interrupted or out of disk space continues bitwise."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import start_cli
from run_folders import assert_same_results, lines_in, read_json, start_or_resume

from semanticfl_ref import cli
from semanticfl_ref.run import train as train_module
from semanticfl_ref.storage import load_tensors, save_tensors


def test_the_run_folder(unbroken_run):
    expected = {
        *("config.toml", "environment.json", "identity.json", "partition.json", "anchors.json"),
        *("metrics.jsonl", "timings.jsonl", "checkpoint.safetensors", "summary.json"),
    }
    assert {p.name for p in unbroken_run.iterdir()} == expected
    rounds = [
        json.loads(line) for line in (unbroken_run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    for line in rounds:
        assert 0 <= line["test_accuracy"] <= 1
        assert not {"seconds", "time"} & set(line)
    assert read_json(unbroken_run / "summary.json")["rounds"] == 4


def test_the_environment_says_where_when_and_of_what_commit(unbroken_run):
    environment = read_json(unbroken_run / "environment.json")
    assert environment["threads"] >= 1
    assert environment["command"].startswith("python -m semanticfl_ref train --dataset digits")
    assert environment["date"].startswith("20")
    assert environment["processor"]
    assert set(environment["versions"]) >= {"torch", "diffusers", "triton"}
    assert environment["commit"] is None or len(environment["commit"].split("+")[0]) == 40


@pytest.mark.heavy
def test_killed_at_several_moments(tmp_path, job, unbroken_run):
    """SIGKILL, six times in one run: while it loads, as its folder appears, and in each round."""
    run, moments, kills = tmp_path / "run", random.Random(0), 0
    for wanted in (-1, 0, 1, 2, 3, 4):
        process = start_cli(*start_or_resume(run, job))
        if wanted < 0:
            time.sleep(1.0)
        else:
            while process.poll() is None and (not run.exists() or lines_in(run) < wanted):
                time.sleep(0.001)
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 5
    assert cli.main(start_or_resume(run, job)) == 0
    assert_same_results(unbroken_run, run)


class Killed(BaseException):
    """Stands for the end of the machine: no code catches it."""


@pytest.mark.heavy
def test_killed_at_every_write(tmp_path, job, unbroken_run, monkeypatch):
    """In this process, at each flush and each rename of the run in turn: the write before it is on
    disk, those after it are not."""
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
            assert cli.main(start_or_resume(run, job)) == 0
            break
        except Killed:
            deaths += 1
    assert deaths >= 4
    for name in real:
        monkeypatch.setattr(os, name, real[name])
    assert_same_results(unbroken_run, run)


def interrupt_before_round(monkeypatch, number):
    """Ctrl-C as round `number` starts."""
    real = train_module.run_round

    def interrupting(state, context):
        if state.round == number - 1:
            raise KeyboardInterrupt
        return real(state, context)

    monkeypatch.setattr(train_module, "run_round", interrupting)


def test_an_interrupted_run_continues(tmp_path, job, unbroken_run, monkeypatch, capsys):
    """Ctrl-C in the third round, with no checkpoint due before the last: two rounds are saved."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 3)
        rare = ["--set", "run.checkpoint_every=4"]
        assert cli.main([*start_or_resume(run, job), *rare]) == 130
    assert "saved after round 2 of 4" in capsys.readouterr().err
    assert cli.main(start_or_resume(run, job)) == 0
    assert_same_results(unbroken_run, run)


def test_a_resumed_run_records_both_environments(tmp_path, job, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 3)
        assert cli.main(start_or_resume(run, job)) == 130
    first = read_json(run / "environment.json")
    changed = {**first, "device": "another"}
    (run / "environment.json").write_text(json.dumps(changed))
    assert cli.main(start_or_resume(run, job)) == 0
    assert "device changed; resumed results may differ" in capsys.readouterr().err
    now = read_json(run / "environment.json")
    assert now["earlier"] == [{**changed, "last_round": 2}]
    assert now["device"] == first["device"]
    assert now["date"] >= first["date"]


def test_interrupted(tmp_path, job):
    """Ctrl-C in a process of its own: a checkpoint, one line on how to continue, exit 130."""
    run = tmp_path / "run"
    many = [*job, "--set", "run.checkpoint_every=1000", "--rounds", "400"]
    process = start_cli("train", *many, "--out", str(run))
    while process.poll() is None and lines_in(run) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[1]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert f"--resume {run}" in text.splitlines()[-1]
    assert (run / "checkpoint.safetensors").exists()


def test_disk_full_while_saving(tmp_path, job, unbroken_run, monkeypatch, capsys):
    """The second checkpoint does not fit: exit 3 names the file, the first survives, and a resume
    reaches the same end."""
    run, real, saves = tmp_path / "run", os.fsync, []

    def full(handle):
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        if name.startswith("checkpoint.safetensors.") and name.endswith(".part"):
            saves.append(handle)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(start_or_resume(run, job)) == 3
    err = capsys.readouterr().err
    assert "checkpoint.safetensors: No space left on device" in err
    assert "Traceback" not in err
    assert cli.main(start_or_resume(run, job)) == 0
    assert_same_results(unbroken_run, run)


def test_disk_full_while_the_folder_is_made(tmp_path, job, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(start_or_resume(tmp_path / "run", job)) == 3
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_finished_run_is_left_alone(unbroken_run, capsys):
    before = {p.name: p.read_bytes() for p in unbroken_run.iterdir()}
    assert cli.main(["train", "--resume", str(unbroken_run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "finished" in err
    assert json.loads(out)["rounds"] == 4
    assert before == {p.name: p.read_bytes() for p in unbroken_run.iterdir()}


def test_a_finished_run_is_extended(tmp_path, job, unbroken_run, capsys):
    """To the bits of a run that had as many rounds from the start."""
    run = tmp_path / "run"
    assert cli.main([*start_or_resume(run, job), "--rounds", "2"]) == 0
    assert cli.main(["train", "--resume", str(run), "--rounds", "4"]) == 0
    assert_same_results(unbroken_run, run)
    assert (run / "config.toml").read_text() == (unbroken_run / "config.toml").read_text()
    assert read_json(run / "summary.json")["rounds"] == 4
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert cli.main(["train", "--resume", str(run), "--rounds", "3"]) == 2
    assert "has 4 rounds already: --rounds 3 is fewer" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}


def test_a_finished_run_that_was_moved_is_shown_where_it_is(unbroken_run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(unbroken_run, moved)
    assert cli.main(["train", "--resume", str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(moved)


def test_a_configuration_that_nobody_knows(unfinished, capsys):
    """The hint at --import replaces a guess at another name, and is not given for other damage."""
    file = unfinished / "config.toml"
    text = file.read_text()
    file.write_text(f"{text}\n[featnorm]\nmu = 0.5\n")
    assert cli.main(["train", "--resume", str(unfinished)]) == 3
    error = capsys.readouterr().err
    assert f"{file}: unknown setting 'featnorm.mu'; restore the file, or if a file" in error
    assert "did you mean" not in error
    file.write_text("not TOML")
    assert cli.main(["train", "--resume", str(unfinished)]) == 3
    error = capsys.readouterr().err
    assert "is not TOML" in error and "--import" not in error


def test_the_mean_of_the_last_rounds_says_how_many(unbroken_run, capsys):
    """Four rounds have no last five."""
    assert cli.main(["train", "--resume", str(unbroken_run)]) == 0
    out = capsys.readouterr().out
    assert "mean of the last 4 " in out
    assert "last 5" not in out


def test_the_summary_of_a_run_that_was_killed_just_before_it(unfinished, unbroken_run):
    """The confusion matrix is the final model's, whether or not a round ran in this process."""
    assert cli.main(["train", "--resume", str(unfinished)]) == 0
    here, there = (read_json(run / "summary.json") for run in (unfinished, unbroken_run))
    differing = {name for name in there if here[name] != there[name]}
    assert differing == {"folder", "sealed", "sha256"}, "its environment is another one"
    assert here["rounds"] == 4
    last = json.loads((unfinished / "metrics.jsonl").read_text().splitlines()[-1])
    diagonal = [row[c] / sum(row) for c, row in enumerate(there["confusion"])]
    assert diagonal == last["class_accuracy"] == there["class_accuracy"]


def test_flags_that_contradict_the_run(unfinished, capsys):
    changed = ["--seed", "0", "--width", "3"]
    assert cli.main(["train", "--resume", str(unfinished), *changed]) == 4
    assert "model.width = 2 there, 3 here" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration(unfinished, capsys):
    text = (unfinished / "config.toml").read_text()
    text = text.replace("width = 2", "width = 3").replace("tau = 0.05", "tau = 0.06")
    (unfinished / "config.toml").write_text(text)
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    err = capsys.readouterr().err
    assert "model.width" in err
    assert "semanticfl.tau" in err


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


def test_a_run_continues_when_its_images_have_moved(tmp_path, job, monkeypatch, capsys):
    """Flags beside --resume may say where things are now; the content must agree."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    images, run = tmp_path / "images", str(tmp_path / "run")
    for c, name in enumerate(("cat", "dog", "eel")):
        (images / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (32, 32), (40 * c + i, 60, 90)).save(images / name / f"{i}.png")
    given = [*job, "--dataset", "image_folder", "--alpha", "5"]
    with monkeypatch.context() as patch:
        interrupt_before_round(patch, 1)
        assert cli.main(["train", *given, "--data-dir", str(images), "--out", run]) == 130
    images.rename(tmp_path / "elsewhere")
    assert cli.main(["train", "--resume", run]) == 3, "they are no longer where the run found them"
    assert cli.main(["train", "--resume", run, "--alpha", "6"]) == 4
    assert cli.main(["train", "--resume", run, "--data-dir", str(tmp_path / "elsewhere")]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "change",
    [
        {"round": 10**9},
        {"round": -1},
        {"round": "2"},
        {"round": 2.5},
        {"params": torch.zeros(3)},
        {"batch_norm": torch.zeros(7, 7)},
    ],
)
def test_a_crafted_checkpoint_with_a_right_digest(unfinished, capsys, change):
    path = unfinished / "checkpoint.safetensors"
    tensors, about, _ = load_tensors(path)
    of_tensors = {name: value for name, value in change.items() if name in tensors}
    save_tensors(path, tensors | of_tensors, about | (change if not of_tensors else {}))
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    assert str(unfinished) in capsys.readouterr().err


def test_what_only_informs_stops_no_run(unfinished, unbroken_run):
    """Damaged, it is written again or left out."""
    for name in ("environment.json", "timings.jsonl", "partition.json", "anchors.json"):
        (unfinished / name).write_text("{damaged")
    assert cli.main(["train", "--resume", str(unfinished)]) == 0
    assert_same_results(unbroken_run, unfinished)
    for name in ("partition.json", "anchors.json"):
        assert (unfinished / name).read_bytes() == (unbroken_run / name).read_bytes()


def test_a_number_of_rounds_that_was_changed(unfinished, capsys):
    """It is no part of the identity, since a run may be extended."""
    file = unfinished / "config.toml"
    file.write_text(file.read_text().replace("rounds = 4", "rounds = 5"))
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    assert f"{file} was changed" in capsys.readouterr().err


def test_a_state_that_exceeds_the_memory(tmp_path, job, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "memory", lambda: 1 << 16)
    many = [*job, "--method", "scaffold", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *many]) == 2
    assert "scaffold with 3 clients needs 209.4 KiB of memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
