"""What is settled before the first round: held-out images, identity, sizes; and SemanticFL from end to end on the embedded model."""

import json
from pathlib import Path

import pytest
import torch
from processes import ROOT

from semanticfl_ref import cli, config, prepare
from semanticfl_ref.errors import UserError

TINY = ROOT / "semanticfl_ref" / "diffusion" / "tiny" / "unet"
needs_tiny = pytest.mark.skipif(not TINY.is_dir(), reason="the embedded diffusion model is not in this checkout")


@pytest.fixture(scope="module")
def digits():
    return prepare.load_data(config.build({"data.name": "digits"}), offline=True)[0]


def test_held_out_images_leave_the_clients(digits):
    rest, held = prepare.take_out(digits, 7, seed=0)
    assert torch.bincount(held.train_labels).tolist() == [7] * 10
    assert len(rest.train_labels) + len(held.train_labels) == len(digits.train_labels)
    both = torch.cat([rest.train_images, held.train_images]).flatten(1).unique(dim=0)
    assert len(both) == len(digits.train_images.flatten(1).unique(dim=0)), "an image was lost or copied"
    assert len({digits.sha256, rest.sha256, held.sha256}) == 3
    assert torch.equal(rest.test_images, digits.test_images)
    again = prepare.take_out(digits, 7, seed=0)[1]
    assert torch.equal(again.train_images, held.train_images) and again.sha256 == held.sha256


def test_held_out_images_must_leave_some(digits):
    with pytest.raises(UserError, match="heldout:1000"):
        prepare.take_out(digits, 1000, seed=0)
    assert prepare.take_out(digits, 0, seed=0) == (digits, None)


def test_identity_knows_contents_and_not_paths(digits):
    def identity(**settings):
        c = config.build({"data.name": "digits", "federation.method": "fedavg"} | settings)
        dataset, partition, _ = prepare.load_data(c, offline=True)
        return prepare.identity_of(c, dataset, partition, None)

    first = identity()
    assert identity(**{"run.checkpoint_every": 5, "diffusion.source": "elsewhere"}) == first
    for name, value in {"run.seed": 1, "federation.learning_rate": 0.5, "anchors.images": "heldout:3"}.items():
        assert identity(**{name: value}) != first, name
    json.dumps(first)


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_dry_run_says_what_a_run_does(method, job, tmp_path):
    everyone = [*job, "--method", method, "--clients-per-round", "3", "--rounds", "1"]
    assert cli.main(["train", *everyone, "--out", str(tmp_path / "run")]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    sizes = prepare.dry_run(cli.settle(cli.parse(["train", *everyone])))
    assert (sizes["steps_per_round"], sizes["bytes_down_per_round"], sizes["bytes_up_per_round"]) == (row["steps"], row["bytes_down"], row["bytes_up"])


@needs_tiny
def test_semanticfl_from_end_to_end(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    flags = [*job, "--method", "semanticfl", "--rounds", "2", "--offline", "--json"]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "one")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["anchors"]["server_saw"] == "every client's training images" and summary["anchors"]["per"] == "image"
    assert set(summary["gradient_share"]) == {"cross_entropy", "consistency", "contrast"}
    assert not any("stand-in" in text for text in summary["warnings"])
    assert cli.main(["train", *flags, "--out", str(tmp_path / "two")]) == 0, "the bank comes from the cache now"
    for name in ("metrics.jsonl", "checkpoint.safetensors", "anchors.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert cli.main(["train", *flags, "--anchor-images", "heldout:20", "--out", str(tmp_path / "held")]) == 0
    written = json.loads((tmp_path / "held" / "anchors.json").read_text())
    assert (written["per"], written["images"], written["image_count"]) == ("class", "heldout:20", 200)


@needs_tiny
def test_a_stand_in_is_said_to_be_one(job, tmp_path, monkeypatch, capsys):
    from PIL import Image

    for part, name, grey in [(p, n, g) for p in ("train", "test") for n, g in (("cat", 60), ("dog", 190))]:
        folder = tmp_path / "images" / part / name
        folder.mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (32, 32), (grey + i, grey, grey - i)).save(folder / f"{i}.png")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    given = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--method", "semanticfl", "--sd", "tiny", "--alpha", "5", "--rounds", "1", "--json"]
    assert cli.main(["train", *job, *given, "--set", "anchors.width=8", "--out", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)["warnings"]
    assert any("stand-in" in text for text in told)
    assert json.loads(Path(tmp_path / "run" / "summary.json").read_text())["warnings"] == told
