"""Downloads: mirrors, resume, checksums, --offline; local files and --data-sha256."""

import resource

import pytest
from synthetic_archives import sha256

from semanticfl_ref.data import download as fetch
from semanticfl_ref.data.dataset import load_dataset
from semanticfl_ref.errors import DataError, DownloadError, UserError


def located(name="cifar10", data_dir=None, offline=False, data_sha256=None):
    return fetch.locate(name, data_dir=data_dir, offline=offline, data_sha256=data_sha256)


def test_published_checksums_are_whole():
    assert {name: (a.size, len(a.sha256), a.sha256[:8]) for name, a in fetch.ARCHIVES.items()} == {
        "cifar10": (170498071, 64, "6d958be0"),
        "cifar100": (169001437, 64, "85cd44d0"),
        "tinyimagenet": (248100043, 64, "6198c8ae"),
    }


def test_a_good_mirror(mirror, publish, cifar, cache):
    publish(cifar, mirror("good"))
    path = located()
    assert path == cache / "cifar-10-python.tar.gz" and path.read_bytes() == cifar
    assert [p.name for p in cache.iterdir()] == [path.name]
    located()
    assert len(mirror.asked) == 1, "the second time it comes from the cache"


def test_the_next_mirror_is_tried(mirror, publish, cifar):
    publish(
        cifar,
        "http://127.0.0.1:9/refused",
        mirror("missing"),
        mirror("wrong"),
        "not an address",
        mirror("good"),
    )
    assert located().read_bytes() == cifar
    assert [kind for kind, _ in mirror.asked] == ["missing", "wrong", "good"]


def test_a_connection_that_breaks_is_resumed(mirror, publish, cifar):
    publish(cifar, mirror("breaks"))
    assert located().read_bytes() == cifar
    third = len(cifar) // 3
    assert [wanted for _, wanted in mirror.asked][:3] == [
        None,
        f"bytes={third}-",
        f"bytes={2 * third}-",
    ]


def test_what_one_mirror_sent_serves_the_next(mirror, publish, cifar):
    publish(cifar, mirror("stingy"), mirror("good"))
    assert located().read_bytes() == cifar
    assert mirror.asked[-1] == ("good", f"bytes={1000 * fetch.ATTEMPTS}-")


@pytest.mark.parametrize("kind", ["no-resume", "full-range", "elsewhere", "good"])
def test_a_partial_file_never_ends_in_wrong_content(kind, mirror, publish, cifar, cache):
    publish(cifar, mirror(kind))
    cache.mkdir(parents=True)
    for left in (cifar[:500], b"garbage", cifar + b"more", bytes(len(cifar))):
        (cache / "cifar-10-python.tar.gz").unlink(missing_ok=True)
        (cache / "cifar-10-python.tar.gz.part").write_bytes(left)
        assert located().read_bytes() == cifar


def test_no_mirror_says_why_for_each(mirror, publish, cifar, cache):
    publish(cifar, mirror("missing"), mirror("wrong"))
    with pytest.raises(DownloadError) as caught:
        located()
    text = str(caught.value)
    assert (
        "HTTP 404" in text
        and "content has SHA-256" in text
        and "--data-dir" in text
        and "SEMANTICFL_URL_CIFAR10" in text
        and "\n" not in text
    )
    assert not (cache / "cifar-10-python.tar.gz").exists()


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
    monkeypatch.setattr(fetch.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 4096)
    assert located().read_bytes() == cifar
    assert mirror.asked[1] == ("good", "bytes=4096-")


def test_a_damaged_cache_is_fetched_again(mirror, publish, cifar, cache):
    publish(cifar, mirror("good"))
    cache.mkdir(parents=True)
    (cache / "cifar-10-python.tar.gz").write_bytes(cifar[:-1])
    with pytest.raises(DownloadError, match="damaged, and --offline"):
        located(offline=True)
    assert located().read_bytes() == cifar


def test_offline_opens_no_socket(no_sockets, publish, cifar, cache, tmp_path):
    publish(cifar, "http://127.0.0.1:9/never")
    with pytest.raises(DownloadError, match="--offline") as caught:
        load_dataset("cifar10", offline=True)
    assert caught.value.exit_code == 5
    cache.mkdir(parents=True)
    (cache / "cifar-10-python.tar.gz").write_bytes(cifar)
    assert len(load_dataset("cifar10", offline=True).train_labels) == 100
    assert load_dataset("digit-scenes", offline=True).image_size == 32
    with pytest.raises(DataError):
        load_dataset("cifar10", data_dir=tmp_path, offline=True)


def test_a_local_file_that_differs_needs_its_hash(publish, cifar, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(cifar)
    with pytest.raises(DataError) as caught:
        located(data_dir=tmp_path)
    assert caught.value.exit_code == 3 and f"--data-sha256 {sha256(cifar)}" in str(caught.value)
    assert located(data_dir=tmp_path, data_sha256=sha256(cifar).upper()).read_bytes() == cifar
    with pytest.raises(DataError, match="not the one given"):
        located(data_dir=tmp_path, data_sha256="0" * 64)
    publish(cifar)
    assert located(data_dir=tmp_path).read_bytes() == cifar


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"data_sha256": "12"}, UserError, "64 hexadecimal"),
        ({"data_sha256": "0" * 64}, UserError, "--data-dir"),
        ({"data_dir": "/nowhere"}, DataError, "/nowhere holds neither"),
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
    try:
        with pytest.raises(
            DownloadError, match="part: File too large; free space there or set SEMANTICFL_CACHE"
        ):
            located()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (cache / "cifar-10-python.tar.gz").exists()
    assert located().read_bytes() == cifar, "what fitted is resumed from"
