"""A data set by name and by the fields of the section `data`."""

import hashlib
from pathlib import Path

from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.data.dataset import Dataset, load_dataset


def load(
    name: str, *, dir: Path | str = "", seed: int = 0, offline: bool = False, **settings
) -> Dataset:
    """`load_dataset` with these settings."""
    section = DataSettings(name=name, dir=str(dir), **settings)
    return load_dataset(section, seed=seed, offline=offline)


def load_archive(content: bytes, folder: Path, name: str = "cifar10", **settings) -> Dataset:
    """A data set from an archive of this content, accepted by its SHA-256."""
    filename = {
        "cifar10": "cifar-10-python.tar.gz",
        "cifar100": "cifar-100-python.tar.gz",
    }[name]
    (folder / filename).write_bytes(content)
    return load(name, dir=folder, sha256=hashlib.sha256(content).hexdigest(), **settings)
