"""CIFAR's archives, packed or unpacked, as data sets."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from loading import load, load_archive
from synthetic_archives import FOLDER, NAMES, cifar_members, sha256, tar_gz

from semanticfl_ref.data import download
from semanticfl_ref.errors import DataError


def test_cifar10(tmp_path, cifar):
    d = load_archive(cifar, tmp_path)
    assert d.train_images.shape == (100, 32, 32, 3)
    assert d.test_images.shape == (20, 32, 32, 3)
    assert len(d.validation_labels) == 0
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)  # the first batch
    pixel = [int(rows[7, 1024 * channel + 32 * 3 + 5]) for channel in range(3)]
    assert d.train_images[7, 3, 5].tolist() == pixel
    assert d.class_names == tuple(NAMES)
    assert d.train_labels[:12].tolist() == [*range(10), 0, 1]


def test_validation_images_are_set_aside(tmp_path, cifar):
    d = load_archive(cifar, tmp_path)
    held = load_archive(cifar, tmp_path, validation_share=0.2, seed=3)
    assert held.validation_labels.bincount().tolist() == [2] * 10
    assert held.train_labels.bincount().tolist() == [8] * 10
    assert held.test_images.equal(d.test_images)
    assert held.sha256 != d.sha256
    seen = torch.cat([held.train_images, held.validation_images]).flatten(1)
    assert seen.unique(dim=0).equal(d.train_images.flatten(1).unique(dim=0))


def test_resized_images(tmp_path, cifar):
    d, small = load_archive(cifar, tmp_path), load_archive(cifar, tmp_path, image_size=16)
    assert small.image_size == 16
    assert small.test_images.shape == (20, 16, 16, 3)
    assert abs(float(small.train_images.float().mean() - d.train_images.float().mean())) < 1


def test_an_unpacked_folder(tmp_path):
    members = cifar_members(2)
    (tmp_path / FOLDER).mkdir()
    for name, content in members.items():
        (tmp_path / name).write_bytes(content)
    digest = download.folder_sha256(tmp_path / FOLDER)
    with pytest.raises(DataError, match=f"--data-sha256 {digest}"):
        load("cifar10", dir=tmp_path)
    unpacked = load("cifar10", dir=tmp_path, sha256=digest)
    packed = tar_gz(members)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(packed)
    assert unpacked.sha256 == load("cifar10", dir=tmp_path, sha256=sha256(packed)).sha256


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar100(tmp_path, protocol):
    names = [f"class_{c}" for c in range(100)]
    members = {"cifar-100-python/meta": pickle.dumps({"fine_label_names": names}, protocol)}
    for part, n in (("train", 200), ("test", 100)):
        content = {
            "data": np.resize(np.arange(251, dtype=np.uint8), (n, 3072)),
            "fine_labels": [i % 100 for i in range(n)],
            "coarse_labels": [0] * n,
        }
        members[f"cifar-100-python/{part}"] = pickle.dumps(content, protocol)
    d = load_archive(tar_gz(members), tmp_path, name="cifar100")
    assert len(d.class_names) == 100
    assert d.class_names[99] == "class 99"
    assert d.train_labels[-1] == 99
    assert len(d.test_labels) == 100


def test_labels_that_are_a_larger_array_become_no_list(tmp_path):
    """Of a byte each, they would take eight as a list."""
    labels = np.zeros(1 << 22, np.uint8)
    content = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": labels}, 2)
    members = {**cifar_members(2), f"{FOLDER}/data_batch_1": content}
    tracemalloc.start()
    with pytest.raises(DataError, match="has no 2 labels"):
        load_archive(tar_gz(members), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(labels)
