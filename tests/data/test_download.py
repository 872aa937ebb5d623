"""Downloads: mirrors, resuming, SHA-256, --offline; local files and --data-sha256."""

import fcntl
import resource
import threading

import pytest
from loading import load
from synthetic_archives import sha256

from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.data import download
from semanticfl_ref.data.dataset import ReadOptions
from semanticfl_ref.errors import DataError, DownloadError, UserError

FILENAME = "cifar-10-python.tar.gz"


def located(name="cifar10", offline=False, **settings):
    section = DataSettings(name=name, **settings)
    return download.locate(ReadOptions(settings=section, seed=0, offline=offline))


def test_published_checksums_are_whole():
    found = {name: (a.size, len(a.sha256), a.sha256[:8]) for name, a in download.ARCHIVES.items()}
    assert found == {
        "cifar10": (170498071, 64, "6d958be0"),
        "cifar100": (169001437, 64, "85cd44d0"),
        "tinyimagenet": (248100043, 64, "6198c8ae"),
    }


def test_a_good_mirror(mirror, publish, cifar, cache):
    publish(cifar, mirror("good"))
    path = located()
    assert path == cache / FILENAME
    assert path.read_bytes() == cifar
    assert [p.name for p in cache.iterdir()] == [path.name]
    located()
    assert len(mirror.asked) == 1, "the second time it comes from the cache"


def test_the_next_mirror_is_tried(mirror, publish, cifar):
    unreachable, no_address = "http://127.0.0.1:9/refused", "not an address"
    publish(cifar, unreachable, mirror("missing"), mirror("wrong"), no_address, mirror("good"))
    assert located().read_bytes() == cifar
    assert [kind for kind, _ in mirror.asked] == ["missing", "wrong", "good"]


def test_a_connection_that_breaks_is_resumed(mirror, publish, cifar):
    publish(cifar, mirror("breaks"))
    assert located().read_bytes() == cifar
    third = len(cifar) // 3
    ranges = [wanted for _, wanted in mirror.asked]
    assert ranges[:3] == [None, f"bytes={third}-", f"bytes={2 * third}-"]


def test_what_one_mirror_sent_serves_the_next(mirror, publish, cifar):
    publish(cifar, mirror("stingy"), mirror("good"))
    assert located().read_bytes() == cifar
    assert mirror.asked[-1] == ("good", f"bytes={1000 * download.ATTEMPTS}-")


@pytest.mark.parametrize("kind", ["no-resume", "full-range", "elsewhere", "good"])
def test_a_partial_file_never_ends_in_wrong_content(kind, mirror, publish, cifar, cache):
    publish(cifar, mirror(kind))
    cache.mkdir(parents=True)
    for left in (cifar[:500], b"garbage", cifar + b"more", bytes(len(cifar))):
        (cache / FILENAME).unlink(missing_ok=True)
        (cache / f"{FILENAME}.part").write_bytes(left)
        assert located().read_bytes() == cifar


def test_a_mirror_that_does_not_resume_is_asked_once(mirror, publish, cifar, cache):
    """It has sent the whole file already."""
    publish(cifar, mirror("no-resume"))
    cache.mkdir(parents=True)
    (cache / f"{FILENAME}.part").write_bytes(cifar[:500])
    assert located().read_bytes() == cifar
    assert mirror.asked == [("no-resume", "bytes=500-")]


def test_no_mirror_says_why_for_each(mirror, publish, cifar, cache):
    publish(cifar, mirror("missing"), mirror("wrong"), mirror("stingy"))
    with pytest.raises(DownloadError) as caught:
        located()
    text = str(caught.value)
    for words in ("HTTP 404", "content has SHA-256", "interrupted at", "--data-dir"):
        assert words in text
    assert "SEMANTICFL_URL_CIFAR10" in text
    assert "\n" not in text
    assert not (cache / FILENAME).exists()


def test_the_environment_replaces_the_mirrors_but_not_the_checksum(
    mirror, publish, cifar, monkeypatch
):
    publish(cifar, mirror("missing"))
    monkeypatch.setenv("SEMANTICFL_URL_CIFAR10", mirror("wrong"))
    with pytest.raises(DownloadError):
        located()
    monkeypatch.setenv("SEMANTICFL_URL_CIFAR10", mirror("good"))
    assert located().read_bytes() == cifar


def test_a_slow_mirror_is_left(mirror, publish, cifar, monkeypatch):
    publish(cifar, mirror("good"), mirror("good"))
    ticks = iter(range(0, 100000, 40))
    monkeypatch.setattr(download.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(download, "CHUNK_BYTES", 4096)
    assert located().read_bytes() == cifar
    assert mirror.asked[1] == ("good", "bytes=4096-")


def test_a_second_run_waits_for_the_first(mirror, publish, cifar, cache):
    publish(cifar, mirror("good"))
    cache.mkdir(parents=True)
    part = cache / f"{FILENAME}.part"
    with open(part, "a+b") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=located)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        first.write(cifar)
        first.flush()
        part.rename(cache / FILENAME)
    second.join(10)
    assert not second.is_alive()
    assert mirror.asked == [], "what the first one downloaded is used"


def test_a_damaged_cache_is_fetched_again(mirror, publish, cifar, cache):
    publish(cifar, mirror("good"))
    cache.mkdir(parents=True)
    (cache / FILENAME).write_bytes(cifar[:-1])
    with pytest.raises(DownloadError, match="damaged, and --offline"):
        located(offline=True)
    assert located().read_bytes() == cifar


def test_offline_opens_no_socket(no_sockets, publish, cifar, cache, tmp_path):
    publish(cifar, "http://127.0.0.1:9/never")
    with pytest.raises(DownloadError, match="--offline") as caught:
        load("cifar10", offline=True)
    assert caught.value.exit_code == 5
    cache.mkdir(parents=True)
    (cache / FILENAME).write_bytes(cifar)
    assert len(load("cifar10", offline=True).train_labels) == 100
    assert load("digit-scenes", offline=True).image_size == 32
    with pytest.raises(DataError):
        load("cifar10", dir=tmp_path, offline=True)


def test_a_local_file_that_differs_needs_its_hash(publish, cifar, tmp_path):
    (tmp_path / FILENAME).write_bytes(cifar)
    folder = str(tmp_path)
    with pytest.raises(DataError) as caught:
        located(dir=folder)
    assert caught.value.exit_code == 3
    assert f"--data-sha256 {sha256(cifar)}" in str(caught.value)
    assert located(dir=folder, sha256=sha256(cifar).upper()).read_bytes() == cifar
    with pytest.raises(DataError, match="not the one given"):
        located(dir=folder, sha256="0" * 64)
    publish(cifar)
    assert located(dir=folder).read_bytes() == cifar


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"sha256": "12"}, UserError, "64 hexadecimal"),
        ({"sha256": "0" * 64}, UserError, "--data-dir"),
        ({"dir": "/nowhere"}, DataError, "/nowhere neither is nor holds"),
    ],
)
def test_options_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        located(**options)


def test_a_cache_that_cannot_be_written(mirror, publish, cifar, monkeypatch, tmp_path):
    publish(cifar, mirror("good"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="SEMANTICFL_CACHE"):
        located()


def test_a_full_disk(mirror, publish, cifar, cache):
    publish(cifar, mirror("good"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(cifar) // 2, limits[1]))
    words = "part: File too large; free space there or set SEMANTICFL_CACHE"
    try:
        with pytest.raises(DownloadError, match=words):
            located()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (cache / FILENAME).exists()
    assert located().read_bytes() == cifar, "what fitted is resumed from"


def test_data_dir_may_be_the_archive_its_folder_or_what_holds_them(tmp_path, cifar, publish):
    publish(cifar)
    archive, folder = tmp_path / "any name.tar.gz", tmp_path / "cifar-10-batches-py"
    archive.write_bytes(cifar)
    assert located(dir=str(archive)) == archive
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"x")
    accepted = download.folder_sha256(folder)
    assert located(dir=str(folder), sha256=accepted) == folder
    assert located(dir=str(tmp_path), sha256=accepted) == folder
    with pytest.raises(DataError, match="neither is nor holds"):
        located(dir=str(tmp_path / "none"))
