"""Files of arrays: idx and npz."""

import gzip
import struct

import numpy as np
import pytest
import torch
from loading import load

from semanticfl_ref.errors import DataError, UserError

IMAGES = np.arange(6 * 12 * 12, dtype=np.uint32).reshape(6, 12, 12).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.uint8)
KINDS = {"images": (IMAGES, 3), "labels": (LABELS, 1)}


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_idx(folder, prefixes=("train", "t10k"), name="{}-{}-idx{}-ubyte", pack=False):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in prefixes:
        for kind, (array, dimensions) in KINDS.items():
            file, content = folder / name.format(prefix, kind, dimensions), idx(array)
            file.write_bytes(content)
            if pack:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
    return folder


@pytest.mark.parametrize("name", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte"])
def test_mnist(tmp_path, name):
    """As published and as torchvision leaves it: unpacked beside packed, in a folder below."""
    write_idx(tmp_path / "MNIST" / "raw", name=name, pack=True)
    d = load("idx", dir=tmp_path)
    assert d.train_images.shape == (6, 12, 12, 3)
    assert d.train_images[..., 1].equal(torch.from_numpy(IMAGES))
    assert d.train_labels.tolist() == d.test_labels.tolist() == LABELS.tolist()
    assert d.class_names == ("0", "1", "2")
    assert any("data.class_names=FILE" in note for note in d.notes)


def test_emnist_is_turned_upright(tmp_path):
    """Its images are stored column by column, and its letters count from 1."""
    write_idx(tmp_path, ("emnist-letters-train", "emnist-letters-test"))
    labels = tmp_path / "emnist-letters-train-labels-idx1-ubyte"
    labels.write_bytes(idx(LABELS + 1))
    (tmp_path / "emnist-letters-test-labels-idx1-ubyte").write_bytes(idx(LABELS + 1))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    d = load("idx", dir=tmp_path, class_names=str(tmp_path / "names.txt"))
    assert d.train_images[..., 0].equal(torch.from_numpy(IMAGES).transpose(1, 2))
    assert d.train_labels.tolist() == LABELS.tolist()
    assert d.class_names == ("a", "b", "c")
    assert any("upright" in note for note in d.notes)


def test_idx_files_that_are_refused(tmp_path):
    def fails(words):
        with pytest.raises(DataError, match=words):
            load("idx", dir=tmp_path)

    fails("holds no files such as train-images")
    write_idx(tmp_path / "a")
    file = tmp_path / "a" / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content in (whole[:-1], whole + b"0", whole[:10], b"", whole[:4] + b"\xff" * 12):
        file.write_bytes(content)
        fails(r"train-images-idx3-ubyte is (damaged|no idx file)")
    file.unlink()
    fails("lacks the images of the train part")
    (tmp_path / "a" / f"{file.name}.gz").write_bytes(gzip.compress(whole)[:-9])
    fails("is damaged or incomplete")
    file.write_bytes(whole)
    write_idx(tmp_path / "b", ["train"])
    load("idx", dir=tmp_path)  # a copy
    (tmp_path / "b" / file.name).write_bytes(idx(IMAGES[::-1]))
    fails("both look like the images of the train part")


def write_npz(file, **changes):
    arrays = {"train_images": IMAGES, "train_labels": LABELS[:, None]}
    arrays |= {"test_images": IMAGES[:3], "test_labels": LABELS[:3, None]}
    np.savez(file, **{name: a for name, a in (arrays | changes).items() if a is not None})
    return file


def test_medmnist_and_keras(tmp_path):
    d = load("npz", dir=write_npz(tmp_path / "a.npz"))
    assert d.train_images[..., 2].equal(torch.from_numpy(IMAGES))
    assert d.train_labels.tolist() == LABELS.tolist()
    assert load("npz", dir=tmp_path).sha256 == d.sha256  # its folder
    keras = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:3], "y_test": LABELS[:3]}
    np.savez(tmp_path / "b.npz", **keras)
    assert load("npz", dir=tmp_path / "b.npz").sha256 == d.sha256
    sixteen = IMAGES.astype(np.uint16) * 256 + 7
    d16 = load("npz", dir=write_npz(tmp_path / "c.npz", train_images=sixteen))
    assert d16.sha256 == d.sha256
    coloured = np.stack([IMAGES, IMAGES // 2, IMAGES // 3], axis=3)
    d3 = load("npz", dir=write_npz(tmp_path / "d.npz", train_images=coloured))
    assert d3.train_images.equal(torch.from_numpy(coloured))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_images": IMAGES / 255}, "images float64"),
        ({"train_images": IMAGES[0]}, "expected integers of 8 or 16 bits"),
        ({"train_images": IMAGES[:, 2:]}, "10 x 12 pixels; crop them"),
        ({"train_labels": np.eye(3, dtype=int)[LABELS]}, "one integer per image"),
        ({"train_labels": LABELS[:4]}, "6 images and labels of shape"),
        ({"test_labels": LABELS[:3] + 7}, "the label 7, which no training image has"),
        ({"train_images": None}, "no arrays train_images"),
        ({"train_labels": LABELS * 0, "test_labels": LABELS[:3] * 0}, "two or more are needed"),
        ({"train_labels": np.array(3)}, "one integer per image"),
        ({"train_labels": np.array([{}] * 6)}, "no whole npz file of plain arrays"),
    ],
)
def test_npz_files_that_are_refused(tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        load("npz", dir=write_npz(tmp_path / "a.npz", **changes))


def test_a_damaged_npz_is_named(tmp_path):
    file = write_npz(tmp_path / "a.npz")
    whole = file.read_bytes()
    for content in (whole[:-30], whole[:100], b"", whole[:200] + b"\0" + whole[201:]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npz is no whole npz file"):
            load("npz", dir=file)


def test_natural_clients_of_an_array(tmp_path):
    writers = np.array(["b", "a", "b", "a", "b", "a"])
    d = load("npz", dir=write_npz(tmp_path / "a.npz", who=writers), clients_from="who")
    assert d.client_names == ("a", "b")
    assert d.train_clients.tolist() == [1, 0, 1, 0, 1, 0]
    with pytest.raises(DataError, match="no array 'nobody'"):
        load("npz", dir=tmp_path / "a.npz", clients_from="nobody")
    with pytest.raises(DataError, match="6 images and clients of shape"):
        load("npz", dir=write_npz(tmp_path / "b.npz", who=writers[1:]), clients_from="who")


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="idx needs --data-dir FOLDER"):
        load("idx")
    with pytest.raises(UserError, match="no information about clients"):
        load("idx", dir=write_idx(tmp_path), clients_from="who")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"2 different names, the data set has 3 classes \(0, 1, 2"):
        load("idx", dir=tmp_path, class_names=str(tmp_path / "names.txt"))


def test_several_sets_in_one_folder(tmp_path):
    """As EMNIST is published: a file of one chooses the set."""
    for name in ("letters", "digits"):
        write_idx(tmp_path, (f"emnist-{name}-train", f"emnist-{name}-test"))
    (tmp_path / "emnist-digits-train-images-idx3-ubyte").write_bytes(idx(IMAGES[::-1]))
    with pytest.raises(DataError, match="name one file of the set"):
        load("idx", dir=tmp_path)
    d = load("idx", dir=tmp_path / "emnist-letters-test-images-idx3-ubyte")
    assert d.train_images[..., 0].equal(torch.from_numpy(IMAGES).transpose(1, 2))


def test_an_empty_part_is_left_out(tmp_path):
    empty = {"test_images": IMAGES[:0], "test_labels": LABELS[:0]}
    validation = {"val_images": IMAGES[:2], "val_labels": LABELS[:2]}
    d = load("npz", dir=write_npz(tmp_path / "a.npz", **empty, **validation))
    assert d.test_labels.tolist() == [0, 1]
    assert any("the test part is empty: left out" in note for note in d.notes)


def test_twelve_bits_in_sixteen_are_told(tmp_path):
    twelve = IMAGES.astype(np.uint16) * 16
    d = load("npz", dir=write_npz(tmp_path / "a.npz", train_images=twelve.astype(">u2")))
    assert d.train_images.max() == 15
    assert any("no value above 4080" in note for note in d.notes)
