"""Files that are complete or absent, with a SHA-256 over every byte."""

import errno
import os
import secrets

import pytest
import torch

from semanticfl_ref import storage
from semanticfl_ref.errors import DataError, UserError

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def full_disk(monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_a_round_trip_and_equal_bytes(tmp_path):
    one = storage.save_tensors(tmp_path / "one", TENSORS, {"z": 1, "a": [None, "ü"]})
    backwards = dict(reversed(TENSORS.items()))
    other = storage.save_tensors(tmp_path / "other", backwards, {"a": [None, "ü"], "z": 1})
    assert one == other
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    tensors, about, recorded = storage.load_tensors(tmp_path / "one")
    assert recorded == one
    assert about == {"z": 1, "a": [None, "ü"]}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({"c": TENSORS["a"]}, {}),
        ({"b": TENSORS["b"].view(3, 2)}, {}),
        ({"b": TENSORS["b"].int()}, {}),
        ({}, {"a": 1}),
        ({"b": TENSORS["b"] + 1}, {}),
    ],
    ids=["name", "shape", "dtype", "document", "values"],
)
def test_a_digest_covers_everything(tensors, about):
    assert storage.sha256_of(about, TENSORS | tensors) != storage.sha256_of({}, TENSORS)


def test_a_digest_sees_a_strided_tensor_as_its_values():
    strided = torch.arange(12).view(3, 4).T
    contiguous = strided.contiguous()
    assert storage.sha256_of({}, {"a": strided}) == storage.sha256_of({}, {"a": contiguous})


def test_damage_is_found(tmp_path):
    path = tmp_path / "file"
    storage.save_tensors(path, TENSORS, {"a": 1})
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x21]) + good[place + 1 :])
        try:
            tensors, about, _ = storage.load_tensors(path)
        except storage.Damaged:
            continue
        assert about == {"a": 1}, place
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS), place
    for length in (0, 5, 8, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(storage.Damaged):
            storage.load_tensors(path)
    with pytest.raises(DataError, match="absent: No such file"):
        storage.load_tensors(tmp_path / "absent")


def test_a_full_disk_keeps_the_old_file(tmp_path, full_disk):
    (tmp_path / "file").write_text("old")
    message = r"cannot write .*file: No space left on device; buy a disk"
    with pytest.raises(DataError, match=message) as caught:
        storage.write_atomic(tmp_path / "file", "new", "buy a disk")
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_forbids_writing_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"cannot write .*file/below"):
        storage.write_atomic(tmp_path / "file" / "below", b"new")


def test_a_reader_that_went_away_is_not_a_full_disk():
    with pytest.raises(BrokenPipeError), storage.write_errors("stdout"):
        raise BrokenPipeError


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0")
    outside, target = tmp_path / "outside", tmp_path / "folder" / "file"
    outside.write_text("theirs")
    target.parent.mkdir()
    (target.parent / f"file.0{storage.PART}").symlink_to(outside)
    with pytest.raises(DataError):
        storage.write_atomic(target, "ours")
    assert outside.read_text() == "theirs"
    storage.remove_parts(target.parent)
    storage.write_atomic(target, "ours")
    assert target.read_text() == "ours"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_paths_as_users_write_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    assert storage.user_path("~/a/$PLACE") == tmp_path / "a" / "here"
    assert str(storage.user_path("~nobody-has-this-name/a")) == "~nobody-has-this-name/a"
    monkeypatch.setenv("SEMANTICFL_CACHE", "~/cache")
    assert storage.cache_folder() == tmp_path / "cache"


def test_a_user_without_a_home_folder_is_told(monkeypatch):
    """As in a container that runs as a number: no folder called ~ is made."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("SEMANTICFL_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UserError, match="set HOME or SEMANTICFL_CACHE"):
        storage.cache_folder()
    assert str(storage.user_path("~no-such-user")) == "~no-such-user"


def test_a_name_that_is_no_text_can_be_written(tmp_path):
    storage.write_atomic(tmp_path / "file", "run \udcff")
    assert (tmp_path / "file").read_text() == "run \\udcff"
