"""Small archives in the published formats."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable

import numpy as np

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDER = "cifar-10-batches-py"
PARTS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def python_2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """What the published batches hold, opcode by opcode: byte strings, NumPy 1's module names."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01"
    array += b"J" + struct.pack("<i", len(rows)) + b"M" + struct.pack("<H", rows.shape[1])
    array += b"\x86" + dtype
    array += b"\x89T" + struct.pack("<i", rows.nbytes) + rows.tobytes() + b"tb"
    names = b"](" + b"".join(text(b"image_s_%06d.png" % i) for i in range(len(rows))) + b"e"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"batch_label") + text(b"batch") + text(b"labels") + numbers
    items += text(b"data") + array + text(b"filenames") + names
    return b"\x80\x02}(" + items + b"u."


def cifar_members(
    per_batch: int = 20,
    seed: int = 0,
    dump: Callable[[np.ndarray, list[int]], bytes] = python_2_pickle,
) -> dict[str, bytes]:
    """Name -> content of an archive in CIFAR-10's format; `dump` pickles its rows and labels."""
    source = np.random.default_rng(seed)
    members = {
        f"{FOLDER}/batches.meta": pickle.dumps({"label_names": NAMES}, protocol=2),
        f"{FOLDER}/readme.html": b"<html>",
    }
    for name in PARTS:
        rows = source.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        members[f"{FOLDER}/{name}"] = dump(rows, [i % 10 for i in range(per_batch)])
    return members


def tar_gz(members: dict[str, bytes], level: int = 1) -> bytes:
    """The members as the bytes of a .tar.gz without a time: equal members give equal bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), level, mtime=0)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
