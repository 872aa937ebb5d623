"""A small feature cache for the tests, its files, and what two caches have in common."""

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semanticfl_ref.config.settings import DiffusionSettings
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.diffusion import extract
from semanticfl_ref.diffusion.feature_cache import FeatureCache

FOLDER = tempfile.TemporaryDirectory()  # of the caches that `cache_of` makes
LABELS, NAMES = torch.arange(12) % 3, ("one", "two", "three")
SETTINGS = {"layers": "mid,down.1", "timestep": 50, "input_size": 0, "precision": "fp32"}


def settings_for(folder: Path, **options) -> DiffusionSettings:
    """The section `diffusion` for a model folder."""
    return DiffusionSettings(**{"source": str(folder), **SETTINGS, **options})


def dataset_of(images: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...]) -> Dataset:
    """A data set with these training images and nothing else."""
    return Dataset(
        name="test",
        class_names=names,
        train_images=images,
        train_labels=labels,
        validation_images=images[:0],
        validation_labels=labels[:0],
        test_images=images[:0],
        test_labels=labels[:0],
        sha256="data",
    )


def cache_of(
    features: dict[str, torch.Tensor],
    text: torch.Tensor,
    labels: torch.Tensor,
    id: str,
    meta: dict,
) -> FeatureCache:
    """A cache of one shard: layer -> [N, D]."""
    shard = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "shard.safetensors"
    save_file(features, shard)
    widths = {layer: values.shape[1] for layer, values in features.items()}
    return FeatureCache(text=text, labels=labels, id=id, meta=meta, shards=[shard], widths=widths)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != extract.LOCK}


def same(one: FeatureCache, other: FeatureCache) -> bool:
    return (
        one.widths == other.widths
        and torch.equal(one.text, other.text)
        and all(torch.equal(one.read(layer), other.read(layer)) for layer in one.widths)
    )


def no_extraction(monkeypatch) -> None:
    monkeypatch.setattr(extract, "_build", lambda *_: pytest.fail("the cache was built again"))
