"""The embedded data sets: digits, and digits as scenes."""

import runpy
from pathlib import Path

import pytest
import torch
from loading import load

from semanticfl_ref.data import digits
from semanticfl_ref.errors import DataError

ROOT = Path(__file__).parents[2]


def test_digits():
    d = load("digits")
    sizes = [len(labels) for labels in (d.train_labels, d.validation_labels, d.test_labels)]
    assert sum(sizes) == 1797
    assert sizes == pytest.approx([share * 1797 for share in digits.SHARES.values()], abs=5)
    assert d.train_images.shape == (sizes[0], 32, 32, 3)
    assert d.train_images.dtype == torch.uint8
    assert d.train_labels.dtype == torch.int64
    assert d.class_names[3] == "three"
    assert d.image_size == 32
    for labels in (d.train_labels, d.validation_labels, d.test_labels):
        counts = labels.bincount(minlength=10).double() / len(labels)
        assert (counts - 0.1).abs().max() < 0.01
    images = torch.cat([d.train_images, d.validation_images, d.test_images]).flatten(1)
    assert len(images.unique(dim=0)) == len(images), "no digit is in two parts"
    assert (d.train_images[..., 0] == d.train_images[..., 1]).all()


def test_digit_scenes():
    plain, d = load("digits"), load("digit-scenes", seed=7)
    for part, repeats in digits.SCENES_PER_DIGIT.items():
        images, labels = d.tensors[f"{part}_images"], d.tensors[f"{part}_labels"]
        assert labels.equal(plain.tensors[f"{part}_labels"].repeat(repeats))
        assert images.shape == (len(labels), 32, 32, 3)
        assert len(images.flatten(1).unique(dim=0)) == len(images), "no two scenes are equal"
    other_seed = load("digit-scenes", seed=8)
    assert d.sha256 == other_seed.sha256, "the run's seed does not move the data"


def test_a_damaged_asset(monkeypatch, tmp_path):
    content = bytearray(digits.FILE.read_bytes())
    content[5000] ^= 1
    (tmp_path / "digits").write_bytes(content)
    for path in (tmp_path / "digits", tmp_path / "none"):
        monkeypatch.setattr(digits, "FILE", path)
        with pytest.raises(DataError, match="reinstall the package"):
            load("digits")


def test_the_asset_is_remade_byte_for_byte(tmp_path):
    pytest.importorskip("sklearn")
    main = runpy.run_path(str(ROOT / "scripts" / "make_digits.py"))["main"]
    main(tmp_path / "digits")
    assert (tmp_path / "digits").read_bytes() == digits.FILE.read_bytes()
