"""TinyImageNet's zip as a data set."""

import io
import zipfile

import pytest
from loading import load
from PIL import Image

from semanticfl_ref.errors import DataError
from semanticfl_ref.storage import file_sha256

SYNSETS = [f"n{c:08d}" for c in range(200)]


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    mode = "L" if value % 50 == 0 else "RGB"  # the published zip has grey images too
    Image.new(mode, (8, 8), value if mode == "L" else (value, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def tiny_zip(path, per_class: int = 50, drop: str = "", by_class: str = "") -> str:
    """A zip in TinyImageNet's layout, 200 classes of two training images; returns its SHA-256.

    Args:
        by_class: folder of a class's validation images, such as "val/{}"; "": as published.
    """
    root = "tiny-imagenet-200"
    images, annotations = [jpeg(c) for c in range(200)], []
    with zipfile.ZipFile(path, "w") as archive:
        for c, synset in enumerate(SYNSETS):
            archive.writestr(f"{root}/train/{synset}/{synset}_boxes.txt", "x")
            for i in range(2):
                archive.writestr(f"{root}/train/{synset}/images/{synset}_{i}.JPEG", images[c])
            for i in range(per_class):
                name = f"val_{c * per_class + i}.JPEG"
                place = by_class.format(synset) or "val/images"
                archive.writestr(f"{root}/{place}/{name}", images[c])
                annotations.append(f"{name}\t{synset}\t0\t0\t1\t1")
        archive.writestr(f"{root}/test/images/test_0.JPEG", b"never read")
        words = [f"{synset}\tthing {c}, other name" for c, synset in enumerate(SYNSETS)]
        lists = {
            "val/val_annotations.txt": "\n".join(annotations[::-1]),
            "wnids.txt": "\n".join(SYNSETS[::-1]),
            "words.txt": "\n".join(words),
        }
        for name, text in lists.items():
            if name != drop:
                archive.writestr(f"{root}/{name}", text)
    return file_sha256(path)


def test_tinyimagenet(tmp_path):
    digest = tiny_zip(tmp_path / "tiny-imagenet-200.zip")
    d = load("tinyimagenet", dir=tmp_path, image_size=9, sha256=digest)
    assert d.train_images.shape == (400, 9, 9, 3)
    assert d.test_images.shape == (10000, 9, 9, 3)
    assert d.class_names[7] == "thing 7"
    assert (d.test_labels.bincount() == 50).all()
    assert (d.train_labels.bincount() == 2).all()
    red = d.test_images[:, 4, 4, 0].double()
    assert (red - d.test_labels).abs().max() <= 4, "each image keeps its own label"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"per_class": 1}, "200 classes"),
        ({"per_class": 1, "drop": "words.txt"}, "words.txt"),
        ({"per_class": 1, "drop": "wnids.txt"}, "wnids.txt"),
        ({"per_class": 1, "drop": "val/val_annotations.txt"}, "val/val_annotations.txt"),
        ({"per_class": 0}, "lacks one of its lists, or an image"),
    ],
)
def test_tinyimagenet_incomplete(options, words, tmp_path):
    digest = tiny_zip(tmp_path / "tiny-imagenet-200.zip", **options)
    with pytest.raises(DataError, match=words):
        load("tinyimagenet", dir=tmp_path, image_size=9, sha256=digest)


def test_validation_images_sorted_by_class(tmp_path):
    """As most copies have them, without their list."""
    file, drop = tmp_path / "tiny-imagenet-200.zip", "val/val_annotations.txt"
    digest = tiny_zip(file, drop=drop, by_class="val/{}/images")
    d = load("tinyimagenet", dir=tmp_path, image_size=9, sha256=digest)
    assert (d.test_labels.bincount() == 50).all()
    red = d.test_images[:, 4, 4, 0].double()
    assert (red - d.test_labels).abs().max() <= 4, "each image keeps its own label"
