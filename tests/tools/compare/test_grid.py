"""The plan of a grid, and running it: reuse, resume, failures with the run's own words."""

import json
import signal
import subprocess
import threading
import time

import pytest
from processes import JOB, ROOT, command, environment, run_cli

from semanticfl_ref import cli
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.tools.compare import grid


def settle(cell):
    return config.build(cell)


def test_arms_and_scenarios_as_they_are_written():
    assert grid.split("fedavg, semanticfl[semantic.tau=0.1;anchors.control=random],moon") == [
        "fedavg",
        "semanticfl[semantic.tau=0.1;anchors.control=random]",
        "moon",
    ]
    assert grid.arm_settings("moon[moon.mu=5; moon.tau=1]") == {
        "federation.method": "moon",
        "moon.mu": "5",
        "moon.tau": "1",
    }
    assert grid.scenario_settings("nid1:0.1") == {
        "partition.scenario": "nid1",
        "partition.alpha": "0.1",
    }
    assert grid.scenario_settings("nid2") == {"partition.scenario": "nid2", "partition.clients": 6}
    assert grid.scenario_settings("nid2[partition.clients=7]")["partition.clients"] == "7"


def test_plan_is_seed_by_seed_and_names_each_run_once(tmp_path):
    jobs = grid.plan(
        ["fedavg", "moon", "moon[moon.mu=5]"], ["iid", "nid1:0.1"], 2, settle, tmp_path
    )
    assert [job.seed for job in jobs] == [0] * 6 + [1] * 6 and len(
        {job.folder for job in jobs}
    ) == 12
    assert (
        jobs[5].config.moon.mu == 5
        and jobs[5].config.partition.alpha == 0.1
        and jobs[5].config.run.seed == 0
    )


@pytest.mark.parametrize(
    "arms, scenarios, words",
    [
        (["fedavg", "fedavg"], ["iid"], "stands twice"),
        (["fedavgg"], ["iid"], "'fedavg'"),
        (["fedavg"], ["nid3"], "'nid"),
        (["fedavg"], ["iid:3"], "takes no number"),
        (["moon[moon.mu]"], ["iid"], "no assignment"),
        (["moon[moon.mue=1]"], ["iid"], "'moon.mu'"),
        (["moon[moon.mu=1"], ["iid"], "expected name"),
        (["fedavg"], ["nid1:x"], "a number"),
        (["moon[moon.mu=5]", "moon[moon.mu=5;]"], ["iid"], "stands twice"),
    ],
)
def test_refusals(arms, scenarios, words, tmp_path):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        grid.plan(arms, scenarios, 1, settle, tmp_path)


def test_a_folder_of_other_settings_is_refused(finished_grid, tmp_path):
    jobs = finished_grid({"fedavg": {"iid": [[0.5]]}})
    other = grid.plan(
        ["fedavg"],
        ["iid"],
        1,
        lambda cell: config.build(
            {"federation.rounds": 1, "data.name": "digits", "federation.learning_rate": 0.5, **cell}
        ),
        tmp_path,
    )
    grid.run(jobs, workers=1, offline=True, methods=[])  # finished: nothing to do
    with pytest.raises(MismatchError, match="federation.learning_rate = 0.1 there, 0.5 here"):
        grid.run(other, workers=1, offline=True, methods=[])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--workers", "0"], "--workers 0"),
        (["--baseline", "moon"], "--baseline 'moon'"),
        (["--method", "fedavg"], "--methods"),
        (["--seed", "3"], "--seeds"),
        (["--scenario", "iid"], "--scenarios"),
        (["--methods", ""], "--baseline"),
        (["--set", "run.seed=3"], "--seeds"),
        (["--set", "federation.method=moon"], "--methods"),
        (["--dataset", "cifar10", "--part", "validation"], "data.validation_share"),
    ],
)
def test_bad_flags(capsys, arguments, words, tmp_path):
    assert cli.main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_a_cell_is_wins_over_flags_and_set(tmp_path, monkeypatch):
    """An arm named by a setting has it; what the file says of threads is kept."""
    planned = []

    def stop(jobs, **_):
        planned.extend(jobs)
        raise UserError("planned")

    monkeypatch.setattr(grid, "run", stop)
    (tmp_path / "own.toml").write_text("[run]\nthreads = 1\n")
    own = [
        "--set",
        "semantic.tau=0.1",
        "--set",
        "partition.clients=10",
        "--config",
        str(tmp_path / "own.toml"),
        "--workers",
        "2",
    ]
    assert (
        cli.main(
            [
                "compare",
                "--methods",
                "semanticfl,semanticfl[semantic.tau=0.5]",
                "--scenarios",
                "nid2",
                "--seeds",
                "2",
                "--out",
                str(tmp_path),
                *own,
            ]
        )
        == 2
    )
    assert [job.config.semantic.tau for job in planned] == [0.1, 0.5] * 2 and [
        job.config.run.seed for job in planned
    ] == [0, 0, 1, 1]
    assert {(job.config.partition.clients, job.config.run.threads) for job in planned} == {(6, 1)}


def test_all_that_failed_is_told(tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=10)

    def fail(job, *_):
        both.wait()
        raise UserError(f"{job.arm} failed")

    monkeypatch.setattr(grid, "_train", fail)
    jobs = grid.plan(["fedavg", "moon"], ["iid"], 2, settle, tmp_path)
    with pytest.raises(
        UserError, match="fedavg failed; and moon failed|moon failed; and fedavg failed"
    ):
        grid.run(jobs, workers=2, offline=True, methods=[])


def test_a_killed_run_is_told_as_such(tmp_path):
    (job,) = grid.plan(["fedavg"], ["iid"], 1, settle, tmp_path)
    with pytest.raises(UserError, match="seed 0 failed: killed by signal 9"):
        grid._train(job, True, [], lambda child: child.kill())


def test_interrupted_compare_saves_and_goes_on(tmp_path):
    """SIGINT to `compare` alone: its run ends with a checkpoint, no other begins, and the same
    command goes on with it.
    """
    job = [flag for flag in JOB if flag not in ("--method", "fedavg", "--rounds", "4")] + [
        "--rounds",
        "10",
        "--seeds",
        "1",
        "--json",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command("compare", "--methods", "fedavg,moon", *job),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(tmp_path.glob("runs/fedavg*/checkpoint.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert (
        process.returncode == 130
        and "Traceback" not in said
        and "go on: give the same command again" in said.splitlines()[-1]
    )
    (folder,) = tmp_path.glob("runs/[a-z]*")
    assert (folder / "checkpoint.safetensors").exists() and not (folder / "summary.json").exists()
    begun = (folder / "metrics.jsonl").read_bytes()
    again = run_cli("compare", "--methods", "fedavg", *job)
    assert again.returncode == 0 and (folder / "metrics.jsonl").read_bytes().startswith(begun), (
        again.stderr
    )


def test_compare_from_end_to_end(tmp_path):
    """Two arms of a small job: tables and numbers; the second call trains nothing; a run that fails
    gives its words and its code.
    """
    job = [flag for flag in JOB if flag not in ("--method", "fedavg")] + [
        "--rounds",
        "2",
        "--seeds",
        "1",
        "--json",
        "--out",
        str(tmp_path),
    ]
    first = run_cli("compare", "--methods", "fedavg,fedprox[fedprox.mu=0]", *job)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert [cell["gain"] and cell["gain"]["values"] for cell in result["cells"]] == [None, [0.0]], (
        "FedProx without its term is FedAvg"
    )
    assert {"compare.md", "compare.csv", "compare.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert "python -m semanticfl_ref compare" in (tmp_path / "compare.md").read_text()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}
    again = run_cli("compare", "--methods", "fedavg,fedprox[fedprox.mu=0]", *job)
    assert (
        json.loads(again.stdout) == result
        and {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")} == before
    )
    failing = run_cli("compare", "--methods", "fedavg[federation.learning_rate=1e30]", *job)
    assert (
        failing.returncode == 6
        and "federation.learning_rate=1e30" in failing.stderr.splitlines()[-1]
        and "NaN" in failing.stderr.splitlines()[-1]
    )
