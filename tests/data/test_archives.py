"""Damaged and hostile archives: refused by name, nothing run, nothing written, no memory taken on
an archive's word.
"""

import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
from synthetic_archives import cifar_members, python_2_pickle, sha256, tar_gz

from semanticfl_ref.data import archives
from semanticfl_ref.data.dataset import load_dataset
from semanticfl_ref.errors import DataError

BATCH = "cifar-10-batches-py/data_batch_3"


def load(content: bytes, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    return load_dataset("cifar10", data_dir=tmp_path, data_sha256=sha256(content))


def refused(content: bytes, tmp_path, words: str):
    with pytest.raises(DataError, match=words) as caught:
        load(content, tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Runs(), protocol=2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [Runs()]}, protocol=4),
        b'c__builtin__\neval\n(S\'open("ran", "w")\'\ntR.',
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'dumps'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"(S'touch ran'\nios\nsystem\n.",
        b"cnumpy\ndtype\n(S'u1'\ntR}S'code'\nS'x'\nsb.",
        b"cnumpy\ndtype\n}S'a'\nS'b'\nsb.",
        b"\x80\x02cnumpy\ndtype\nU\x01Otc.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # BYTEARRAY8 of a terabyte
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo index of two thousand million
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
        b"",
    ],
)
def test_hostile_pickles_run_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = {**cifar_members(2), BATCH: content}
    refused(tar_gz(members), tmp_path, "data_batch_3")
    assert not (tmp_path / "ran").exists()


def test_a_key_that_takes_for_ever_to_hash():
    nested = b"N" + b"2\x86" * 60  # DUP, TUPLE2: 2^60 leaves
    began = time.monotonic()
    with pytest.raises(DataError, match="names"):
        archives.unpickle(b"\x80\x02}" + nested + b"Ns.", "here")
    assert time.monotonic() - began < 1


def test_python_2_pickles_as_published():
    """The published files were written by Python 2: byte strings, the old module's name,
    three-letter state.
    """
    rows = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)

    content = python_2_pickle(rows, [6, 9])
    pickletools.dis(content, out=io.StringIO())
    read = archives.unpickle(content, "here")
    assert (
        np.array_equal(read["data"], rows)
        and read["labels"] == [6, 9]
        and read["batch_label"] == b"batch"
    )


@pytest.mark.parametrize("protocol", [1, 2, 3, 4])
def test_pickles_of_python_3(protocol):
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
    read = archives.unpickle(
        pickle.dumps({"data": rows, "labels": [1, 2]}, protocol=protocol), "here"
    )
    assert np.array_equal(read["data"], rows) and read["labels"] == [1, 2]


@pytest.mark.parametrize(
    "array",
    [
        np.array([None], object),
        np.zeros(3),
        np.zeros((2, 2), "u1", order="F"),
        np.zeros(2, ">i4"),
        np.zeros(2, "U5"),
    ],
)
def test_arrays_of_other_kinds(array):
    with pytest.raises(DataError, match="refused"):
        archives.unpickle(pickle.dumps({"data": array}, protocol=2), "here")


def test_single_bytes_of_a_pickle_damaged():
    """A checksum would have caught these; without one, damage is a DataError or a dict, never
    another exception.
    """
    good = bytearray(cifar_members(2)[BATCH])
    draw = np.random.default_rng(0)
    head = [*range(200), *range(len(good) - 60, len(good))]
    for position in [p for p in head for _ in range(3)]:
        bad = bytearray(good)
        bad[position] ^= int(draw.integers(1, 256))
        try:
            assert isinstance(archives.unpickle(bytes(bad), "here"), dict)
        except DataError:
            pass


def test_damaged_archives_are_named_or_harmless(cifar, tmp_path):
    whole = load(cifar, tmp_path).sha256
    draw = np.random.default_rng(1)
    outcomes = {"refused": 0, "harmless": 0}
    for position in [
        *range(12),
        *draw.integers(12, len(cifar), 30).tolist(),
        *range(len(cifar) - 8, len(cifar)),
    ]:
        bad = bytearray(cifar)
        bad[position] ^= 1 << int(draw.integers(8))
        try:
            assert load(bytes(bad), tmp_path).sha256 == whole
            outcomes["harmless"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert outcomes["refused"] >= 38 and outcomes["harmless"] <= 12, (
        outcomes
    )  # gzip's time and system bytes mean nothing
    for cut in (0, 5, 100, len(cifar) // 2, len(cifar) - 1, len(cifar) - 9):
        refused(cifar[:cut], tmp_path, "cifar-10-python.tar.gz")


@pytest.mark.parametrize(
    "name", ["../escaped", "/tmp/escaped", "cifar-10-batches-py/../../escaped", "a\\..\\b"]
)
def test_a_path_that_leaves_the_archive(name, tmp_path):
    refused(tar_gz({**cifar_members(2), name: b"x"}), tmp_path, "leaves the archive")
    assert not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices(kind, tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo(BATCH)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    refused(gzip.compress(stream.getvalue()), tmp_path, "link, device")


def test_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "TAR_BYTES", 1 << 20)
    refused(tar_gz({"filler": bytes(2 << 20)}), tmp_path, "refused")
    refused(gzip.compress(tar_plain({"a": b"x"}) + bytes(3 << 20)), tmp_path, "unpacks to more")
    header = tarfile.TarInfo("long")
    header.size, header.type = 1 << 40, tarfile.XHDTYPE  # an extended header that claims a terabyte
    refused(gzip.compress(header.tobuf() + bytes(2 << 20)), tmp_path, "refused|damaged")


def tar_plain(members) -> bytes:
    return gzip.decompress(tar_gz(members))


@pytest.mark.parametrize(
    "change, words",
    [
        ({BATCH: None}, "lacks data_batch_3"),
        ({"cifar-10-batches-py/batches.meta": None}, "lacks batches.meta"),
        ({BATCH: pickle.dumps([1])}, "list where a dict"),
        ({BATCH: pickle.dumps({"labels": [1]})}, "no data of shape"),
        (
            {BATCH: pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}, 2)},
            "no data of shape",
        ),
        (
            {BATCH: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, 2)},
            "no 2 labels",
        ),
        (
            {BATCH: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}, 2)},
            "between 0 and 9",
        ),
        (
            {BATCH: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, True]}, 2)},
            "between 0 and 9",
        ),
        (
            {"cifar-10-batches-py/batches.meta": pickle.dumps({"label_names": ["a"]})},
            "no 10 label_names",
        ),
    ],
)
def test_archives_of_another_content(change, words, tmp_path):
    members = {**cifar_members(2), **change}
    refused(
        tar_gz({name: content for name, content in members.items() if content is not None}),
        tmp_path,
        words,
    )


def zipped(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def every(path):
    return dict(archives.members(path, lambda name: True))


def test_zip_members(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", {"x/a.txt": b"one", "x/b.txt": b"two" * 1000})
    assert every(path) == {"x/a.txt": b"one", "x/b.txt": b"two" * 1000}
    good = path.read_bytes()
    for position in range(0, len(good)):
        bad = bytearray(good)
        bad[position] ^= 255
        path.write_bytes(bad)
        try:
            names = every(path)
            assert all(
                content in (b"one", b"two" * 1000) for content in names.values()
            )  # a name may change; content may not
        except DataError:
            pass
    with pytest.raises(DataError, match="leaves the archive"):
        every(zipped(path, {"../a": b"x"}))
    monkeypatch.setattr(archives, "ZIP_MEMBER_BYTES", 1000)
    with pytest.raises(DataError, match="refused"):
        every(zipped(path, {"a": bytes(1001)}))
    monkeypatch.setattr(archives, "ZIP_ENTRIES", 1)
    with pytest.raises(DataError, match="refused"):
        every(zipped(path, {"a": b"", "b": b""}))


def test_a_zip_that_lies_about_a_size(tmp_path):
    """The entry unpacks to 64 MiB and claims ten bytes: no more than a little is unpacked."""
    import tracemalloc

    path = zipped(tmp_path / "a.zip", {"a": bytes(64 << 20)})
    content = path.read_bytes().replace(struct.pack("<I", 64 << 20), struct.pack("<I", 10))
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="damaged"):
        every(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_images(tmp_path):
    from PIL import Image

    def png(image, **options) -> bytes:
        stream = io.BytesIO()
        image.save(stream, "PNG", **options)
        return stream.getvalue()

    wide = png(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 3))))
    assert archives.decode_image(wide, "w", None).shape == (20, 40, 3)
    assert archives.decode_image(wide, "w", 8).shape == (8, 8, 3)
    assert (
        archives.decode_image(png(Image.new("L", (8, 8), 7)), "g", None).tolist()
        == np.full((8, 8, 3), 7).tolist()
    )
    assert archives.decode_image(png(Image.new("LA", (8, 8))), "g", 4).shape == (4, 4, 3)
    for bad, words in (
        (wide[:60], "readable"),
        (b"", "readable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "readable"),
        (png(Image.new("I;16", (4, 4))), "8 bits"),
    ):
        with pytest.raises(DataError, match=f"the file.*{words}"):
            archives.decode_image(bad, "the file", None)


def test_an_image_of_too_many_pixels(monkeypatch):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (100, 100)).save(stream, "PNG")
    monkeypatch.setattr(archives, "IMAGE_PIXELS", 9999)
    with pytest.raises(DataError, match="100 x 100"):
        archives.decode_image(stream.getvalue(), "here", None)
