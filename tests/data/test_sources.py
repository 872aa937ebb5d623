"""Every data set's way from raw files to resident tensors."""

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_archives import NAMES, cifar_members, sha256, tar_gz

from semanticfl_ref.data import dataset as sources
from semanticfl_ref.data import download as fetch
from semanticfl_ref.data.dataset import load_dataset, stratified
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator


def test_digits():
    d = load_dataset("digits")
    sizes = [len(x) for x in (d.train_labels, d.validation_labels, d.test_labels)]
    assert sum(sizes) == 1797 and sizes == pytest.approx(
        [share * 1797 for share in sources.DIGITS_SHARES], abs=5
    )
    assert (
        d.train_images.shape == (sizes[0], 32, 32, 3)
        and d.train_images.dtype == torch.uint8
        and d.train_labels.dtype == torch.int64
    )
    assert d.class_names[3] == "three" and d.image_size == 32
    for labels in (d.train_labels, d.validation_labels, d.test_labels):
        counts = labels.bincount(minlength=10).double() / len(labels)
        assert (counts - 0.1).abs().max() < 0.01
    images = torch.cat([d.train_images, d.validation_images, d.test_images]).flatten(1)
    assert len(images.unique(dim=0)) == len(images), "no digit is in two parts"
    assert (d.train_images[..., 0] == d.train_images[..., 1]).all()


def test_digit_scenes():
    plain, d = load_dataset("digits"), load_dataset("digit-scenes", seed=7)
    for part, repeats in sources.SCENES_PER_DIGIT.items():
        images, labels, digits = (
            getattr(d, f"{part}_images"),
            getattr(d, f"{part}_labels"),
            getattr(plain, f"{part}_labels"),
        )
        assert labels.equal(digits.repeat(repeats)) and images.shape == (len(labels), 32, 32, 3)
        assert len(images.flatten(1).unique(dim=0)) == len(images), (
            "every repeat is a scene of its own"
        )
    assert d.sha256 == load_dataset("digit-scenes", seed=8).sha256, (
        "the run's seed does not move the data"
    )


def test_a_damaged_asset(monkeypatch, tmp_path):
    content = bytearray(sources.DIGITS_FILE.read_bytes())
    content[5000] ^= 1
    (tmp_path / "digits").write_bytes(content)
    for path in (tmp_path / "digits", tmp_path / "none"):
        monkeypatch.setattr(sources, "DIGITS_FILE", path)
        with pytest.raises(DataError, match="install the package again"):
            load_dataset("digits")


def test_the_asset_is_remade_byte_for_byte(tmp_path):
    pytest.importorskip("sklearn")
    from semanticfl_ref.data.make_digits import main

    main(tmp_path / "digits")
    assert (tmp_path / "digits").read_bytes() == sources.DIGITS_FILE.read_bytes()


def test_cifar10(tmp_path, cifar):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(cifar)
    d = load_dataset("cifar10", data_dir=tmp_path, data_sha256=sha256(cifar))
    assert (
        d.train_images.shape == (100, 32, 32, 3)
        and d.test_images.shape == (20, 32, 32, 3)
        and len(d.validation_labels) == 0
    )
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)  # the first batch
    assert d.train_images[7, 3, 5].tolist() == [
        int(rows[7, 1024 * channel + 32 * 3 + 5]) for channel in range(3)
    ]
    assert d.class_names == tuple(NAMES) and d.train_labels[:12].tolist() == [*range(10), 0, 1]
    held = load_dataset(
        "cifar10", data_dir=tmp_path, data_sha256=sha256(cifar), validation_share=0.2, seed=3
    )
    assert (
        held.validation_labels.bincount().tolist() == [2] * 10
        and held.train_labels.bincount().tolist() == [8] * 10
    )
    assert held.test_images.equal(d.test_images) and held.sha256 != d.sha256
    seen = torch.cat([held.train_images, held.validation_images]).flatten(1)
    assert seen.unique(dim=0).equal(d.train_images.flatten(1).unique(dim=0))
    small = load_dataset("cifar10", data_dir=tmp_path, data_sha256=sha256(cifar), image_size=16)
    assert small.image_size == 16 and small.test_images.shape == (20, 16, 16, 3)
    assert abs(float(small.train_images.float().mean() - d.train_images.float().mean())) < 1


def test_an_unpacked_folder(tmp_path):
    members = cifar_members(2)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, content in members.items():
        (tmp_path / name).write_bytes(content)
    digest = fetch.folder_sha256(tmp_path / "cifar-10-batches-py")
    with pytest.raises(DataError, match=f"--data-sha256 {digest}"):
        load_dataset("cifar10", data_dir=tmp_path)
    unpacked = load_dataset("cifar10", data_dir=tmp_path, data_sha256=digest)
    packed = tar_gz(members)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(packed)
    assert (
        unpacked.sha256
        == load_dataset("cifar10", data_dir=tmp_path, data_sha256=sha256(packed)).sha256
    )


def test_cifar100(tmp_path):
    import pickle

    names = [f"class_{c}" for c in range(100)]
    members = {"cifar-100-python/meta": pickle.dumps({"fine_label_names": names}, 2)}
    for part, n in (("train", 200), ("test", 100)):
        content = {
            "data": np.zeros((n, 3072), np.uint8),
            "fine_labels": [i % 100 for i in range(n)],
            "coarse_labels": [0] * n,
        }
        members[f"cifar-100-python/{part}"] = pickle.dumps(content, 2)
    content = tar_gz(members)
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(content)
    d = load_dataset("cifar100", data_dir=tmp_path, data_sha256=sha256(content))
    assert (
        len(d.class_names) == 100
        and d.class_names[99] == "class 99"
        and d.train_labels[-1] == 99
        and len(d.test_labels) == 100
    )


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    mode = "L" if value % 50 == 0 else "RGB"  # the published zip has grey images too
    Image.new(mode, (8, 8), value if mode == "L" else (value, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def tiny_zip(path, per_class: int = 50, drop: str = "") -> str:
    """A zip in TinyImageNet's layout: 200 classes, two training images each."""
    root, synsets = "tiny-imagenet-200", [f"n{c:08d}" for c in range(200)]
    images, annotations = [jpeg(c) for c in range(200)], []
    with zipfile.ZipFile(path, "w") as archive:
        for c, synset in enumerate(synsets):
            archive.writestr(f"{root}/train/{synset}/{synset}_boxes.txt", "x")
            for i in range(2):
                archive.writestr(f"{root}/train/{synset}/images/{synset}_{i}.JPEG", images[c])
            for i in range(per_class):
                archive.writestr(f"{root}/val/images/val_{c * per_class + i}.JPEG", images[c])
                annotations.append(f"val_{c * per_class + i}.JPEG\t{synset}\t0\t0\t1\t1")
        archive.writestr(f"{root}/test/images/test_0.JPEG", b"never read")
        lists = {
            "val/val_annotations.txt": "\n".join(annotations[::-1]),
            "wnids.txt": "\n".join(synsets[::-1]),
        }
        lists["words.txt"] = "\n".join(
            f"{synset}\tthing {c}, other name" for c, synset in enumerate(synsets)
        )
        for name, text in lists.items():
            if name != drop:
                archive.writestr(f"{root}/{name}", text)
    return fetch.file_sha256(path)


def test_tinyimagenet(tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    d = load_dataset("tinyimagenet", data_dir=tmp_path, image_size=8, data_sha256=tiny_zip(path))
    assert (
        d.train_images.shape == (400, 8, 8, 3)
        and d.test_images.shape == (10000, 8, 8, 3)
        and d.class_names[7] == "thing 7"
    )
    assert (d.test_labels.bincount() == 50).all() and (d.train_labels.bincount() == 2).all()
    red = d.test_images[:, 4, 4, 0].double()
    assert (red - d.test_labels).abs().max() <= 4, "each image keeps its own label"


@pytest.mark.parametrize(
    "options, words",
    [({"per_class": 1}, "200 classes"), ({"per_class": 1, "drop": "words.txt"}, "words.txt")],
)
def test_tinyimagenet_incomplete(options, words, tmp_path):
    digest = tiny_zip(tmp_path / "tiny-imagenet-200.zip", **options)
    with pytest.raises(DataError, match=words):
        load_dataset("tinyimagenet", data_dir=tmp_path, image_size=8, data_sha256=digest)


def class_folders(folder, counts=(10, 5), size=(12, 9)):
    for c, n in enumerate(counts):
        (folder / f"kind_{c}").mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, (c * 100, i, 0)).save(folder / f"kind_{c}" / f"{i}.png")
    return folder


def test_folder_split_by_seed(tmp_path):
    class_folders(tmp_path / "all")
    (tmp_path / "all" / "kind_0" / "notes.txt").write_text("not an image")
    d = load_dataset("folder", data_dir=tmp_path / "all", seed=1)
    assert (
        d.class_names == ("kind 0", "kind 1")
        and d.train_images.shape == (12, 32, 32, 3)
        and d.test_labels.tolist() == [0, 0, 1]
    )
    assert (d.train_images[:, 0, 0, 0] == 100 * d.train_labels).all()
    again, other = (
        load_dataset("folder", data_dir=tmp_path / "all", seed=seed).sha256 for seed in (1, 2)
    )
    assert again == d.sha256 != other


def test_folder_with_train_and_test(tmp_path):
    class_folders(tmp_path / "train", (3, 4))
    class_folders(tmp_path / "test", (2, 1))
    d = load_dataset("folder", data_dir=tmp_path, image_size=8)
    assert (
        d.train_labels.tolist() == [0] * 3 + [1] * 4
        and d.test_labels.tolist() == [0, 0, 1]
        and d.image_size == 8
    )


def test_folder_bad_input(tmp_path):
    def fails(words, folder=tmp_path):
        with pytest.raises(DataError, match=words):
            load_dataset("folder", data_dir=folder)

    fails("is not a folder", tmp_path / "none")
    fails("0 class folders")
    class_folders(tmp_path / "train", (2, 2))
    fails("has train/ but not")
    class_folders(tmp_path / "test", (2, 2, 2))
    fails("differ in class folders: kind 2")
    (tmp_path / "test" / "kind_2" / "0.png").unlink()
    (tmp_path / "test" / "kind_2" / "1.png").unlink()
    fails("kind_2 holds no image")
    (tmp_path / "train" / "kind_1" / "0.png").write_bytes(b"broken")
    fails("kind_1/0.png is not a readable image")
    class_folders(tmp_path / "few", (1, 1))
    fails("too few images", tmp_path / "few")


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("cifar-10", {}, "did you mean 'cifar10'"),
        ("digits", {"data_dir": "x"}, "in the package"),
        ("folder", {}, "needs --data-dir"),
        ("digits", {"validation_share": 1.0}, "validation_share"),
    ],
)
def test_options_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        load_dataset(name, **options)


def test_stratified():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    parts = stratified(labels, (0.5, 0.2, 0.3), generator(0, "test"))
    assert torch.cat(parts).sort().values.equal(torch.arange(16)) and all(
        p.equal(p.sort().values) for p in parts
    )
    assert [labels[p].bincount(minlength=3).tolist() for p in parts] == [
        [5, 2, 1],
        [2, 2, 0],
        [3, 1, 0],
    ]


def test_the_hash_covers_everything(tmp_path):
    d = load_dataset("digits")
    tensors = {name: value for name, value in vars(d).items() if isinstance(value, torch.Tensor)}
    assert sources.content_sha256(d.class_names, tensors) == d.sha256
    for name in tensors:
        changed = replace(d, **{name: tensors[name].flip(0)})
        assert (
            sources.content_sha256(d.class_names, {n: getattr(changed, n) for n in tensors})
            != d.sha256
        )
    assert sources.content_sha256(d.class_names[::-1], tensors) != d.sha256
