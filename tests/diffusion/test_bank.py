"""The cache on disk: what is in it, what names it, and what a cached run does not need."""

import subprocess
import sys

import pytest
import torch
from bank_files import LABELS, NAMES, RECIPE, contents, no_extraction, same

from semanticfl_ref.diffusion import feature_cache as bank_module
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.feature_cache import in_memory, open_cache, open_or_build
from semanticfl_ref.errors import UserError


def test_a_bank_holds_the_backbones_features(made, model_folder, images, text_encoder):
    cache = open_cache(made)
    assert made.path.name == f"cache-{cache.id}"
    assert set(contents(made.path)) == {
        "cache.json",
        "text.safetensors",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    }
    features = Backbone.load(model_folder, layers=["down.1", "mid"], offline=True).features(
        images, timestep=50, seed=0
    )
    assert list(cache.widths.items()) == [("mid", 112), ("down.1", 112)], "in the order asked for"
    assert all(torch.equal(cache.read(layer), features[layer].half()) for layer in cache.widths)
    assert (
        torch.equal(cache.text, text_encoder.encode([f"a photo of a {name}" for name in NAMES])[1])
        and cache.text.dtype == torch.float32
    )
    assert (
        cache.meta["timestep"] == 50
        and cache.meta["condition"] == "null"
        and cache.meta["vae_precision"] == "float32"
    )


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 12, 100])
def test_chunks_are_the_whole_in_pieces(made, rows):
    cache = open_cache(made)
    chunks = list(cache.chunks("mid", rows))
    assert torch.equal(torch.cat(chunks), cache.read("mid")) and [
        len(chunk) for chunk in chunks
    ] == [rows] * (12 // rows) + ([12 % rows] if 12 % rows else [])
    whole = in_memory({"mid": cache.read("mid")}, cache.text, "id", {})
    assert [chunk.tolist() for chunk in whole.chunks("mid", rows)] == [
        chunk.tolist() for chunk in chunks
    ]


def test_a_hit_is_equal_and_makes_nothing(made, cached, monkeypatch):
    no_extraction(monkeypatch)
    monkeypatch.setattr(torch, "load", lambda *_a, **_k: pytest.fail("torch.load was called"))
    assert same(open_or_build(cached), open_cache(made))


def test_a_hit_imports_neither_library(cached, model_folder, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import sys, torch
from pathlib import Path
from semanticfl_ref.diffusion import feature_cache as cache
cache.SHARD = 4
images = torch.load({str(tmp_path / "images.pt")!r}, weights_only=True)
recipe = cache.Recipe(source={str(model_folder)!r}, **{RECIPE})
wanted = cache.plan(images, torch.arange(12) % 3, {NAMES}, "data", recipe, cache_dir=Path({str(tmp_path)!r}), offline=True, device="cpu")
assert cache.finished(wanted)
cache.open_or_build(wanted)
print([name for name in ("diffusers", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"timestep": 51},
        {"seed": 1},
        {"pool": 2},
        {"prompt": "a {}"},
        {"condition": "own-class"},
        {"input_size": 16},
        {"precision": "bf16"},
        {"layers": ("mid",)},
        {"layers": ("down.1", "mid")},
        {"latent": "sample"},
        {"names": ("one", "two", "four")},
    ],
    ids=str,
)
def test_every_option_makes_another_bank(made, want, change):
    assert want(made.path.parent, **change).id != made.id


def test_images_weights_and_labels_make_another_bank_where_they_matter(
    made, want, images, monkeypatch
):
    folder = made.path.parent
    assert (
        want(folder, images=images.flip(0)).id != made.id
        and want(folder, images=images[:11]).id != made.id
    )
    assert want(folder, labels=LABELS.flip(0)).id == made.id, (
        "nothing of a label enters under the empty caption"
    )
    assert (
        want(folder, labels=LABELS.flip(0), condition="own-class").id
        != want(folder, condition="own-class").id
    )
    monkeypatch.setattr(bank_module, "fingerprint", lambda *_: "other weights")
    assert want(folder).id != made.id


def test_own_class_depends_on_the_label(want, tmp_path, images, made, model_folder, text_encoder):
    own = open_or_build(want(tmp_path, condition="own-class"))
    assert not torch.equal(own.read("mid"), open_cache(made).read("mid"))
    hidden = text_encoder.encode([f"a photo of a {name}" for name in NAMES])[0]
    expected = Backbone.load(model_folder, layers=["mid"], offline=True).features(
        images, timestep=50, seed=0, prompt_embedding=hidden[LABELS]
    )["mid"]
    assert torch.equal(own.read("mid"), expected.half())


def test_unknown_names(want, tmp_path):
    for change, words in (
        ({"condition": "own-clas"}, "did you mean 'own-class'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"latent": "men"}, "'mean'"),
    ):
        with pytest.raises(UserError, match=words):
            want(tmp_path, **change)
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        open_or_build(want(tmp_path, precision="fp16"))
    with pytest.raises(UserError, match="no place for the class"):
        open_or_build(want(tmp_path, prompt="a photo"))


def test_size_progress_and_speed_are_told(want, tmp_path, capsys):
    said = []
    open_or_build(want(tmp_path / "a"), said.append)
    assert capsys.readouterr() == ("", "")
    assert (
        "feature cache of 12 images: 0.0 MiB at" in said[0]
        and "U-Net up to mid" in said[1]
        and len(said) == 2
    )
    open_or_build(want(tmp_path / "b"), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "12/12" in err and " images/s]" in err
