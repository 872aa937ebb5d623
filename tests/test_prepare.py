"""What is settled before the first round: held-out images, identity, sizes; and SemanticFL from end
to end on the embedded model.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.synthetic_archives import cifar_members, sha256, tar_gz
from processes import ROOT

from semanticfl_ref import cli
from semanticfl_ref.commands.flags import settle
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.run import setup as prepare

TINY = ROOT / "semanticfl_ref" / "diffusion" / "tiny" / "unet"
needs_tiny = pytest.mark.skipif(
    not TINY.is_dir(), reason="the embedded diffusion model is not in this checkout"
)


@pytest.fixture(scope="module")
def digits():
    return prepare.load_data(config.build({"data.name": "digits"}), offline=True)[0]


def test_held_out_images_leave_the_clients(digits):
    rest, held = prepare.take_out(digits, 7, seed=0)
    assert torch.bincount(held.train_labels).tolist() == [7] * 10
    assert len(rest.train_labels) + len(held.train_labels) == len(digits.train_labels)
    both = torch.cat([rest.train_images, held.train_images]).flatten(1).unique(dim=0)
    assert len(both) == len(digits.train_images.flatten(1).unique(dim=0)), (
        "an image was lost or copied"
    )
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
    for name, value in {
        "run.seed": 1,
        "federation.learning_rate": 0.5,
        "anchors.images": "heldout:3",
    }.items():
        assert identity(**{name: value}) != first, name
    json.dumps(first)


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_dry_run_says_what_a_run_does(method, job, tmp_path):
    everyone = [*job, "--method", method, "--clients-per-round", "3", "--rounds", "1"]
    assert cli.main(["train", *everyone, "--out", str(tmp_path / "run")]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    sizes = prepare.dry_run(settle(cli.parse(["train", *everyone])))
    assert (
        sizes["steps_per_round"],
        sizes["bytes_down_per_round"],
        sizes["bytes_up_per_round"],
    ) == (row["steps"], row["bytes_down"], row["bytes_up"])


@needs_tiny
def test_semanticfl_from_end_to_end(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    flags = [*job, "--method", "semanticfl", "--rounds", "2", "--offline", "--json"]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "one")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["anchors"]["server_saw"] == "every client's training images"
        and summary["anchors"]["per"] == "image"
    )
    assert set(summary["gradient_share"]) == {"cross_entropy", "consistency", "contrast"}
    assert not any("stand-in" in text for text in summary["warnings"])
    assert cli.main(["train", *flags, "--out", str(tmp_path / "two")]) == 0, (
        "the cache comes from the cache now"
    )
    for name in ("metrics.jsonl", "checkpoint.safetensors", "anchors.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (
        cli.main(
            ["train", *flags, "--anchor-images", "heldout:20", "--out", str(tmp_path / "held")]
        )
        == 0
    )
    written = json.loads((tmp_path / "held" / "anchors.json").read_text())
    assert (written["per"], written["images"], written["image_count"]) == (
        "class",
        "heldout:20",
        200,
    )


@needs_tiny
def test_cifar_with_the_stand_in_as_the_user_types_it(job, tmp_path, monkeypatch, capsys):
    """The command that exit 5 recommends: the stand-in's own layers and widths, no other flag; the
    content's hash is in the run folder.
    """
    content = tar_gz(cifar_members(40))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    given = [
        "--dataset",
        "cifar10",
        "--data-dir",
        str(tmp_path),
        "--sd",
        "tiny",
        "--method",
        "semanticfl",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    assert cli.main(["train", *job, *given]) == 3
    assert sha256(content) in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main(["train", *job, *given, "--data-sha256", sha256(content)]) == 0
    assert any("stand-in" in text for text in json.loads(capsys.readouterr().out)["warnings"])
    assert (
        len(json.loads((tmp_path / "run" / "partition.json").read_text())["dataset_sha256"]) == 64
    )


@needs_tiny
def test_anchors_know_nothing_of_what_clients_keep_for_a_test(tmp_path, monkeypatch):
    """Other pixels in the kept images change no anchor; nobody can train on an anchor of theirs."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    c = config.build({"data.name": "digits", "partition.held_out_share": 0.3, "anchors.width": 8})
    dataset, partition, _ = prepare.load_data(c, offline=True)
    kept, trained = torch.cat(partition.held_out), torch.cat(partition.indices)
    first = prepare.build_anchors(c, dataset, partition, None, True, lambda _text: None)
    assert (
        first.visual[trained].isfinite().all()
        and first.visual[kept].isnan().all()
        and len(kept) > 100
    )
    black = replace(dataset, train_images=dataset.train_images.index_fill(0, kept, 0))
    assert torch.equal(
        prepare.build_anchors(c, black, partition, None, True, lambda _text: None).visual[trained],
        first.visual[trained],
    )
    full = prepare.build_anchors(
        config.build({"data.name": "digits", "anchors.width": 8}),
        dataset,
        partition,
        None,
        True,
        lambda _text: None,
    )
    near = torch.nn.functional.cosine_similarity(full.visual[trained], first.visual[trained])
    assert near.mean() > 0.9, "each image has its own anchor, not its neighbour's"


@needs_tiny
def test_anchors_of_a_folder_follow_the_data_sets_order_of_classes(digits, tmp_path):
    """The digits' classes are not in alphabetical order, folders are: one black class among white
    ones must keep its number.
    """
    from PIL import Image

    for name in digits.class_names:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (32, 32), 0 if name == "three" else 200 + i).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    c = config.build({"data.name": "digits", "anchors.images": str(tmp_path / "images")})
    images = prepare.anchor_images(c, digits, None, None)
    assert (
        images.class_names == digits.class_names
        and torch.bincount(images.train_labels).tolist() == [4] * 10
    )
    assert images.train_labels[images.train_images.flatten(1).amax(1) == 0].unique().tolist() == [3]
    (tmp_path / "images" / "three").rename(tmp_path / "images" / "drei")
    with pytest.raises(UserError, match="drei, three"):
        prepare.anchor_images(c, digits, None, None)
    with pytest.raises(DataError, match="train, heldout:n"):
        prepare.anchor_images(
            config.build({"data.name": "digits", "anchors.images": "trian"}), digits, None, None
        )


@needs_tiny
def test_a_stand_in_is_said_to_be_one(job, tmp_path, monkeypatch, capsys):
    from PIL import Image

    for part, name, grey in [
        (p, n, g) for p in ("train", "test") for n, g in (("cat", 60), ("dog", 190))
    ]:
        folder = tmp_path / "images" / part / name
        folder.mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (32, 32), (grey + i, grey, grey - i)).save(folder / f"{i}.png")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    given = [
        "--dataset",
        "folder",
        "--data-dir",
        str(tmp_path / "images"),
        "--method",
        "semanticfl",
        "--sd",
        "tiny",
        "--alpha",
        "5",
        "--rounds",
        "1",
        "--json",
    ]
    assert (
        cli.main(
            ["train", *job, *given, "--set", "anchors.width=8", "--out", str(tmp_path / "run")]
        )
        == 0
    ), "of one-coloured images there are few components"
    told = json.loads(capsys.readouterr().out)["warnings"]
    assert any("stand-in" in text for text in told)
    assert json.loads(Path(tmp_path / "run" / "summary.json").read_text())["warnings"] == told
