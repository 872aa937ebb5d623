"""What a cache survives: kills, damage, full disks, a second process."""

import errno
import os
import shutil
import threading

import pytest
import torch
from bank_files import contents, no_extraction, same

from semanticfl_ref.diffusion import extract
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.feature_cache import finished, open_cache, open_or_build
from semanticfl_ref.errors import DataError, MismatchError, NonFiniteError


class Killed(BaseException):
    """Stands for the machine's end: nobody catches it."""


def test_killed_at_every_write_it_ends_with_the_same_bytes(made, want, tmp_path, monkeypatch):
    """Each flush and each rename in turn never happens; every attempt keeps the shards before it."""
    wanted, deaths = want(tmp_path), 0
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, real=real: dying(real, arguments))
    left = [0]

    def dying(real, arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*arguments)

    while not finished(wanted):
        left[0] = 1 + deaths % 3
        before = set(extract.done_already(wanted))
        try:
            open_or_build(wanted)
        except Killed:
            deaths += 1
        assert before <= set(extract.done_already(wanted)), "a whole shard was lost"
        assert deaths < 40
    assert deaths >= 4
    left[0] = 10**6
    assert contents(wanted.path) == contents(made.path)


def test_a_resumed_extraction_describes_only_what_is_missing(made, cached, monkeypatch):
    (cached.path / "cache.json").unlink(), (cached.path / "shard-00001.safetensors").unlink()
    real, firsts, said = Backbone.features, [], []
    monkeypatch.setattr(
        Backbone,
        "features",
        lambda self, part, **options: (
            firsts.append(options["first"]) or real(self, part, **options)
        ),
    )
    open_or_build(cached, said.append)
    assert firsts == [4] and contents(cached.path) == contents(made.path)
    assert any("feature cache of 12 images, 8 of them done before" in text for text in said)
    (cached.path / "cache.json").unlink()
    monkeypatch.setattr(
        Backbone, "load", lambda *_a, **_k: pytest.fail("no image is missing: no model is needed")
    )
    open_or_build(cached)
    assert contents(cached.path) == contents(made.path)


def test_a_damaged_or_foreign_shard_of_an_unfinished_bank_is_made_again(made, cached):
    (cached.path / "cache.json").unlink()
    first, second = (cached.path / f"shard-0000{i}.safetensors" for i in (0, 1))
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    shutil.copy(cached.path / "shard-00002.safetensors", second)  # whole, but of other images
    open_or_build(cached)
    assert contents(cached.path) == contents(made.path)


def test_every_damaged_byte_is_detected_or_harmless(made, cached, monkeypatch):
    """300 bytes over all files: a damage names the file and the command, or changes nothing that is
    read.
    """
    no_extraction(monkeypatch)
    whole, detected, places = open_cache(made), 0, 0
    for file in sorted(cached.path.glob("[bst]*")):
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little") if file.suffix == ".safetensors" else 0
        for place in {
            *range(0, header, max(1, header // 30)),
            *torch.linspace(header, len(good) - 1, 30).long().tolist(),
        }:
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
            places += 1
            try:
                again = open_or_build(cached)
            except MismatchError as error:
                detected += 1
                assert (
                    str(cached.path) in str(error)
                    and "; remake it" in str(error)
                    and error.exit_code == 4
                )
            else:
                assert same(again, whole)
        file.write_bytes(good)
    assert places >= 250 and detected >= places - 12  # blanks at the header's end say nothing


def test_truncated_missing_and_misnamed_files_are_refused(cached, want, monkeypatch):
    no_extraction(monkeypatch)
    file = cached.path / "shard-00001.safetensors"
    good = file.read_bytes()
    for length in (0, 7, 100, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(MismatchError, match="damaged"):
            open_or_build(cached)
    file.unlink()
    with pytest.raises(MismatchError, match="shard-00001.*No such file"):
        open_or_build(cached)
    file.write_bytes((cached.path / "shard-00000.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="not the file that was written there"):
        open_or_build(cached)
    other = want(cached.path.parent, timestep=51)
    cached.path.rename(other.path)
    with pytest.raises(MismatchError, match="other images, weights or options"):
        open_or_build(other)


def test_anew_replaces_a_damaged_bank(made, cached):
    (cached.path / "shard-00001.safetensors").write_bytes(b"")
    extract.build(cached, print, rebuild=True)
    assert contents(cached.path) == contents(made.path)


def test_two_processes_take_turns(made, want, tmp_path, monkeypatch):
    wanted, said, real = want(tmp_path), [], extract._make
    began = threading.Event()
    monkeypatch.setattr(extract, "_make", lambda *arguments: (began.set(), real(*arguments)))
    first = threading.Thread(target=extract.build, args=(wanted, lambda _text: None))
    first.start()
    began.wait()
    monkeypatch.setattr(extract, "_make", lambda *_: pytest.fail("it was made twice"))
    extract.build(wanted, said.append)
    first.join()
    assert any("waiting for it" in text for text in said) and contents(wanted.path) == contents(
        made.path
    )


def test_a_full_disk_keeps_what_was_done(made, want, tmp_path, monkeypatch):
    wanted, calls, real = want(tmp_path), [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DataError,
            match=r"cannot write .*shard-00002.safetensors: No space left on device; free space there, or set SEMANTICFL_CACHE",
        ) as caught:
            open_or_build(wanted)
    assert (
        caught.value.exit_code == 3
        and not list(wanted.path.glob("*.part"))
        and len(extract.done_already(wanted)) == 3
    )
    open_or_build(wanted)
    assert contents(wanted.path) == contents(made.path)


def test_a_disk_that_is_too_small_is_refused_before_the_work(want, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    monkeypatch.setattr(Backbone, "features", lambda *_a, **_k: pytest.fail("work was done"))
    with pytest.raises(DataError, match="needs 0 MiB, 0 MiB are free"):
        open_or_build(want(tmp_path))


def test_a_cache_folder_that_is_a_file(want, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(DataError, match="cannot write .*cache/cache-"):
        open_or_build(want(tmp_path / "cache"))


def test_what_does_not_fit_fp16_is_named(want, tmp_path, monkeypatch):
    def features(self, part, first, **_options):
        return {
            layer: torch.full((len(part), 112), 1e5 if first == 8 else 1.0) for layer in self.layers
        }

    monkeypatch.setattr(Backbone, "features", features)
    with pytest.raises(NonFiniteError, match="image 8, layer mid.*does not fit"):
        open_or_build(want(tmp_path))


def test_weights_that_changed_under_their_remembered_digest_are_refused(
    want, tmp_path, model_folder
):
    """Same path, size and time, other bytes: found when the weights are about to be used."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for each in folder.rglob("*.*"):
        os.utime(each, ns=(10**18, 10**18))
    want(tmp_path, source=str(folder))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    os.utime(file, ns=(10**18, 10**18))
    with pytest.raises(DataError, match="weights.json and run again"):
        open_or_build(want(tmp_path, source=str(folder)))
