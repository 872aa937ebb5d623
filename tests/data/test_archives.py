"""Damaged and hostile archives: refused by name, nothing written, memory bounded."""

import contextlib
import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from loading import load_archive
from PIL import Image
from synthetic_archives import cifar_members, tar_gz

from semanticfl_ref.data import archives
from semanticfl_ref.errors import DataError

BATCH = "cifar-10-batches-py/data_batch_3"
META = "cifar-10-batches-py/batches.meta"


def refused(content: bytes, tmp_path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_archive(content, tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_damaged_archives_are_named_or_harmless(cifar, tmp_path):
    whole = load_archive(cifar, tmp_path).sha256
    source = np.random.default_rng(1)
    outcomes = {"refused": 0, "harmless": 0}
    inside = source.integers(12, len(cifar), 30).tolist()
    for position in [*range(12), *inside, *range(len(cifar) - 8, len(cifar))]:
        bad = bytearray(cifar)
        bad[position] ^= 1 << int(source.integers(8))
        try:
            assert load_archive(bytes(bad), tmp_path).sha256 == whole
            outcomes["harmless"] += 1
        except DataError:
            outcomes["refused"] += 1
    # gzip's time and system bytes mean nothing.
    assert outcomes["refused"] >= 38, outcomes
    assert outcomes["harmless"] <= 12, outcomes
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
    monkeypatch.setattr(archives._Bounded, "left", 1 << 20)
    refused(tar_gz({"filler": bytes(2 << 20)}), tmp_path, "refused")
    plain = gzip.decompress(tar_gz({"a": b"x"}))
    refused(gzip.compress(plain + bytes(3 << 20)), tmp_path, "unpacks to more")
    header = tarfile.TarInfo("long")
    header.size, header.type = 1 << 40, tarfile.XHDTYPE  # an extended header of a terabyte
    refused(gzip.compress(header.tobuf() + bytes(2 << 20)), tmp_path, "refused|damaged")


def test_a_sparse_file_that_claims_a_terabyte(tmp_path):
    """Its holes take no place in the archive, and would all be filled in memory."""
    header = tarfile.TarInfo(BATCH)
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = tarfile.itn(1 << 40, 12, tarfile.GNU_FORMAT)  # the size with its holes
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    refused(gzip.compress(bytes(block) + bytes(1024)), tmp_path, "claims 1099511627776 bytes")


def pickled(**values) -> bytes:
    return pickle.dumps(values, protocol=2)


def rows(count: int = 2, width: int = 3072) -> np.ndarray:
    return np.zeros((count, width), np.uint8)


@pytest.mark.parametrize(
    "change, words",
    [
        ({BATCH: None}, "lacks data_batch_3"),
        ({META: None}, "lacks batches.meta"),
        ({BATCH: pickle.dumps([1])}, "a pickle of a list, not of a dict"),
        ({BATCH: pickled(labels=[1])}, "no data of shape"),
        ({BATCH: pickled(data=rows(width=3071), labels=[1, 2])}, "no data of shape"),
        ({BATCH: pickled(data=rows(), labels=[1])}, "no 2 labels"),
        ({BATCH: pickled(data=rows(), labels=[1, 10])}, "between 0 and 9"),
        ({BATCH: pickled(data=rows(), labels=[1, True])}, "between 0 and 9"),
        ({META: pickled(label_names=["a"])}, "no 10 label_names"),
    ],
)
def test_archives_of_another_content(change, words, tmp_path):
    members = {**cifar_members(2), **change}
    present = {name: content for name, content in members.items() if content is not None}
    refused(tar_gz(present), tmp_path, words)


def zipped(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def every(path) -> dict[str, bytes]:
    return dict(archives.members(path, lambda name: True))


def test_zip_members(tmp_path):
    path = zipped(tmp_path / "a.zip", {"x/a.txt": b"one", "x/b.txt": b"two" * 1000})
    assert every(path) == {"x/a.txt": b"one", "x/b.txt": b"two" * 1000}


def test_single_bytes_of_a_zip_damaged(tmp_path):
    path = zipped(tmp_path / "a.zip", {"x/a.txt": b"one", "x/b.txt": b"two" * 1000})
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 255
        path.write_bytes(bad)
        with contextlib.suppress(DataError):
            # A name may change; content may not.
            assert all(content in (b"one", b"two" * 1000) for content in every(path).values())


def test_zips_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
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
    path = zipped(tmp_path / "a.zip", {"a": bytes(64 << 20)})
    content = path.read_bytes().replace(struct.pack("<I", 64 << 20), struct.pack("<I", 10))
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="damaged"):
        every(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_white(mode):
    """Black ink on a transparent ground stays ink, whatever is below the transparency."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        image, options = Image.new("P", (8, 8), 1), {"transparency": 1}
        image.putpalette([0, 0, 0, 90, 90, 90])
        image.paste(0, (0, 0, 4, 8))
    elif mode != "RGBA":
        image = image.convert(mode)
    content = saved(image, "TIFF" if mode == "PA" else "PNG", **options)
    pixels = archives.decode_image(content, "it", 8)
    assert (pixels[:, :4] == 0).all() and (pixels[:, 4:] == 255).all()


def test_sixteen_bits_of_grey_are_scaled():
    levels = np.array([[0, 255, 256, 65_535]], dtype=np.uint16).repeat(4, 0)
    pixels = archives.decode_image(saved(Image.fromarray(levels), "PNG"), "it", 4)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 255]


WIDE = png(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 3))))


def test_images():
    assert archives.decode_image(WIDE, "w", 8).shape == (8, 8, 3)
    square = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert np.array_equal(archives.decode_image(png(Image.fromarray(square)), "s", 8), square)
    grey = archives.decode_image(png(Image.new("L", (8, 8), 7)), "g", 8)
    assert grey.tolist() == np.full((8, 8, 3), 7).tolist()
    assert archives.decode_image(png(Image.new("LA", (8, 8))), "g", 4).shape == (4, 4, 3)


@pytest.mark.parametrize(
    "content, words",
    [
        (WIDE[:60], "readable"),
        (b"", "readable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "readable"),
        (saved(Image.new("F", (4, 4)), "TIFF"), "32 bits"),
    ],
)
def test_images_that_are_refused(content, words):
    with pytest.raises(DataError, match=f"the file.*{words}"):
        archives.decode_image(content, "the file", 8)


def test_an_image_of_too_many_pixels(monkeypatch):
    monkeypatch.setattr(archives, "IMAGE_PIXELS", 9999)
    with pytest.raises(DataError, match="100 x 100"):
        archives.decode_image(png(Image.new("L", (100, 100))), "here", 8)


def test_a_member_that_an_archive_holds_twice(tmp_path):
    """The last one would win, unseen."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in [*cifar_members(2).items(), (BATCH, b"")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    refused(gzip.compress(stream.getvalue()), tmp_path, f"holds '{BATCH}' twice")
