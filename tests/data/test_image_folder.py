"""Folders of class folders of images as data sets."""

import pytest
from loading import load
from PIL import Image

from semanticfl_ref.errors import DataError


def class_folders(folder, counts=(10, 5), size=(12, 9)):
    """Class c has red 100 c; its image i has green i."""
    for c, n in enumerate(counts):
        (folder / f"kind_{c}").mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, (c * 100, i, 0)).save(folder / f"kind_{c}" / f"{i}.png")
    return folder


def test_a_test_part_is_chosen_by_the_seed(tmp_path):
    class_folders(tmp_path / "all")
    (tmp_path / "all" / "kind_0" / "notes.txt").write_text("not an image")
    d = load("image_folder", dir=tmp_path / "all", seed=1)
    assert d.class_names == ("kind 0", "kind 1")
    assert d.train_images.shape == (12, 32, 32, 3)
    assert d.test_labels.tolist() == [0, 0, 1]
    assert (d.train_images[:, 0, 0, 0] == 100 * d.train_labels).all()
    again = load("image_folder", dir=tmp_path / "all", seed=1)
    other = load("image_folder", dir=tmp_path / "all", seed=2)
    assert again.sha256 == d.sha256 != other.sha256


def test_a_folder_with_train_and_test(tmp_path):
    class_folders(tmp_path / "train", (3, 4))
    class_folders(tmp_path / "test", (2, 1))
    d = load("image_folder", dir=tmp_path, image_size=9)
    assert d.train_labels.tolist() == [0] * 3 + [1] * 4
    assert d.test_labels.tolist() == [0, 0, 1]
    assert d.image_size == 9


def test_the_order_of_the_images(tmp_path):
    """By class folder, then by path, compared folder by folder; hidden files are left out."""
    order = ["b/10.png", "b/9.png", "b/a/0.png", "c/B.png", "c/a.png"]
    for i, name in enumerate(order):
        for part in ("train", "test"):
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / part / name)
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "b" / ".hidden.png")
    (tmp_path / "train" / ".git").mkdir()
    d = load("image_folder", dir=tmp_path, image_size=9)
    assert d.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert d.train_labels.tolist() == [0, 0, 0, 1, 1]


def test_folders_that_are_refused(tmp_path):
    def fails(words, folder=tmp_path):
        with pytest.raises(DataError, match=words):
            load("image_folder", dir=folder)

    fails("is not a folder", tmp_path / "none")
    fails("0 class folders")
    class_folders(tmp_path / "train", (2, 2))
    fails("only one of train/ and test/")
    class_folders(tmp_path / "test", (2, 2, 2))
    fails(r"different class folders \(kind 2\)")
    (tmp_path / "test" / "kind_2" / "0.png").unlink()
    (tmp_path / "test" / "kind_2" / "1.png").unlink()
    fails("kind_2 holds no image")
    (tmp_path / "train" / "kind_1" / "0.png").write_bytes(b"broken")
    fails("kind_1/0.png is not a readable image")
    class_folders(tmp_path / "few", (1, 1))
    fails("too few images", tmp_path / "few")
