"""Folders of class folders of images as data sets."""

import os

import pytest
from loading import load
from PIL import Image

from semanticfl_ref.errors import DataError, UserError


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
    class_folders(tmp_path / "Testing", (2, 2, 2))
    fails("holds no train/ beside Testing")
    (tmp_path / "Testing").rename(tmp_path / "test")
    class_folders(tmp_path / "train", (2, 2))
    (tmp_path / "docs").mkdir()
    fails(r"holds parts \(test, train\) and other folders \(docs\)")
    (tmp_path / "docs").rename(tmp_path / "training")
    fails("train and training both look like the train part")
    (tmp_path / "training").rmdir()
    fails(r"different class folders \(kind 2\)")
    (tmp_path / "test" / "kind_2" / "0.png").unlink()
    (tmp_path / "test" / "kind_2" / "1.png").unlink()
    fails("kind_2 holds no image")
    (tmp_path / "train" / "kind_1" / "0.png").write_bytes(b"broken")
    fails("kind_1/0.png is not a readable image")
    class_folders(tmp_path / "few", (1, 1))
    fails("too few images", tmp_path / "few")
    class_folders(tmp_path / "twice", (2, 2))
    (tmp_path / "twice" / "kind_1").rename(tmp_path / "twice" / "kind 0")
    fails("two class folders are called 'kind 0'", tmp_path / "twice")
    class_folders(tmp_path / "alike", (2, 3))
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / "alike" / "kind_1" / f"{i}.png")
    fails("the 3 images of class folder .*kind_1 are all alike", tmp_path / "alike")


@pytest.mark.parametrize("style", ["{}", "{}_set", "seg_{}"])
@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing")])
def test_parts_in_usual_spellings(tmp_path, names, style):
    for name, counts in zip(names, ((4, 3), (2, 2)), strict=True):
        class_folders(tmp_path / style.format(name), counts)
    d = load("image_folder", dir=tmp_path)
    assert (len(d.train_labels), len(d.test_labels)) == (7, 4)
    assert d.class_names == ("kind 0", "kind 1")


def test_a_validation_folder(tmp_path):
    """It is the validation part; or the test part, where there is none."""
    class_folders(tmp_path / "train", (4, 3))
    class_folders(tmp_path / "val", (2, 2))
    d = load("image_folder", dir=tmp_path)
    assert (len(d.validation_labels), len(d.test_labels)) == (0, 4)
    assert d.notes[0].endswith("the validation part is the test part, since there is no other")
    class_folders(tmp_path / "test", (1, 2))
    d = load("image_folder", dir=tmp_path)
    assert (len(d.validation_labels), len(d.test_labels)) == (4, 3)
    with pytest.raises(UserError, match="has a validation part: leave it out"):
        load("image_folder", dir=tmp_path, validation_share=0.1)


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, (10, 10))
    (tmp_path / "kind_1").rename(tmp_path / "train")
    assert load("image_folder", dir=tmp_path).class_names == ("kind 0", "train")


def test_links_are_followed_and_other_files_are_counted(tmp_path):
    class_folders(tmp_path / "d", (10, 10))
    class_folders(tmp_path / "more", (5, 5))
    (tmp_path / "d" / "kind_0" / "linked").symlink_to(tmp_path / "more" / "kind_0")
    (tmp_path / "d" / "kind_0" / "up").symlink_to(tmp_path / "d" / "kind_0")
    Image.new("RGB", (9, 9), (0, 99, 0)).save(tmp_path / "d" / "kind_1" / "x.jfif", "JPEG")
    (tmp_path / "d" / "kind_0" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("a.txt", "b.txt", "c.xcf", "README"):
        (tmp_path / "d" / "kind_1" / name).write_text("")
    for litter in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (tmp_path / "d" / litter).mkdir()
    d = load("image_folder", dir=tmp_path / "d")
    assert len(d.train_labels) + len(d.test_labels) == 10 + 5 + 11
    note = f"passed over in {tmp_path / 'd'}: 2 .txt, 1 .xcf, 1 without suffix, 1 broken links"
    assert sorted(d.notes[0].split(": ")[1].split(", ")) == sorted(note.split(": ")[1].split(", "))


def test_every_unreadable_image_is_named_at_once(tmp_path):
    class_folders(tmp_path, (3, 3))
    for name in ("kind_0/0.png", "kind_1/0.png", "kind_1/2.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        load("image_folder", dir=tmp_path)
    text = str(caught.value)
    assert all(name in text for name in ("kind_0/0.png", "kind_1/0.png", "kind_1/2.png"))
    assert "0x" not in text, "no address of an object"
    for i in range(30):
        (tmp_path / "kind_0" / f"b{i}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"; and 13 more$"):
        load("image_folder", dir=tmp_path)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    class_folders(tmp_path, (2, 2))
    os.rename(tmp_path / "kind_1", os.fsencode(tmp_path) + b"/kind\xff")
    with pytest.raises(DataError, match="is not UTF-8: rename it"):
        load("image_folder", dir=tmp_path)


@pytest.mark.parametrize("inside", ["test/images", "test"])
def test_an_unlabelled_test_part_is_left_out(tmp_path, inside):
    """As TinyImageNet's prepared copies have it, and Kaggle's data sets."""
    for part, counts in (("train", (4, 3)), ("val", (2, 2))):
        for c, count in enumerate(counts):
            folder = tmp_path / part / f"n0000000{c}" / "images"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 9), (c, i, len(part))).save(folder / f"{i}.png")
    (tmp_path / inside).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / inside / "0.png")
    d = load("image_folder", dir=tmp_path)
    assert (len(d.train_labels), len(d.test_labels)) == (7, 4)
    assert "holds no class folders: left out, as unlabelled" in d.notes[0]
    assert "captions say nothing of them" in d.notes[2]


def test_test_images_that_train_are_told(tmp_path):
    class_folders(tmp_path / "train", (4, 4))
    class_folders(tmp_path / "test", (2, 2))
    assert load("image_folder", dir=tmp_path).notes == (
        "4 of 4 test images are training images too",
    )


def test_a_folder_per_client(tmp_path):
    """Clients may lack classes; the test part has the same layout."""
    class_folders(tmp_path / "train" / "ann", (3, 2))
    class_folders(tmp_path / "train" / "bob", (0, 4))
    (tmp_path / "train" / "bob" / "kind_0").rmdir()
    class_folders(tmp_path / "test" / "ann", (1, 1))
    d = load("image_folder", dir=tmp_path, clients_from="folder")
    assert d.class_names == ("kind 0", "kind 1")
    assert d.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert d.train_clients.tolist() == [0] * 5 + [1] * 4
    assert d.client_names == ("ann", "bob")
    with pytest.raises(UserError, match="image_folder accepts only `folder`"):
        load("image_folder", dir=tmp_path, clients_from="writer")


def test_clients_stay_with_their_images(tmp_path):
    """Through the parts that the seed chooses."""
    class_folders(tmp_path / "ann", (10, 10))
    for i in range(10):
        path = tmp_path / "bob" / "kind_1" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (0, i, 200)).save(path)
    d = load("image_folder", dir=tmp_path, clients_from="folder", validation_share=0.2)
    assert len(d.train_labels) == len(d.train_clients) < 30
    assert (d.train_images[:, 0, 0, 2] == 200 * d.train_clients).all()


def test_a_test_part_for_all_clients(tmp_path):
    """Class folders, of which some may be missing; parts inside clients are refused."""
    class_folders(tmp_path / "train" / "ann", (3, 2))
    class_folders(tmp_path / "train" / "bob", (1, 4))
    (tmp_path / "test" / "kind_1").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (12, 9), (i, 9, 9)).save(tmp_path / "test" / "kind_1" / f"{i}.png")
    d = load("image_folder", dir=tmp_path, clients_from="folder")
    assert d.test_labels.tolist() == [1, 1]
    for client in ("ann", "bob"):
        for part in ("train", "test"):
            class_folders(tmp_path / "inside" / client / part)
    with pytest.raises(DataError, match="does not hold a folder of class folders for every client"):
        load("image_folder", dir=tmp_path / "inside", clients_from="folder")
