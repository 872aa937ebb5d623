"""What a cache survives: kills, damage, full disks."""

import errno
import os
import shutil

import pytest
import torch
from cache_files import contents, no_extraction, same

from semanticfl_ref.diffusion import extract
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.cache_lock import lock
from semanticfl_ref.diffusion.extract import build_cache, complete_files, open_or_build
from semanticfl_ref.diffusion.feature_cache import open_cache
from semanticfl_ref.errors import DataError, MismatchError, NonFiniteError


class Killed(BaseException):
    """Stands for the machine's end: nobody catches it."""


def test_killed_at_every_write_it_ends_with_the_same_bytes(built, plan_for, tmp_path, monkeypatch):
    """Each flush and each rename in turn never happens; every attempt keeps earlier shards."""
    plan, deaths = plan_for(tmp_path), 0
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, real=real: dying(real, arguments))
    left = [0]

    def dying(real, arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*arguments)

    while not plan.complete:
        left[0] = 1 + deaths % 3
        before = set(complete_files(plan))
        try:
            open_or_build(plan)
        except Killed:
            deaths += 1
        assert before <= set(complete_files(plan)), "a complete shard was lost"
        assert deaths < 40
    assert deaths >= 4
    left[0] = 10**6
    assert contents(plan.path) == contents(built.path)


def test_a_resumed_extraction_describes_only_what_is_missing(built, copied, monkeypatch):
    (copied.path / "manifest.json").unlink()
    (copied.path / "shard-00001.safetensors").unlink()
    real, firsts, said = Backbone.start, [], []

    def start(self, part, **options):
        firsts.append(options["first"])
        return real(self, part, **options)

    monkeypatch.setattr(Backbone, "start", start)
    open_or_build(copied, said.append)
    assert firsts == [4] and contents(copied.path) == contents(built.path)
    assert any("feature cache of 12 images, 8 of them already done" in text for text in said)
    (copied.path / "manifest.json").unlink()
    monkeypatch.setattr(
        Backbone,
        "__init__",
        lambda *_a, **_k: pytest.fail("no image is missing: no model is needed"),
    )
    open_or_build(copied)
    assert contents(copied.path) == contents(built.path)


def test_a_damaged_or_foreign_shard_of_an_incomplete_cache_is_built_again(built, copied):
    (copied.path / "manifest.json").unlink()
    first, second = (copied.path / f"shard-0000{i}.safetensors" for i in (0, 1))
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    shutil.copy(copied.path / "shard-00002.safetensors", second)  # whole, but of other images
    open_or_build(copied)
    assert contents(copied.path) == contents(built.path)


def test_every_damaged_byte_is_detected_or_harmless(built, copied, monkeypatch):
    """300 bytes over all files: a damage names the file and the command, or changes nothing that is
    read.
    """
    no_extraction(monkeypatch)
    whole, detected, places = open_cache(built), 0, 0
    for file in sorted(copied.path.glob("[mst]*")):
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little") if file.suffix == ".safetensors" else 0
        in_header = range(0, header, max(1, header // 30))
        behind = torch.linspace(header, len(good) - 1, 30).long().tolist()
        for place in {*in_header, *behind}:
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
            places += 1
            try:
                again = open_or_build(copied)
            except MismatchError as error:
                detected += 1
                assert str(copied.path) in str(error) and "; remake it" in str(error)
                assert error.exit_code == 4
            else:
                assert same(again, whole)
        file.write_bytes(good)
    assert places >= 250 and detected >= places - 12  # blanks at the header's end say nothing


def test_truncated_missing_and_misnamed_files_are_refused(copied, plan_for, monkeypatch):
    no_extraction(monkeypatch)
    file = copied.path / "shard-00001.safetensors"
    good = file.read_bytes()
    for length in (0, 7, 100, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(MismatchError, match="damaged"):
            open_or_build(copied)
    file.unlink()
    with pytest.raises(MismatchError, match=r"shard-00001.*No such file"):
        open_or_build(copied)
    file.write_bytes((copied.path / "shard-00000.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="not the file that was written"):
        open_or_build(copied)
    other = plan_for(copied.path.parent, timestep=51)
    copied.path.rename(other.path)
    with pytest.raises(MismatchError, match="other images, weights or options"):
        open_or_build(other)


def test_rebuild_replaces_a_damaged_cache(built, copied):
    (copied.path / "shard-00001.safetensors").write_bytes(b"")
    build_cache(copied, print, rebuild=True)
    assert contents(copied.path) == contents(built.path)


def test_a_full_disk_keeps_what_was_done(built, plan_for, tmp_path, monkeypatch):
    plan, calls, real = plan_for(tmp_path), [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DataError,
            match=r"cannot write .*shard-00002.safetensors: No space left on device; free some "
            r"disk space, or set SEMANTICFL_CACHE",
        ) as caught:
            open_or_build(plan)
    assert caught.value.exit_code == 3
    assert not list(plan.path.glob("*.part")) and len(complete_files(plan)) == 3
    open_or_build(plan)
    assert contents(plan.path) == contents(built.path)


def test_a_disk_without_room_for_a_lock(plan_for, tmp_path, monkeypatch):
    def full(path, **_options):
        if path.suffix == extract.CLAIM:
            raise OSError(errno.ENOSPC, "No space left on device")
        return lock(path, **_options)

    monkeypatch.setattr(extract, "lock", full)
    with pytest.raises(DataError, match=r"cannot write .*shard-00000.safetensors: No space left"):
        open_or_build(plan_for(tmp_path))


def test_a_disk_that_is_too_small_is_refused_before_the_work(plan_for, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(Backbone, "start", lambda *_a, **_k: pytest.fail("work was done"))
    with pytest.raises(DataError, match=r"needs 5.2 KiB, only 1000 B are free"):
        open_or_build(plan_for(tmp_path))


def test_a_cache_folder_that_is_a_file(plan_for, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(DataError, match=r"cannot write .*cache/features-"):
        open_or_build(plan_for(tmp_path / "cache"))


def test_what_does_not_fit_fp16_is_named(plan_for, tmp_path, monkeypatch):
    def start(self, part, first, **_options):
        value = 1e5 if first == 8 else 1.0
        return lambda: {layer: torch.full((len(part), 112), value) for layer in self.layers}

    monkeypatch.setattr(Backbone, "start", start)
    with pytest.raises(NonFiniteError, match=r"image 8, layer mid.*does not fit"):
        open_or_build(plan_for(tmp_path))


def test_weights_that_changed_under_their_remembered_digest_are_refused(
    plan_for, tmp_path, model_folder
):
    """Same path, size and time, other bytes: found when the weights are about to be used."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for each in folder.rglob("*.*"):
        os.utime(each, ns=(10**18, 10**18))
    plan_for(tmp_path, source=str(folder))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    os.utime(file, ns=(10**18, 10**18))
    with pytest.raises(DataError, match=r"weights.json and run again"):
        open_or_build(plan_for(tmp_path, source=str(folder)))
