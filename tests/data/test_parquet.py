"""Hugging Face's tables: Parquet files, and what `save_to_disk` leaves."""

import io
import json

import numpy as np
import pytest
import torch
from loading import load
from PIL import Image

from semanticfl_ref.errors import DataError, UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(count=12, names=("cat", "dog"), **columns):
    cells = [{"bytes": png(5 * i), "path": f"{i}.png"} for i in range(count)]
    whole = pa.table({"image": cells, "label": [i % 2 for i in range(count)], **columns})
    if names is None:
        return whole
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    return whole.replace_schema_metadata(about)


def write(folder, whole=None, test=None):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table() if whole is None else whole, folder / "train-00000-of-00001.parquet")
    pq.write_table(table(4) if test is None else test, folder / "test-00000-of-00001.parquet")
    return folder


def check(d):
    assert d.class_names == ("cat", "dog")
    assert d.train_images.shape == (12, 32, 32, 3)
    assert d.train_images[:, 3, 3, 0].tolist() == [5 * i for i in range(12)]
    assert d.train_labels.tolist() == [0, 1] * 6
    assert d.test_labels.tolist() == [0, 1, 0, 1]


def test_a_repository_of_parquet_files(tmp_path):
    check(load("parquet", dir=write(tmp_path / "data").parent))


def test_save_to_disk(tmp_path):
    """Streams in a folder per part; caches of `map` beside them are no data."""
    for part, whole in (("train", table()), ("test", table(4))):
        (tmp_path / part).mkdir()
        file = tmp_path / part / "data-00000-of-00001.arrow"
        with pa.ipc.new_stream(file, whole.schema) as stream:
            stream.write_table(whole, max_chunksize=5)
        (tmp_path / part / "cache-0123.arrow").write_bytes(b"anything")
    check(load("parquet", dir=tmp_path))


def test_arrow_files_in_shards(tmp_path):
    """In the order of their names; without a test part a fifth of each class is chosen."""
    for shard in range(2):
        with pa.ipc.new_file(tmp_path / f"part-{shard}.arrow", table().schema) as file:
            file.write_table(table().slice(6 * shard, 6))
    d = load("parquet", dir=tmp_path)
    assert len(d.train_labels) == 10
    assert sorted(d.test_labels.tolist()) == [0, 1]


def test_labels_that_are_words(tmp_path):
    kinds = pa.array(["owl", "ant"] * 6)
    whole = table(names=None).drop_columns("label").append_column("kind", kinds)
    d = load("parquet", dir=write(tmp_path, whole, whole))
    assert d.class_names == ("ant", "owl")
    assert d.train_labels.tolist() == [1, 0] * 6


def test_a_part_without_labels_is_left_out(tmp_path):
    blind = table(4).set_column(1, "label", pa.array([-1] * 4))
    d = load("parquet", dir=write(tmp_path, test=blind))
    assert any("has no labels: left out" in note for note in d.notes)
    assert len(d.test_labels) == 2
    half = table(4).set_column(1, "label", pa.array([0, -1, 0, 1]))
    with pytest.raises(DataError, match="images of the test part have no label"):
        load("parquet", dir=write(tmp_path, test=half))


def test_columns_are_chosen(tmp_path):
    fine = table().rename_columns(["image", "fine"]).append_column("coarse", pa.array([0, 0] * 6))
    fine = fine.append_column("mask", pa.array([png(0)] * 12))
    write(tmp_path, fine, fine)
    with pytest.raises(DataError, match=r"2 columns fit; choose data\.image_column among image"):
        load("parquet", dir=tmp_path)
    with pytest.raises(DataError, match=r"2 columns fit; choose data\.label_column among"):
        load("parquet", dir=tmp_path, image_column="image")
    d = load("parquet", dir=tmp_path, image_column="image", label_column="fine")
    assert d.train_labels.tolist() == [0, 1] * 6
    with pytest.raises(DataError, match="column 'fin' does not fit; choose"):
        load("parquet", dir=tmp_path, image_column="image", label_column="fin")
    with pytest.raises(DataError, match="column 'mask' does not fit"):
        load("parquet", dir=tmp_path, image_column="image", label_column="mask")


def test_natural_clients_of_a_column(tmp_path):
    whole = table(domain=["photo", "sketch", "photo"] * 4)
    d = load("parquet", dir=write(tmp_path, whole, whole), clients_from="domain")
    assert d.client_names == ("photo", "sketch")
    assert d.train_clients.equal(torch.from_numpy(np.array([0, 1, 0] * 4)))
    features = {"domain": {"names": ["sea", "land"]}, "label": {"names": ["cat", "dog"]}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    coded = table(domain=[0, 1, 1] * 4).replace_schema_metadata(about)
    d = load("parquet", dir=write(tmp_path, coded), clients_from="domain")
    assert d.client_names == ("land", "sea")
    with pytest.raises(
        DataError, match=r"column 'writer' does not fit; choose data\.clients_from among"
    ):
        load("parquet", dir=tmp_path, clients_from="writer")


def test_what_is_refused(tmp_path):
    def fails(words, folder=tmp_path):
        with pytest.raises(DataError, match=words):
            load("parquet", dir=folder)

    fails("holds no .parquet or .arrow file")
    write(tmp_path / "a")
    write(tmp_path / "b")
    fails("both hold files of the")
    file = tmp_path / "a" / "train-00000-of-00001.parquet"
    whole = file.read_bytes()
    for content in (whole[:-20], b"", whole[:40] + bytes(40) + whole[80:]):
        file.write_bytes(content)
        fails(r"train-00000-of-00001\.parquet", tmp_path / "a")
    cells = pa.array([{"bytes": b"no image"}, {"bytes": None}, {"bytes": png(1)}] * 4)
    write(tmp_path / "a", table().set_column(0, "image", cells))
    fails("row 0 of the train part is not a readable image.*row 1 .*only its path", tmp_path / "a")


def test_pyarrow_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[parquet\]'"):
        load("parquet", dir=tmp_path)


def test_parts_agree(tmp_path):
    """A label's name decides, not its number; columns are those of the training part."""
    with pytest.raises(DataError, match="other names for its labels than the training part"):
        load("parquet", dir=write(tmp_path, test=table(4, names=("dog", "cat"))))
    kind = table().rename_columns(["image", "kind"])
    blind = table(4).rename_columns(["image", "id"])
    d = load("parquet", dir=write(tmp_path, kind, blind))
    assert any("has no labels: left out" in note for note in d.notes)
    pq.write_table(table(), tmp_path / "extra-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"extra-00000-of-00001\.parquet belongs to no part"):
        load("parquet", dir=tmp_path)


@pytest.mark.parametrize(
    "labels, names, words",
    [
        ([0, 2], ("a", "b"), "labels from 0 to 2, and names for 2"),
        ([-3, 1], ("a", "b"), "labels from -3 to 1, and names for 2"),
        ([0, 1], ("a", "a"), "two or more are needed, of other names"),
        ([0, 0], ("a", "b"), "two or more are needed"),
        ([b"\xff", b"a"], None, "damaged or incomplete"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, names, words):
    column = pa.array(labels * 6)
    if names is None:
        column = column.view(pa.string())
    whole = table(names=names).set_column(1, "label", column)
    with pytest.raises(DataError, match=words):
        load("parquet", dir=write(tmp_path, whole, whole))


@pytest.mark.parametrize("change", ["dictionary_encode", "to_view"])
def test_words_in_other_encodings(tmp_path, change):
    words = pa.array(["maple_tree", "ant"] * 6)
    encoded = (
        words.dictionary_encode() if change == "dictionary_encode" else words.cast("string_view")
    )
    whole = table(names=None).set_column(1, "label", encoded)
    d = load("parquet", dir=write(tmp_path, whole, whole))
    assert d.class_names == ("ant", "maple tree")


def test_every_training_image_has_a_client(tmp_path):
    whole = table(domain=["photo", None, "photo"] * 4)
    with pytest.raises(DataError, match="training image 1 has no domain"):
        load("parquet", dir=write(tmp_path, whole), clients_from="domain")
