"""What is prepared before the first round: held-out images, anchors, identity, sizes."""

import json
from dataclasses import replace

import pytest
import torch
from data.synthetic_archives import cifar_members, sha256, tar_gz
from PIL import Image

from semanticfl_ref import cli
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.federated.context import make_context
from semanticfl_ref.run.dry_run import dry_run
from semanticfl_ref.run.setup import (
    RunData,
    anchor_images,
    build_anchors,
    hold_out_per_class,
    identity_of,
    load_data,
    rebuild_command,
    training_subset,
)


@pytest.fixture(scope="module")
def digits():
    return load_data(resolve({"data.name": "digits"}), offline=True).dataset


def test_held_out_images_leave_the_clients(digits):
    rest, held_out = hold_out_per_class(digits, 7, seed=0)
    assert torch.bincount(held_out.train_labels).tolist() == [7] * 10
    assert len(rest.train_labels) + len(held_out.train_labels) == len(digits.train_labels)
    both = torch.cat([rest.train_images, held_out.train_images]).flatten(1).unique(dim=0)
    whole = digits.train_images.flatten(1).unique(dim=0)
    assert len(both) == len(whole), "an image was lost or copied"
    assert len({digits.sha256, rest.sha256, held_out.sha256}) == 3
    assert torch.equal(rest.test_images, digits.test_images)
    _, again = hold_out_per_class(digits, 7, seed=0)
    assert torch.equal(again.train_images, held_out.train_images)
    assert again.sha256 == held_out.sha256


def test_held_out_images_must_leave_some(digits):
    with pytest.raises(UserError, match="heldout:1000"):
        hold_out_per_class(digits, 1000, seed=0)
    assert hold_out_per_class(digits, 0, seed=0) == (digits, None)


def test_identity_depends_on_content_and_not_on_paths():
    def identity(**settings):
        config = resolve({"data.name": "digits", "federation.method": "fedavg"} | settings)
        data = load_data(config, offline=True)
        return identity_of(make_context(config, data.dataset, data.partition, None))

    first = identity()
    assert identity(**{"run.checkpoint_every": 5, "diffusion.source": "elsewhere"}) == first
    changes = {
        "run.seed": 1,
        "federation.learning_rate": 0.5,
        "anchors.images": "heldout:3",
    }
    for name, value in changes.items():
        assert identity(**{name: value}) != first, name
    json.dumps(first)


def test_the_command_to_rebuild_features_makes_the_same_configuration():
    """As far as features depend on it."""
    settings = {"data.name": "digits", "diffusion.pool": 2, "partition.imbalance": 5.0}
    config = resolve({**settings, "run.seed": 3})
    words = rebuild_command(config).split()
    assert words[:6] == ["python", "-m", "semanticfl_ref", "features", "build", "--rebuild"]
    again = settings_of(cli.parse(words[3:]))
    assert again.diffusion == config.diffusion
    assert again.partition == config.partition
    assert again.run.seed == 3


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_dry_run_says_what_a_run_does(method, job, tmp_path):
    everyone = [*job, "--method", method, "--clients-per-round", "3", "--rounds", "1"]
    assert cli.main(["train", *everyone, "--out", str(tmp_path / "run")]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    sizes = dry_run(settings_of(cli.parse(["train", *everyone])))
    assert sizes["steps_per_round"] == line["steps"]
    assert sizes["bytes_down_per_round"] == line["bytes_down"]
    assert sizes["bytes_up_per_round"] == line["bytes_up"]


def test_semanticfl_from_end_to_end(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    flags = [*job, "--method", "semanticfl", "--rounds", "2", "--offline", "--json"]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "one")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["anchors"]["server_saw"] == "all clients' training images"
    assert summary["anchors"]["per"] == "image"
    assert set(summary["gradient_share"]) == {"cross_entropy", "consistency", "contrast"}
    assert not any("stand-in" in text for text in summary["warnings"])
    # The features come from the cache now.
    assert cli.main(["train", *flags, "--out", str(tmp_path / "two")]) == 0
    assert "from the feature cache" in capsys.readouterr().err
    for name in ("metrics.jsonl", "checkpoint.safetensors", "anchors.json"):
        one, two = (tmp_path / run / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
    held_out = ["--anchor-images", "heldout:20", "--out", str(tmp_path / "held")]
    assert cli.main(["train", *flags, *held_out]) == 0
    written = json.loads((tmp_path / "held" / "anchors.json").read_text())
    assert (written["per"], written["images"]) == ("class", "heldout:20")
    assert written["image_count"] == 200


def test_cifar_with_the_stand_in_as_the_user_types_it(job, tmp_path, monkeypatch, capsys):
    """The command that exit 5 recommends: the embedded model's own layers and widths, no other
    flag; the content's hash is in the run folder."""
    content = tar_gz(cifar_members(40))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    given = ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--sd", "tiny"]
    given += ["--method", "semanticfl", "--rounds", "1", "--out", str(tmp_path / "run"), "--json"]
    assert cli.main(["train", *job, *given]) == 3
    assert sha256(content) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", *job, *given, "--data-sha256", sha256(content)]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("stand-in" in text for text in warnings)
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert len(partition["dataset_sha256"]) == 64


def test_anchors_do_not_depend_on_the_clients_own_test_images(tmp_path, monkeypatch):
    """Other pixels there change no anchor; and there is no anchor of such an image to train on."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    settings = {"data.name": "digits", "anchors.width": 8, "partition.held_out_share": 0.3}
    config = resolve(settings)
    data = load_data(config, offline=True)
    own_tests, trained = torch.cat(data.partition.held_out), data.partition.trained
    first = build_anchors(config, data, offline=True)
    assert len(own_tests) > 100
    assert first.visual[trained].isfinite().all()
    assert first.visual[own_tests].isnan().all()
    images = data.dataset.train_images.index_fill(0, own_tests, 0)
    black = replace(data, dataset=replace(data.dataset, train_images=images))
    other = build_anchors(config, black, offline=True)
    assert torch.equal(other.visual[trained], first.visual[trained])
    # Each image has its own anchor, not its neighbour's: those of the same images in the same
    # order.
    everything = (torch.arange(len(trained)),)
    alone = RunData(
        dataset=training_subset(data.dataset, trained),
        partition=replace(data.partition, indices=everything, held_out=()),
        held_out=None,
    )
    assert torch.equal(build_anchors(config, alone, offline=True).visual, first.visual[trained])


def test_anchors_of_a_folder_follow_the_data_sets_order_of_classes(digits, tmp_path):
    """The digits' classes are not in alphabetical order, folders are: one black class among white
    ones must keep its number."""
    for name in digits.class_names:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(5):
            grey = i if name == "three" else 200 + i
            Image.new("L", (32, 32), grey).save(folder / f"{i}.png")
    data = RunData(dataset=digits, partition=None, held_out=None)
    config = resolve({"data.name": "digits", "anchors.images": str(tmp_path / "images")})
    images = anchor_images(config, data)
    assert images.class_names == digits.class_names
    assert torch.bincount(images.train_labels).tolist() == [4] * 10
    black = images.train_images.flatten(1).amax(1) < 100
    assert images.train_labels[black].unique().tolist() == [3]
    (tmp_path / "images" / "three").rename(tmp_path / "images" / "drei")
    with pytest.raises(UserError, match="drei, three"):
        anchor_images(config, data)
    absent = resolve({"data.name": "digits", "anchors.images": "trian"})
    with pytest.raises(DataError, match="train, heldout:N"):
        anchor_images(absent, data)


def test_a_stand_in_is_reported_as_one(job, tmp_path, monkeypatch, capsys):
    for part in ("train", "test"):
        for name, grey in (("cat", 60), ("dog", 190)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(30):
                colour = (grey + i, grey, grey - i)
                Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    given = ["--dataset", "image_folder", "--data-dir", str(tmp_path / "images"), "--sd", "tiny"]
    given += ["--method", "semanticfl", "--alpha", "5", "--rounds", "1", "--json"]
    # Images of one colour have few components.
    given += ["--set", "anchors.width=8", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *job, *given]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("stand-in" in text for text in warnings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["warnings"] == warnings
