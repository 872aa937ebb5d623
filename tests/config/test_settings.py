"""The configuration: ranges, names, the order of sources, and its round trip through TOML."""

import pytest

from semanticfl_ref.config.presets import EMBEDDED
from semanticfl_ref.config.registry import DATASETS
from semanticfl_ref.config.resolve import resolve, to_toml
from semanticfl_ref.config.schema import choices_of
from semanticfl_ref.config.settings import (
    STABLE_DIFFUSION,
    from_flat,
    setting_fields,
    to_flat,
)
from semanticfl_ref.errors import DataError, UserError


@pytest.mark.parametrize("name", setting_fields())
def test_every_setting_refuses_what_is_outside_its_range(name):
    field = setting_fields()[name]
    limits = field.metadata
    assert limits["help"]
    wrong = [("no such value", "expected")] if field.type is not str else []
    if choices_of(field):
        wrong.append(("no such value", "Known: "))
    for bound, step in (("low", -1), ("high", 1), ("above", 0)):
        if limits[bound] is not None:
            wrong.append((field.type(limits[bound] + step), "must be"))
    for value, message in wrong:
        with pytest.raises(UserError, match=message):
            from_flat({name: value})


def test_every_help_stands_alone():
    """A noun phrase: no full stop, no dangling "of"."""
    for name, field in setting_fields().items():
        help = field.metadata["help"]
        assert not help.startswith(("of ", "whether ", "what ")), name
        assert not help.endswith("."), name


def test_round_trip_through_toml(tmp_path):
    odd = 'a "b" \\ c\t\n\x00\x7f é 🙂'
    first = resolve({"semanticfl.tau": 0.07, "data.dir": odd, "data.name": "cifar100"})
    (tmp_path / "c.toml").write_text(to_toml(first))
    assert resolve(file=tmp_path / "c.toml") == first
    assert from_flat(to_flat(first)) == first


@pytest.mark.parametrize("name", DATASETS)
def test_every_preset_is_valid(name):
    assert resolve({"data.name": name}).data.name == name


def test_the_later_source_wins(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[semanticfl]\ntau = 0.1\nlambda_kd = 2\n[federation]\nrounds = 7\n")
    flags = {"semanticfl.tau": "0.2", "federation.rounds": 8}
    config = resolve(flags, file, ["federation.rounds=9"])
    assert config.method.lambda_kd == 2.0
    assert config.method.tau == 0.2
    assert config.federation.rounds == 9
    assert config.model.width == EMBEDDED["model.width"]


def test_the_embedded_model_brings_its_own_layers_to_any_data_set():
    given = {"data.name": "cifar10", "diffusion.source": "tiny", "diffusion.timestep": 30}
    stand_in, paper = resolve(given), resolve({"data.name": "cifar10"})
    assert stand_in.diffusion.layers == "mid"
    assert stand_in.diffusion.timestep == 30
    assert stand_in.anchors.width == 96
    for section in ("methods", "federation", "model"):
        assert getattr(stand_in, section) == getattr(paper, section)


def test_the_paper_setting():
    config = resolve({"data.name": "cifar10"})
    federation, method = config.federation, config.method
    assert federation.batch_size == 64
    assert config.partition.clients == 10
    assert federation.clients_per_round == 5
    assert federation.local_epochs == 10
    sgd = (federation.learning_rate, federation.momentum, federation.weight_decay)
    assert sgd == (0.01, 0.9, 1e-5)
    assert (method.lambda_kd, method.lambda_con, method.tau) == (1.0, 0.02, 0.05)
    assert federation.rounds == 50
    assert config.diffusion.timestep == 150
    assert config.diffusion.prompt == "a photo of a {}"
    assert config.diffusion.source == STABLE_DIFFUSION
    assert config.model.width == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"semanticfl.tua": 1}, "semanticfl.tau"),
        ({"tau": 1}, "semanticfl.tau"),
        ({"federation.lr": 1}, "'federation.learning_rate'"),
        ({"lr": 1}, "'federation.learning_rate'"),
        ({"epochs": 1}, "'federation.local_epochs'"),
        ({"data.name": "cifer10"}, "cifar10"),
        ({"run.seed": True}, "an integer"),
        ({"semanticfl.tau": float("nan")}, "finite"),
        ({"federation.clients_per_round": 11}, "partition.clients"),
        ({"data.name": ["digits"]}, "data.name = .*expected a string"),
        ({"federation.method": ["fedavg"]}, "federation.method = .*expected a string"),
        ({"data.dir": "shapes\udcff"}, "data.dir = .* is not UTF-8"),
        ({"data.image_size": 8}, "data.image_size = 8"),
        ({"model.norm": "group", "model.batch_norm": "local"}, "no BatchNorm to keep"),
    ],
)
def test_a_mistake_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        resolve(settings)


@pytest.mark.parametrize(
    ("setting", "written", "name"),
    [
        ("data.name", "CIFAR10", "cifar10"),
        ("data.name", "CIFAR-100", "cifar100"),
        ("data.name", "Tiny-ImageNet", "tinyimagenet"),
        ("federation.method", "FedAvg", "fedavg"),
        ("federation.aggregation", "trimmed_mean", "trimmed-mean"),
    ],
)
def test_names_are_found_in_any_spelling(setting, written, name):
    config = resolve({setting: written, "server.trim": 0.4})
    assert to_flat(config)[setting] == name
    if setting == "data.name":
        assert config == resolve({setting: name, "server.trim": 0.4}), "with its preset"


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(DataError, match=r"absent\.toml"):
        resolve(file=tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(DataError, match="not TOML"):
        resolve(file=tmp_path / "broken.toml")
    (tmp_path / "flat.toml").write_text("tau = 1\n")
    with pytest.raises(UserError, match="outside of any section"):
        resolve(file=tmp_path / "flat.toml")


@pytest.mark.parametrize(
    ("images", "count"), [("train", 0), ("heldout:12", 12), ("some/folder", 0)]
)
def test_held_out_images(images, count):
    assert resolve({"anchors.images": images}).anchors.held_out == count


@pytest.mark.parametrize(
    "images", ["heldout", "heldout:", "heldout:0", "heldout:-1", "heldout:x", "heldout:1.5"]
)
def test_held_out_images_refused(images):
    with pytest.raises(UserError, match="heldout:20"):
        resolve({"anchors.images": images})


def test_a_byte_order_mark_is_no_setting(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[data]\nname = "digits"\n', encoding="utf-8-sig")
    assert resolve(file=file).data.name == "digits"
