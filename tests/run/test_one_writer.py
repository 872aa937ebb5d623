"""One process writes into a run folder, and what it tells does not matter to it."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT, start_cli
from run_folders import assert_same_results, lines_in

from semanticfl_ref import cli
from semanticfl_ref.run import folder


def test_a_second_writer_is_refused(tmp_path, job, capsys):
    run = tmp_path / "run"
    process = start_cli("train", *job, "--rounds", "400", "--out", str(run))
    while process.poll() is None and lines_in(run) < 1:
        time.sleep(0.01)
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert f"another process trains in {run}" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    process.communicate()
    lines = [json.loads(line)["round"] for line in (run / "metrics.jsonl").open()]
    assert lines == list(range(1, len(lines) + 1))


def test_another_configuration_before_the_first_checkpoint(unfinished, capsys):
    """The identity is compared from the first moment on."""
    (unfinished / "checkpoint.safetensors").unlink()
    config = unfinished / "config.toml"
    # The first one is that of the section federation.
    config.write_text(config.read_text().replace("momentum = 0.9\n", "momentum = 0.5\n", 1))
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    error = capsys.readouterr().err
    assert "identity.json belongs to another run" in error
    assert "federation.momentum: 0.9 there, 0.5 here" in error


@pytest.mark.parametrize("name", [*folder.RESULTS, "summary.json"])
def test_a_finished_run_is_sealed(tmp_path, unbroken_run, capsys, name):
    """A blank in any of the files that it is judged by: report, export and resume say so."""
    run = tmp_path / "run"
    shutil.copytree(unbroken_run, run)
    text = (run / name).read_text()
    damaged = text.replace('"rounds": 4', '"rounds": 5') if name == "summary.json" else f"{text} "
    (run / name).write_text(damaged)
    for command in (
        ["report"],
        ["export", "--out", str(tmp_path / "m.pt2")],
        ["train", "--resume"],
    ):
        assert cli.main([*command, str(run)]) == 4, command
        assert f"{run / name} was changed: restore it" in capsys.readouterr().err
    assert not (run / "report.html").exists() and not (tmp_path / "m.pt2").exists()


def test_lines_before_the_checkpoint_are_sealed(unfinished, capsys):
    metrics = unfinished / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"round": 2', '"round": 2 '))
    assert cli.main(["train", "--resume", str(unfinished)]) == 4
    assert f"{metrics} was changed: restore it" in capsys.readouterr().err


def test_sigterm_saves_as_ctrl_c_does(tmp_path, job, unbroken_run):
    run = tmp_path / "run"
    process = start_cli("train", *job, "--set", "run.checkpoint_every=1000", "--out", str(run))
    while process.poll() is None and lines_in(run) < 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[1]
    assert process.returncode == 143, text
    assert "interrupted and saved after round" in text
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert_same_results(unbroken_run, run)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "redirect",
    [
        "2>&1 | head -c 250",
        "2>&-",
        ">&- 2>&-",
        "> /dev/full",
        "2> /dev/full",
    ],
)
def test_a_stream_that_fails_is_given_up(tmp_path, job, unbroken_run, redirect):
    """Training, checkpoint and exit code are what they would have been."""
    run = tmp_path / "run"
    words = shlex.join([sys.executable, "-m", "semanticfl_ref", "train", *job, "--out", str(run)])
    command = f"set -o pipefail; {words} {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert_same_results(unbroken_run, run)
    assert (run / "summary.json").exists()


def test_an_empty_folder_is_taken(tmp_path, job, unbroken_run):
    run = tmp_path / "run"
    run.mkdir()
    assert cli.main(["train", *job, "--out", str(run)]) == 0
    assert_same_results(unbroken_run, run)
