"""Pickles: what Python and NumPy write is read; nothing else runs, or takes memory or time."""

import contextlib
import io
import os
import pickle
import pickletools
import time
import tracemalloc

import numpy as np
import pytest
from loading import load_archive
from synthetic_archives import FOLDER, NAMES, cifar_members, python_2_pickle, tar_gz

from semanticfl_ref.data import pickles
from semanticfl_ref.data.pickles import load_plain
from semanticfl_ref.errors import DataError

BATCH = f"{FOLDER}/data_batch_3"
PROTOCOLS = [1, 2, 3, 4, 5]
ROWS = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
ENCODE = b"c_codecs\nencode\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NESTED = b"N" + b"2\x86" * 60  # DUP, TUPLE2: 2^60 leaves


def numpy_2(content: bytes) -> bytes:
    return content


def numpy_1(content: bytes) -> bytes:
    """The same pickle with NumPy 1's module names; without frames, whose lengths would differ."""
    operations = list(pickletools.genops(content))
    ends = [start for _, _, start in operations[1:]] + [len(content)]
    pieces = []
    for (opcode, argument, start), end in zip(operations, ends, strict=True):
        piece = content[start:end]
        if opcode.name == "FRAME":
            continue
        if isinstance(argument, str) and argument.startswith("numpy._core"):
            piece = piece.replace(b"numpy._core", b"numpy.core", 1)
            if opcode.name == "SHORT_BINUNICODE":
                piece = bytes([piece[0], piece[1] - 1]) + piece[2:]
        pieces.append(piece)
    return b"".join(pieces)


def refused(content: bytes, words: str, seconds: float = 1.0) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        load_plain(content, "here")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < seconds


def peak_of(content: bytes, words: str) -> int:
    """Bytes of memory that a pickle takes until it is refused."""
    tracemalloc.start()
    refused(content, words, seconds=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# What is read.


def test_python_2_pickles_as_published():
    """Byte strings, NumPy 1's module names, a state of five."""
    content = python_2_pickle(ROWS, [6, 9])
    pickletools.dis(content, out=io.StringIO())
    read = load_plain(content, "here")
    assert np.array_equal(read["data"], ROWS)
    assert read["labels"] == [6, 9]
    assert read["batch_label"] == b"batch"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("names", [numpy_1, numpy_2])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("writable", [True, False])
def test_pickles_of_python_3(protocol, names, order, writable):
    rows = np.array(ROWS, order=order)
    rows.setflags(write=writable)
    values = {
        b"data": rows,
        "labels": [1, 2],
        b"scalars": [np.int64(3), np.uint8(200), np.int32(-1)],
        "array": np.arange(5),
        b"part": ROWS[:, ::1024],
        b"batch_label": b"",
        b"filenames": [b"a.png", b"\xff\x00"],
        "text": ["a.png", "\xe9"],
        "numbers": (1, 2.5, True, None, 10**30),
    }
    content = names(pickle.dumps(values, protocol))
    if protocol > 1:
        assert (b"numpy.core." in content) == (names is numpy_1)
    read = load_plain(content, "here")
    assert list(read) == [key if isinstance(key, str) else key.decode() for key in values]
    assert read["data"].dtype == np.uint8
    assert np.array_equal(read["data"], ROWS)
    assert read["scalars"] == [3, 200, -1]
    assert all(type(number) is int for number in read["scalars"])
    assert read["array"].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(read["part"], ROWS[:, ::1024])
    for name in ("labels", "text", "numbers"):
        assert read[name] == values[name]
    for name in ("batch_label", "filenames"):
        assert read[name] == values[name.encode()]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("names", [numpy_1, numpy_2])
def test_archives_of_python_3_are_the_published_ones(protocol, names, tmp_path):
    """Loaded with encoding="bytes" or "latin1", and pickled again; labels as what users make."""

    def same(values, write_labels):
        def dump(rows, labels):
            keys = ("data", "labels", "batch_label", "filenames")
            filenames = [b"image_%d.png" % i for i in range(len(rows))]
            contents = (np.asfortranarray(rows), write_labels(labels), b"", filenames)
            again = dict(zip(map(values, keys), contents, strict=True))
            return names(pickle.dumps(again, protocol))

        members = cifar_members(dump=dump)
        meta = {values("label_names"): [values(name) for name in NAMES]}
        members[f"{FOLDER}/batches.meta"] = pickle.dumps(meta, protocol)
        return load_archive(tar_gz(members), tmp_path).sha256

    published = load_archive(tar_gz(cifar_members()), tmp_path).sha256
    assert same(str.encode, list) == published
    assert same(str, list) == published
    assert same(str.encode, lambda labels: [np.int64(label) for label in labels]) == published
    assert same(str.encode, np.array) == published
    assert same(str, lambda labels: np.array(labels, np.uint8)) == published


@pytest.mark.parametrize("protocol", [2, 5])
def test_as_many_numpy_integers_as_cifar_100_has_labels(protocol):
    labels = [np.int64(i % 100) for i in range(50_000)]
    values = {"fine_labels": labels, "coarse_labels": list(labels), "filenames": [b"a"] * 50_000}
    read = load_plain(pickle.dumps(values, protocol), "here")
    assert read["fine_labels"][:101] == [*range(100), 0]
    assert len(read["coarse_labels"]) == 50_000


# What is refused.


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
        *(pickle.dumps({"labels": [Runs()]}, protocol) for protocol in PROTOCOLS),
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"\x80\x04cos\nsystem\n\x8c\x09touch ran\x85\x81.",  # NEWOBJ
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRS'x'\ntR.",
        b"c_codecs\nlookup\n(S'x'\ntR.",
        ENCODE + b"(Vtext\nVrot13\ntR.",
        ENCODE + b"(Vtext\nVzlib\ntR.",
        ENCODE + b"}S'__code__'\nNsb.",  # BUILD on a function
        ENCODE + b"N}S'__defaults__'\n)s\x86b.",
        RECONSTRUCT + b"}S'__globals__'\nNsb.",
        b"c__builtin__\nbytes\nI1000000000000\n\x85R.",
        b"}c__builtin__\nbytes\nNs.",  # a key that is no string
    ],
)
def test_hostile_pickles_run_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = {**cifar_members(2), BATCH: content}
    with pytest.raises(DataError, match="data_batch_3") as caught:
        load_archive(tar_gz(members), tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "array",
    [
        np.array([None], object),
        np.zeros(3),
        np.zeros((2, 2), bool),
        np.zeros(2, ">i4"),
        np.zeros(2, "U5"),
        np.zeros(2, "M8[s]"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_other_kinds(array, protocol):
    refused(pickle.dumps({"data": array}, protocol), "refused")


def test_a_name_that_is_no_line():
    name = b"\x8c\x06a\n\x1b[1m" + b"X\x40\x42\x0f\x00" + b"b" * 1_000_000
    refused(b"\x80\x04" + name + b"\x93.", r"names 'a\\n")
    with pytest.raises(DataError) as caught:
        load_plain(b"\x80\x04" + name + b"\x93.", "here")
    assert len(str(caught.value)) < 300
    assert "\x1b" not in str(caught.value)


def test_a_key_that_takes_for_ever_to_hash():
    refused(b"\x80\x02}" + NESTED + b"Ns.", "name that is not a short string")
    refused(b"\x80\x02}(" + NESTED + b"Nu.", "name that is not a short string")


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\ndtype\n" + NESTED + b"I0\nI1\n\x87R.",
        b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(N" + NESTED + b"tb.",
        ENCODE + b"Va\n" + NESTED + b"\x86R.",
        ENCODE + NESTED + b"Vlatin1\n\x86R.",
        RECONSTRUCT + b"NNN\x87R(I1\n" + NESTED + b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntRNS'ab'\ntb.",
        NESTED + b".",
        b"}S'labels'\n" + NESTED + b"s.",
    ],
)
def test_a_value_that_takes_for_ever_to_print(content, tmp_path):
    """2^60 leaves wherever a short value belongs."""
    began = time.monotonic()
    with pytest.raises(DataError, match="data_batch_3"):
        load_archive(tar_gz({**cifar_members(2), BATCH: content}), tmp_path)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "repeated",
    [
        b"(",
        b"]",
        b"}",
        b"N",
        b"N\x94",  # MEMOIZE
        b"2\x94",
        b"]\x94",
        b"h\x00\x85",
        RECONSTRUCT + b"NNN\x87R",
    ],
)
def test_a_flood_of_objects(repeated, monkeypatch):
    """One byte makes an object of sixty: what may be made is counted."""
    monkeypatch.setattr(pickles._Opcodes, "left", 50_000)
    content = b"\x80\x04N\x94" + repeated * (1_000_000 // len(repeated))
    assert peak_of(content, "too many objects") < 16 << 20


def test_a_string_that_is_encoded_again_and_again(monkeypatch):
    """A memoised string of a megabyte, made into bytes by seven bytes of pickle each time."""
    monkeypatch.setattr(pickles._Encode, "left", 4 << 20)
    text = b"X\x00\x00\x10\x00" + b"a" * (1 << 20)
    head = b"\x80\x02" + ENCODE + b"q\x000" + text + b"q\x010Vlatin1\nq\x020]q\x030"
    content = head + b"(" + b"h\x00h\x01h\x02\x86R" * 1000 + b"l."
    assert peak_of(content, "makes more than 256 MiB") < 12 << 20


@pytest.mark.parametrize(
    "content",
    [
        RECONSTRUCT + b"h\x00R.",  # ten million arguments, one for each byte
        b"cnumpy\ndtype\nh\x00R.",
        b"cnumpy\ndtype\nh\x00I0\nI1\n\x87R.",
        b"}h\x00Ns.",
        ENCODE + b"Va\nh\x00\x86R.",
    ],
)
def test_a_long_string_where_a_short_one_belongs(content):
    """Nothing is made from ten million bytes where a name or arguments belong."""
    text = b"T" + (10_000_000).to_bytes(4, "little") + b"a" * 10_000_000
    began = time.monotonic()
    assert peak_of(b"\x80\x02" + text + b"q\x000" + content, "refused") < 45 << 20
    assert time.monotonic() - began < 1


def test_memo_indices_that_collide():
    """Multiples of 2^61 - 1 have one hash: a dict of n of them takes n^2 steps."""
    modulus = 2**61 - 1
    content = b"N" + b"".join(b"p%d\n" % (i * modulus) for i in range(1, 50_000)) + b"."
    refused(content, "opcode 0x70")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4 of two gigabytes
        b"\x80\x02\x8b\xff\xff\xff\xff.",  # of negative length
        b"I" + b"9" * 1_000_000 + b"\n.",
        b"L" + b"9" * 1_000_000 + b"L\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}N",  # a frame of eight exabytes
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00.",  # BINUNICODE8 and BINBYTES8 of a terabyte
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02T\xff\xff\xff\x7f.",
    ],
)
def test_a_length_that_is_claimed(content):
    assert peak_of(content, "damaged pickle") < 8 << 20


def test_long_integers_as_labels_and_shapes(tmp_path):
    number = b"\x8b" + (1_000_000).to_bytes(4, "little") + b"\x7f" * 1_000_000
    rows = pickle.dumps(ROWS, 2)[2:-1]
    labels = b"\x80\x02}(X\x04\x00\x00\x00data" + rows + b"X\x06\x00\x00\x00labels](" + number
    for content in (labels + number + b"eu.", b"\x80\x02" + number + b"."):
        began = time.monotonic()
        with pytest.raises(DataError, match="data_batch_3"):
            load_archive(tar_gz({**cifar_members(2), BATCH: content}), tmp_path)
        assert time.monotonic() - began < 2
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
    array = RECONSTRUCT + b"NNN\x87R(I1\n" + number + b"\x85" + dtype + b"NS'ab'\ntb."
    refused(array, "damaged pickle")


def test_values_nested_twenty_thousand_deep():
    """Neither read nor freed by recursion."""
    for begin, end in ((b"", b"\x85"), (b"](", b"e"), (b"}Vkey\n", b"s")):
        nested = begin * 20_000 + b"N" + end * 20_000
        read = load_plain(b"\x80\x02}Vdeep\n" + nested + b"s.", "here")
        assert list(read) == ["deep"]
        del read


def test_single_bytes_of_a_pickle_damaged():
    """A checksum would catch these; without one, damage is a DataError or a dict, nothing else."""
    source = np.random.default_rng(0)
    rows = np.zeros((2, 3), np.uint8)
    values = {b"data": rows, b"labels": [np.int64(1), 2], b"filenames": [b"a", b"b"]}
    published = cifar_members(2)[BATCH]
    for good in (published, *(pickle.dumps(values, protocol) for protocol in PROTOCOLS)):
        start = set(range(min(200, len(good))))
        end = set(range(max(0, len(good) - 60), len(good)))
        for position in [p for p in sorted(start | end) for _ in range(3)]:
            bad = bytearray(good)
            bad[position] ^= int(source.integers(1, 256))
            with contextlib.suppress(DataError):
                assert isinstance(load_plain(bytes(bad), "here"), dict)
