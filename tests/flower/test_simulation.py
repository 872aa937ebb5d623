"""Flower's simulation engine gives the bits of `train`, and names the client that fails."""

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flower_processes import flwr_run, superlink

from semanticfl_ref import cli
from semanticfl_ref.run.trained import load_model
from semanticfl_ref.storage import load_tensors

pytestmark = pytest.mark.heavy

FEDERATION = ["--federation-config", "num-supernodes=3 client-resources-num-cpus=1"]
COMMON = [
    *("--dataset", "digits", "--width", "2", "--threads", "1", "--local-epochs", "1"),
    *("--clients", "3", "--clients-per-round", "2", "--rounds", "2"),
]
# Fails in round 2 with client 1, otherwise than with NaN.
FAULT = """
from semanticfl_ref.errors import DataError
from semanticfl_ref.federated import replicas
real = replicas.train_client
def train_client(update, replica):
    if (update.client, update.round) == (1, 2):
        raise DataError("cannot read image 7")
    return real(update, replica)
replicas.train_client = train_client
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flower")
    with superlink(folder, "--simulation"):
        yield folder


def results(folder: Path) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_tensors(folder / "checkpoint.safetensors")[0]


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold", "moon", "semanticfl"])
def test_the_bits_of_train(home, tmp_path, method):
    flags, out, whole = [*COMMON, "--method", method], tmp_path / "flower", tmp_path / "train"
    log = flwr_run(home, flags, out, *FEDERATION)
    assert (out / "summary.json").exists(), log
    assert "deprecated" not in log.lower(), log
    assert cli.main(["train", *flags, "--out", str(whole)]) == 0
    lines, tensors = results(out)
    expected_lines, expected = results(whole)
    assert lines == expected_lines
    assert (tensors["params"] == expected["params"]).all()
    assert all((tensors[name] == expected[name]).all() for name in tensors)
    load_model(out)  # other commands read the folder


def test_a_client_that_fails_is_named_or_dropped(home, tmp_path):
    fault = tmp_path / "fault.py"
    fault.write_text(FAULT)
    flags = [*COMMON, "--method", "fedavg", "--clients-per-round", "3", "--import", str(fault)]
    log = flwr_run(home, flags, tmp_path / "stop", *FEDERATION)
    assert "round 2, client 1 (node " in log
    assert "cannot read image 7; federation.non_finite=drop goes on without it" in log
    assert len(results(tmp_path / "stop")[0]) == 1
    dropping = [*flags, "--set", "federation.non_finite=drop"]
    flwr_run(home, dropping, tmp_path / "drop", *FEDERATION)
    assert [line["dropped"] for line in results(tmp_path / "drop")[0]] == [[], [1]]


def test_a_federation_of_another_size(home, tmp_path):
    flags = [*COMMON, "--method", "fedavg", "--clients", "4"]
    log = flwr_run(home, flags, tmp_path / "out", *FEDERATION, timeout=3)
    assert "3 SuperNodes for 4 clients" in log
    assert not (tmp_path / "out").exists()
