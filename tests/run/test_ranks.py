"""Runs of torchrun have the bits of one process, whatever the number of ranks.

A start of torchrun loads torch once per rank: one start serves many runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import ROOT, environment
from run_folders import assert_same_results, lines_in, read_json

from semanticfl_ref import cli
from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.errors import RankLost
from semanticfl_ref.federated import ranks

JOBS = Path(__file__).with_name("rank_jobs.py")
COMMON = [
    *("--dataset", "digits", "--width", "2", "--threads", "1", "--local-epochs", "1"),
    *("--clients", "4", "--clients-per-round", "3", "--rounds", "3"),
]
SETTINGS = {
    "fedcda": ["--set", "fedcda.warm_up=1"],
    "feddifrc": ["--set", "feddifrc.keys=class-mean"],
    "scaffold": ["--set", "federation.server_optimizer=fedadam"],
    "fedprox": ["--set", "federation.aggregation=median"],
    "moon": ["--set", "model.batch_norm=local"],
}


def flags(method: str) -> list[str]:
    return [*COMMON, "--method", method, *SETTINGS.get(method, [])]


def torchrun(count: int, *program: str, **options) -> list[str]:
    """The command line that starts a program on ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc-per-node", str(count), *program]


def on_ranks(count: int, *jobs: list[str]) -> str:
    """Run command lines one after another on ranks; returns what they print on stderr."""
    done = subprocess.run(
        torchrun(count, str(JOBS), json.dumps(jobs)),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def alone(method: str, folder: Path) -> Path:
    assert cli.main(["train", *flags(method), "--out", str(folder)]) == 0
    return folder


def test_two_ranks_and_a_resume_in_one_process(tmp_path, capsys):
    """SCAFFOLD has state for clients and server, and here a server optimizer; the last round is
    run by one process."""
    whole, run = alone("scaffold", tmp_path / "one"), tmp_path / "two"
    job = ["train", *flags("scaffold"), "--rounds", "2", "--out", str(run)]
    text = on_ranks(2, job)
    assert text.count("training images") == 1, "rank 0 alone tells"
    assert read_json(run / "environment.json")["ranks"] == 2
    assert cli.main(["train", "--resume", str(run), "--rounds", "3"]) == 0
    assert_same_results(whole, run)


@pytest.mark.heavy
def test_every_method_on_two_and_three_ranks(tmp_path):
    """The first two rounds on two ranks, the third on three; and all three on three."""
    for count in (2, 3):
        jobs = [
            [
                "train",
                *flags(name),
                "--rounds",
                str(count),
                "--out",
                str(tmp_path / f"{count}-{name}"),
            ]
            for name in METHODS
        ]
        if count == 3:
            resumed = ["train", "--rounds", "3", "--resume"]
            jobs += [[*resumed, str(tmp_path / f"2-{name}")] for name in METHODS]
        on_ranks(count, *jobs)
    for name in METHODS:
        whole = alone(name, tmp_path / name)
        assert_same_results(whole, tmp_path / f"2-{name}")
        assert_same_results(whole, tmp_path / f"3-{name}")


@pytest.mark.heavy
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_and_the_run_goes_on(tmp_path, victim):
    run, many = tmp_path / "run", [*flags("scaffold"), "--rounds", "400"]
    command = torchrun(2, "-m", "semanticfl_ref", "train", *many, "--out", str(run))
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and lines_in(run) < 2:
        time.sleep(0.02)
    os.kill(rank_of(process.pid, victim), signal.SIGKILL)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    said = [line for line in text.splitlines() if line.startswith("semanticfl_ref: error")]
    assert len(said) == 1, text
    assert f"rank {victim} of 2 ended: killed in round " in said[0]
    assert "--resume" in said[0]
    rounds = lines_in(run)
    done = cli.main(["train", "--resume", str(run), "--rounds", str(rounds + 1)])
    assert done == 0
    whole = tmp_path / "whole"
    exact = [*flags("scaffold"), "--rounds", str(rounds + 1), "--out", str(whole)]
    assert cli.main(["train", *exact]) == 0
    assert_same_results(whole, run)


@pytest.mark.parametrize("error", [RankLost(ranks.REMEDY), KeyboardInterrupt()])
def test_a_signal_before_the_broken_connection(monkeypatch, error):
    """torchrun stops the other ranks: one that only waits gets an interrupt without words."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    store = dist.HashStore()
    store.set("doing/0", "killed in round 3, with clients 0, 3")
    with pytest.raises(RankLost, match=r"rank 0 of 2 ended: killed in round 3.*--resume$"):
        ranks._explain(error, store)


def rank_of(agent: int, number: int) -> int:
    """The process of a rank, among the children of torchrun."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for child in children:
        if f"\0RANK={number}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {number} among {children}")


def ended_at_once(count: int, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        torchrun(count, "-m", "semanticfl_ref", *arguments),
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("semanticfl_ref: error")]
    assert len(said) == 1, done.stderr
    return said[0]


@pytest.mark.heavy
def test_mistakes_are_one_line(tmp_path):
    out = ["--out", str(tmp_path / "run")]
    error = ended_at_once(3, "train", *flags("fedavg"), "--clients-per-round", "2", *out)
    assert "3 ranks for 2 clients per round" in error and "--nproc-per-node 2" in error
    error = ended_at_once(2, "compare", *out)
    assert "--workers" in error
    alone = tmp_path / "alone.py"
    alone.write_text(
        "import os\nif os.environ['RANK'] == '1':\n    raise ValueError('only here')\n"
    )
    error = ended_at_once(2, "train", "--import", str(alone), *flags("fedavg"), *out)
    assert "only here" in error
    differing = tmp_path / "differing.py"
    differing.write_text(
        "import os\n"
        "from semanticfl_ref.run import setup\n"
        "real = setup.load_data\n"
        "def load_data(config, **options):\n"
        "    data = real(config, **options)\n"
        "    object.__setattr__(data.dataset, 'sha256', os.environ['RANK'] * 64)\n"
        "    return data\n"
        "from semanticfl_ref.run import train\n"
        "train.load_data = load_data\n"
    )
    job = ["train", "--import", str(differing), *flags("fedavg"), *out]
    error = ended_at_once(2, *job)
    assert "rank 1 belongs to another run: data: '1111" in error
    assert "same versions, data and flags" in error
    assert not (tmp_path / "run").exists()
