"""One client of five is hostile in every round: what its models do to the others' federation."""

import json
from pathlib import Path

import pytest
from campaign.children import Done, classified, run
from hostile_clients import ATTACKS, install
from processes import JOB

pytestmark = pytest.mark.heavy

FIVE = [*JOB, "--scenario", "iid", "--clients", "5", "--clients-per-round", "5", "--rounds", "6"]
FIVE += ["--width", "4", "--local-epochs", "2", "--lr", "0.05", "--batch-size", "16"]
FIVE += ["--set", "data.image_size=16"]
DEFENCES = {
    "median": ["--set", "federation.aggregation=median"],
    "trimmed-mean": ["--set", "federation.aggregation=trimmed-mean"],
    "multi-krum": ["--set", "federation.aggregation=multi-krum"],
    "clipping": ["--set", "server.clip_norm=3"],
    "none": [],
    "none, fedadam": ["--set", "federation.server_optimizer=fedadam"],
}
UNSEEN = "opposite"  # no larger than honest updates may be: only a defence helps
KEPT = 0.5  # of the honest run's accuracy, at least, under a defence


def accuracy(path: Path) -> float:
    return 100 * json.loads((path / "summary.json").read_text())["test_accuracy"]


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_hostile_fifth(tmp_path, tally, defence):
    """Under a defence the federation learns on; without one the run ends by name, or warns."""
    flags = [*FIVE, *DEFENCES[defence], "--set", "federation.non_finite=drop"]
    assert run(["train", *flags, "--out", str(tmp_path / "honest")]).code == 0
    honest, row = accuracy(tmp_path / "honest"), tally(f"hostile client, {defence}")
    for name in ATTACKS:
        if name == "honest" or (defence.startswith("none") and name == UNSEEN):
            continue
        path = tmp_path / name
        done = run(["train", *flags, "--out", str(path)], lambda name=name: install(name))
        row.add(judged(done, path, honest), f"{name}: {done.told[-300:]}, honest {honest:.1f}")
    row.check(len(ATTACKS) - 2)


def judged(done: Done, path: Path, honest: float) -> str:
    """Of a run: "harmless", "named" by an error or a warning, or "silent"."""
    if done.code != 0:
        return classified(done, False, "round ")
    if accuracy(path) >= KEPT * honest:
        return "harmless"
    summary = json.loads((path / "summary.json").read_text())
    return "named" if any("client 2" in text for text in summary["warnings"]) else "silent"
