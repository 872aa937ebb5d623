"""The cache on disk: what is in it, what names it, and what a run with a cache does not need."""

import subprocess
import sys

import pytest
import torch
from cache_files import LABELS, NAMES, cache_of, contents, no_extraction, same

from semanticfl_ref.diffusion import feature_cache
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.extract import open_or_build
from semanticfl_ref.diffusion.feature_cache import open_cache
from semanticfl_ref.errors import UserError


def test_a_cache_holds_the_backbones_features(built, model_folder, images, text_encoder):
    cache = open_cache(built)
    assert built.path.name == f"features-{cache.id}"
    assert set(contents(built.path)) == {
        "manifest.json",
        "text.safetensors",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    }
    backbone = Backbone(model_folder, layers=["down.1", "mid"], offline=True)
    features = backbone.features(images, timestep=50, seed=0)
    assert list(cache.widths.items()) == [("mid", 112), ("down.1", 112)], "in the order asked for"
    assert all(torch.equal(cache.read(layer), features[layer].half()) for layer in cache.widths)
    text = text_encoder.encode([f"a photo of a {name}" for name in NAMES])[1]
    assert torch.equal(cache.text, text) and cache.text.dtype == torch.float32
    assert cache.meta["timestep"] == 50 and cache.meta["condition"] == "null"
    assert cache.meta["vae_precision"] == "fp32"


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 12, 100])
def test_chunks_are_the_whole_in_pieces(built, rows):
    cache = open_cache(built)
    chunks = list(cache.chunks("mid", rows))
    assert torch.equal(torch.cat(chunks), cache.read("mid"))
    rest = [12 % rows] if 12 % rows else []
    assert [len(chunk) for chunk in chunks] == [rows] * (12 // rows) + rest
    whole = cache_of({"mid": cache.read("mid")}, cache.text, LABELS, "id", {})
    assert [chunk.tolist() for chunk in whole.chunks("mid", rows)] == [
        chunk.tolist() for chunk in chunks
    ]


def test_a_hit_is_equal_and_builds_nothing(built, copied, monkeypatch):
    no_extraction(monkeypatch)
    monkeypatch.setattr(torch, "load", lambda *_a, **_k: pytest.fail("torch.load was called"))
    assert same(open_or_build(copied), open_cache(built))


def test_a_hit_imports_neither_library(copied, model_folder, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from pathlib import Path
import torch
from cache_files import LABELS, NAMES, dataset_of, settings_for
from semanticfl_ref.diffusion import extract, feature_cache
feature_cache.SHARD = 4
images = torch.load({str(tmp_path / "images.pt")!r}, weights_only=True)
plan = feature_cache.plan_cache(
    dataset_of(images, LABELS, NAMES),
    settings_for({str(model_folder)!r}),
    seed=0,
    device=torch.device("cpu"),
    folder=Path({str(tmp_path)!r}),
    offline=True,
)
assert plan.complete
extract.open_or_build(plan)
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
        {"layers": "mid"},
        {"layers": "down.1,mid"},
        {"latent": "sample"},
        {"names": ("one", "two", "four")},
    ],
    ids=str,
)
def test_every_option_makes_another_cache(built, plan_for, change):
    assert plan_for(built.path.parent, **change).id != built.id


def test_images_weights_and_labels_make_another_cache_where_they_matter(
    built, plan_for, images, monkeypatch
):
    folder = built.path.parent
    assert plan_for(folder, images=images.flip(0)).id != built.id
    assert plan_for(folder, images=images[:11]).id != built.id
    flipped = LABELS.flip(0)
    assert plan_for(folder, labels=flipped).id == built.id, (
        "nothing of a label enters under the empty caption"
    )
    own_class = plan_for(folder, condition="own-class")
    assert plan_for(folder, labels=flipped, condition="own-class").id != own_class.id
    monkeypatch.setattr(feature_cache, "fingerprint", lambda *_: "other weights")
    assert plan_for(folder).id != built.id


def test_own_class_depends_on_the_label(
    plan_for, tmp_path, images, built, model_folder, text_encoder
):
    own = open_or_build(plan_for(tmp_path, condition="own-class"))
    assert not torch.equal(own.read("mid"), open_cache(built).read("mid"))
    hidden = text_encoder.encode([f"a photo of a {name}" for name in NAMES])[0]
    backbone = Backbone(model_folder, layers=["mid"], offline=True)
    features = backbone.features(images, timestep=50, seed=0, prompt_embedding=hidden[LABELS])
    assert torch.equal(own.read("mid"), features["mid"].half())


def test_every_class_does_not_depend_on_the_label(
    plan_for, tmp_path, images, model_folder, text_encoder
):
    """Rows: the classes of an image one after another. In two parts it is the same."""
    plan, said = plan_for(tmp_path, every_class=True), []
    assert plan_for(tmp_path, every_class=True, labels=LABELS.flip(0)).id == plan.id
    assert plan.id not in (plan_for(tmp_path).id, plan_for(tmp_path, condition="own-class").id)
    cache = open_or_build(plan, said.append)
    assert "in all 36 passes" in said[0] and "feature cache of 12 images" in said[1]
    hidden = text_encoder.encode([f"a photo of a {name}" for name in NAMES])[0]
    backbone = Backbone(model_folder, layers=["mid"], offline=True)
    for c, embedding in enumerate(hidden):
        features = backbone.features(images, timestep=50, seed=0, prompt_embedding=embedding)
        assert torch.equal(cache.read("mid")[c::3], features["mid"].half())


def test_unknown_names(plan_for, tmp_path):
    for change, words in (
        ({"condition": "own-clas"}, "did you mean 'own-class'"),
        ({"precision": "fp8"}, "unknown .*precision.* 'fp8'"),
        ({"latent": "men"}, "'mean'"),
    ):
        with pytest.raises(UserError, match=words):
            plan_for(tmp_path, **change)
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        open_or_build(plan_for(tmp_path, precision="fp16"))
    with pytest.raises(UserError, match="no place for the class"):
        open_or_build(plan_for(tmp_path, prompt="a photo"))


def test_size_progress_and_speed_are_shown(plan_for, tmp_path, capsys, monkeypatch):
    """At a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = []
    open_or_build(plan_for(tmp_path / "a"), said.append)
    assert "feature cache of 12 images: 5.2 KiB at" in said[0]
    assert "U-Net up to mid" in said[1] and len(said) == 2
    out, err = capsys.readouterr()
    assert out == "" and "12/12" in err and " images/s]" in err
