"""The bank on disk: what names it, what it survives, and what a cached run does not need."""

import builtins
import errno
import os
import subprocess
import sys

import pytest
import torch

from semanticfl_ref.diffusion import bank as bank_module
from semanticfl_ref.diffusion.bank import open_or_build
from semanticfl_ref.errors import MismatchError, NonFiniteError, UserError

LABELS = torch.arange(12) % 3
NAMES = ("one", "two", "three")


@pytest.fixture(scope="session")
def build(model_folder, images):
    def build(cache_dir, **options):
        arguments = {"source": model_folder, "taps": ["down.1", "mid"], "timestep": 50, "precision": "fp32", "device": "cpu"} | options
        return open_or_build(arguments.pop("images", images), LABELS, NAMES, "data", cache_dir=cache_dir, offline=True, **arguments)

    return build


@pytest.fixture(scope="session")
def made(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    return build(folder), next(folder.iterdir())


@pytest.fixture
def cached(made, tmp_path):
    """The bank's file in a cache folder of the test's own."""
    file = tmp_path / made[1].name
    file.write_bytes(made[1].read_bytes())
    return file


def no_extraction(monkeypatch):
    monkeypatch.setattr(bank_module, "_extract", lambda *_: pytest.fail("the bank was made again"))


def test_a_bank_holds_the_backbones_features(made, backbone, images):
    bank, file = made
    assert file.name == f"bank-{bank.id}.safetensors" and list(file.parent.iterdir()) == [file]
    features = backbone.features(images, timestep=50, seed=0)
    assert list(bank.features) == ["down.1", "mid"]
    assert all(torch.equal(values, features[tap].half()) for tap, values in bank.features.items())
    assert torch.equal(bank.text, backbone.text(NAMES)) and bank.text.dtype == torch.float32
    assert bank.meta["timestep"] == 50 and bank.meta["condition"] == "null"


def test_a_hit_is_equal_and_makes_nothing(made, cached, build, monkeypatch):
    no_extraction(monkeypatch)
    again = build(cached.parent)
    assert again.id == made[0].id and again.meta == made[0].meta and torch.equal(again.text, made[0].text)
    assert all(torch.equal(values, made[0].features[tap]) for tap, values in again.features.items())


def test_a_hit_imports_neither_library(cached, model_folder, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import sys, torch
from semanticfl_ref.diffusion.bank import open_or_build
images = torch.load({str(tmp_path / "images.pt")!r}, weights_only=True)
open_or_build(images, torch.arange(12) % 3, {NAMES}, "data", source={str(model_folder)!r}, taps=["down.1", "mid"], timestep=50, precision="fp32", device="cpu",
              cache_dir={str(tmp_path)!r}, offline=True)
print([name for name in ("diffusers", "transformers") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "change",
    [{"timestep": 51}, {"seed": 1}, {"pool": 2}, {"prompt": "a {}"}, {"condition": "own-class"}, {"input_size": 16}, {"precision": "bf16"}, {"taps": ["mid"]}],
    ids=str,
)
def test_every_option_makes_another_bank(made, cached, build, monkeypatch, change):
    asked = []
    monkeypatch.setattr(bank_module, "_extract", lambda *_: ({"mid": torch.zeros(12, 1)}, torch.zeros(3, 1)))
    monkeypatch.setattr(bank_module, "_read", lambda file, *_: asked.append(file))
    build(cached.parent, **change)
    assert asked[0] != cached


def test_other_images_and_other_weights_make_another_bank(made, cached, build, model_folder, images, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bank_module, "_extract", lambda *_: ({"mid": torch.zeros(12, 1)}, torch.zeros(3, 1)))
    monkeypatch.setattr(bank_module, "_read", lambda file, *_: asked.append(file))
    build(cached.parent, images=images.flip(0))
    monkeypatch.setattr(bank_module, "fingerprint", lambda _folder: "other weights")
    build(cached.parent)
    assert len({cached, *asked}) == 3


def test_own_class_depends_on_the_label(build, tmp_path, images, made, backbone):
    own = build(tmp_path, condition="own-class")
    assert not torch.equal(own.features["mid"], made[0].features["mid"])
    hidden = backbone.hidden([f"a photo of a {name}" for name in NAMES])
    expected = backbone.features(images, timestep=50, seed=0, prompt_embedding=hidden[LABELS])["mid"]
    assert torch.equal(own.features["mid"], expected.half())


def test_every_damaged_byte_is_detected_or_harmless(made, cached, build, monkeypatch):
    """200 bytes, half of them in the header: a damage names the file and the remedy, or changes nothing that is read."""
    no_extraction(monkeypatch)
    good = cached.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = torch.cat([torch.arange(0, header, header // 100), torch.linspace(header, len(good) - 1, 100).long()]).tolist()
    detected = 0
    for place in places:
        cached.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
        try:
            again = build(cached.parent)
        except MismatchError as error:
            detected += 1
            assert str(cached) in str(error) and "delete" in str(error) and error.exit_code == 4
        else:
            assert torch.equal(again.text, made[0].text) and all(torch.equal(v, made[0].features[t]) for t, v in again.features.items())
    assert detected >= len(places) - 5  # the header's padding is blank and says nothing


def test_truncated_and_misnamed_banks_are_refused(cached, build, monkeypatch, made):
    no_extraction(monkeypatch)
    good = cached.read_bytes()
    for length in (0, 7, 100, len(good) - 1):
        cached.write_bytes(good[:length])
        with pytest.raises(MismatchError, match="damaged"):
            build(cached.parent)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "_read", lambda file, *_: asked.append(file))
        patch.setattr(bank_module, "_extract", lambda *_: ({"mid": torch.zeros(12, 1)}, torch.zeros(3, 1)))
        build(cached.parent, timestep=51)
    asked[0].write_bytes(good)
    with pytest.raises(MismatchError, match="other images, weights or options"):
        build(cached.parent, timestep=51)


def test_a_full_disk_leaves_nothing(build, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_module, "_extract", lambda *_: ({"mid": torch.zeros(12, 1)}, torch.zeros(3, 1)))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write the feature bank .*No space left on device.*free space"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_is_a_file(build, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_module, "_extract", lambda *_: ({"mid": torch.zeros(12, 1)}, torch.zeros(3, 1)))
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the feature bank"):
        build(tmp_path / "cache")


def test_what_does_not_fit_fp16_is_named(build, tmp_path, monkeypatch):
    from semanticfl_ref.diffusion.backbone import Backbone

    monkeypatch.setattr(Backbone, "features", lambda self, part, **_options: {"mid": torch.full((len(part), 2), 1e5)})
    with pytest.raises(NonFiniteError, match="image 0, tap mid.*does not fit"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_condition_and_precision(build, tmp_path):
    with pytest.raises(UserError, match="did you mean 'own-class'"):
        build(tmp_path, condition="own-clas")
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        build(tmp_path, precision="fp8")
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        build(tmp_path, precision="fp16")


def test_progress_goes_to_stderr_when_asked(build, tmp_path, capsys):
    build(tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    build(tmp_path / "b", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "12/12" in err


def test_a_hit_reads_no_weights_with_pickle(made, cached, build, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_a, **_k: pytest.fail("torch.load was called"))
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: pytest.fail(f"{name} imported") if name == "pickle" else real(name, *rest))
    build(cached.parent)
