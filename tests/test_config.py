"""The configuration: ranges, names, the order in which values win, and its round trip through TOML."""

import dataclasses

import pytest

from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.errors import DataError, UserError


def every_field():
    return [
        (f"{s.name}.{f.name}", f)
        for s in dataclasses.fields(config.Config)
        for f in dataclasses.fields(s.type)
    ]


@pytest.mark.parametrize("name, field", every_field(), ids=[name for name, _ in every_field()])
def test_every_field_refuses_what_is_outside_its_range(name, field):
    meta = field.metadata
    assert meta["help"]
    wrong = [("no such value", "expected")] if field.type is not str else []
    if meta["choices"]:
        wrong.append(("no such value", "Known: "))
    for bound, step in (("low", -1), ("high", 1), ("above", 0)):
        if meta[bound] is not None:
            wrong.append((field.type(meta[bound] + step), "must be"))
    for value, words in wrong:
        with pytest.raises(UserError, match=words):
            config.from_flat({name: value})


def test_round_trip_through_toml(tmp_path):
    first = config.build(
        {"semantic.tau": 0.07, "data.dir": 'a "b" \\ c\t\n\x00\x7f é 🙂', "data.name": "cifar100"}
    )
    (tmp_path / "c.toml").write_text(config.to_toml(first))
    assert config.build(file=tmp_path / "c.toml") == first
    assert config.from_flat(config.to_flat(first)) == first


@pytest.mark.parametrize("name", config.DATASETS)
def test_every_preset_is_valid(name):
    assert config.build({"data.name": name}).data.name == name


def test_the_later_source_wins(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[semantic]\ntau = 0.1\nlambda_kd = 2\n[federation]\nrounds = 7\n")
    settled = config.build(
        {"semantic.tau": "0.2", "federation.rounds": 8}, file, ["federation.rounds=9"]
    )
    assert (settled.semantic.lambda_kd, settled.semantic.tau, settled.federation.rounds) == (
        2.0,
        0.2,
        9,
    )
    assert settled.model.width == config.PRESETS["digit-scenes"]["model.width"]


def test_the_embedded_model_brings_its_own_layers_to_any_data_set():
    stand_in = config.build(
        {"data.name": "cifar10", "diffusion.source": "tiny", "diffusion.timestep": 30}
    )
    assert (stand_in.diffusion.layers, stand_in.diffusion.timestep, stand_in.anchors.width) == (
        "mid",
        30,
        96,
    )
    paper = config.build({"data.name": "cifar10"})
    assert (stand_in.semantic, stand_in.federation, stand_in.model) == (
        paper.semantic,
        paper.federation,
        paper.model,
    )


def test_the_paper_setting():
    c = config.build({"data.name": "cifar10"})
    assert (
        c.federation.batch_size,
        c.partition.clients,
        c.federation.clients_per_round,
        c.federation.local_epochs,
    ) == (64, 10, 5, 10)
    assert (c.federation.learning_rate, c.federation.momentum, c.federation.weight_decay) == (
        0.01,
        0.9,
        1e-5,
    )
    assert (c.semantic.lambda_kd, c.semantic.lambda_con, c.semantic.tau, c.diffusion.timestep) == (
        1.0,
        0.01,
        0.05,
        150,
    )
    assert (c.diffusion.prompt, c.diffusion.source, c.model.width) == (
        "a photo of a {}",
        config.STABLE_DIFFUSION,
        64,
    )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"semantic.tua": 1}, "semantic.tau"),
        ({"tau": 1}, "semantic.tau"),
        ({"data.name": "cifer10"}, "cifar10"),
        ({"run.seed": True}, "a whole number"),
        ({"semantic.tau": float("nan")}, "finite"),
        ({"federation.clients_per_round": 11}, "partition.clients"),
        ({"data.name": ["digits"]}, "unknown dataset"),
        ({"federation.method": ["fedavg"]}, "federation.method = .*expected a text"),
        ({"data.image_size": 8}, "data.image_size = 8"),
    ],
)
def test_a_mistake_is_named(settings, words):
    with pytest.raises(UserError, match=words):
        config.build(settings)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(DataError, match="absent.toml"):
        config.build(file=tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(DataError, match="not TOML"):
        config.build(file=tmp_path / "broken.toml")
    (tmp_path / "flat.toml").write_text("tau = 1\n")
    with pytest.raises(UserError, match="outside a section"):
        config.build(file=tmp_path / "flat.toml")


@pytest.mark.parametrize("images, n", [("train", 0), ("heldout:12", 12), ("some/folder", 0)])
def test_held_out_images(images, n):
    assert config.held_out_images(config.build({"anchors.images": images})) == n


@pytest.mark.parametrize(
    "images", ["heldout", "heldout:", "heldout:0", "heldout:-1", "heldout:x", "heldout:1.5"]
)
def test_held_out_images_refused(images):
    with pytest.raises(UserError, match="heldout:20"):
        config.held_out_images(config.build({"anchors.images": images}))
