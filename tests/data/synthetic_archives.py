"""Small archives in the published formats."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_members(per_batch: int = 20, seed: int = 0) -> dict[str, bytes]:
    """Name -> content of an archive in CIFAR-10's format, pickled as Python 2 did it."""
    draw = np.random.default_rng(seed)
    members = {
        "cifar-10-batches-py/batches.meta": pickle.dumps({"label_names": NAMES}, protocol=2),
        "cifar-10-batches-py/readme.html": b"<html>",
    }
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = draw.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        members[f"cifar-10-batches-py/{name}"] = python_2_pickle(
            rows, [i % 10 for i in range(per_batch)]
        )
    return members


def python_2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """What the published batches hold, opcode by opcode: byte strings, the old module's name, a
    list of file names.
    """

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01"
    )
    array += (
        b"J"
        + struct.pack("<i", len(rows))
        + b"M"
        + struct.pack("<H", rows.shape[1])
        + b"\x86"
        + dtype
    )
    array += b"\x89T" + struct.pack("<i", rows.nbytes) + rows.tobytes() + b"tb"
    names = b"](" + b"".join(text(b"image_s_%06d.png" % i) for i in range(len(rows))) + b"e"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}("
        + text(b"batch_label")
        + text(b"batch")
        + text(b"labels")
        + numbers
        + text(b"data")
        + array
        + text(b"filenames")
        + names
        + b"u."
    )


def tar_gz(members: dict[str, bytes], level: int = 1) -> bytes:
    """The members as the bytes of a .tar.gz; without a time in it, so that equal members give equal
    bytes.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), level, mtime=0)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
