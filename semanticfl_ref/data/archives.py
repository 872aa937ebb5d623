"""Archives and images that may be damaged or hostile, read in memory, one file at a time.

Nothing is extracted to a path. What an archive may hold is bounded before it is read: 512 MiB in a
tar; 2 GiB, 200 000 entries and 16 MiB per entry in a zip.
"""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from semanticfl_ref.errors import DataError

# Unpacked sizes. CIFAR's archives hold 186 MB, pickled again by Python 3 in protocol 2 up to 370;
# TinyImageNet's holds 250 MB, of which words.txt has 2.7.
TAR_BYTES = 512 << 20
ZIP_BYTES = 2 << 30
ZIP_MEMBER_BYTES = 16 << 20
ZIP_ENTRIES = 200_000
CHUNK_BYTES = 1 << 20  # read at a time

NAMED = 20  # unreadable images that a message names
IMAGE_PIXELS = 64 << 20
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

Members = Iterator[tuple[str, bytes]]


def members(path: Path, wanted: Callable[[str], bool]) -> Members:
    """Name and content of the wanted files of a .tar.gz, a .zip or a folder, one at a time.

    Args:
        path: the archive or folder.
        wanted: whether a name is to be read. Names are relative, with forward slashes, and include
            the top folder of the archive; for a folder, its own name.

    Raises:
        DataError: the archive is damaged or too large, or holds a link, a path that leaves it, or
            a wanted name twice.
    """
    if path.is_dir():
        read = _folder_members
    elif path.suffix == ".zip":
        read = _zip_members
    else:
        read = _tar_members
    seen = set()
    try:
        for name, content in read(path, wanted):
            if name in seen:
                raise DataError(f"{path} holds {name!r} twice: refused, download it again")
            seen.add(name)
            yield name, content
    except DataError:
        raise
    except Exception as error:  # damaged archives raise anything: TarError, KeyError ...
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None
        raise DataError(
            f"{path} is damaged or incomplete ({error or type(error).__name__}): download it again"
        ) from None


def read_gzip(path: Path) -> bytes:
    """The content of a file that gzip packed.

    Raises:
        DataError: it is damaged or too large.
    """
    try:
        with _Bounded(path) as stream:
            return b"".join(iter(lambda: stream.read(CHUNK_BYTES), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}): download it again") from None


def decode_image(content: bytes, where: str, size: int) -> np.ndarray:
    """The pixels of an image file.

    Args:
        content: the file's bytes.
        where: names the file in messages.
        size: side of the square that the image is scaled to cover and cropped to.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DataError: not an image, damaged, too large, or of 32 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > IMAGE_PIXELS:
                raise DataError(
                    f"{where} has {image.width} x {image.height} pixels, more than "
                    f"{IMAGE_PIXELS >> 20} Mi: scale it down"
                )
            image = _to_rgb(ImageOps.exif_transpose(image), where)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        reason = re.sub(r" <.* at 0x\w+>", "", str(error))  # an object's address
        raise DataError(
            f"{where} is not a readable image ({reason}): replace or remove it"
        ) from None
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def raise_problems(problems: list[str]) -> None:
    """Raise a DataError that names the first of them, if there are any."""
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DataError("; ".join(problems[:NAMED]) + more)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Transparency is laid on white, and 16 bits of grey are scaled to 8.

    Raises:
        DataError: 32 bits per channel, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{where} has 32 bits per channel: convert it to 8 or 16")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def _folder_members(path: Path, wanted: Callable[[str], bool]) -> Members:
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path.parent).as_posix()
        if wanted(name):
            yield name, file.read_bytes()


def _tar_members(path: Path, wanted: Callable[[str], bool]) -> Members:
    with (
        _Bounded(path) as stream,
        tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK_BYTES) as tar,
    ):
        for member in tar:
            _check_name(path, member.name, plain=member.isfile() or member.isdir())
            if member.size > TAR_BYTES:  # a sparse file may be larger than its stream
                raise DataError(f"{path}: {member.name} claims {member.size} bytes: refused")
            if member.isfile() and wanted(member.name):
                yield member.name, tar.extractfile(member).read()
        while stream.read(CHUNK_BYTES):  # to the end, where gzip compares its checksum
            pass


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Members:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > ZIP_ENTRIES or sum(entry.file_size for entry in entries) > ZIP_BYTES:
            raise DataError(
                f"{path} unpacks to more than {ZIP_ENTRIES} entries or {ZIP_BYTES >> 20} MiB: "
                f"refused"
            )
        for entry in entries:
            file_type = entry.external_attr >> 28  # as Unix has it: 0 none, 4 folder, 8 file
            _check_name(path, entry.filename, plain=file_type in (0, 4, 8))
            if entry.is_dir() or not wanted(entry.filename):
                continue
            usual = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if entry.file_size > ZIP_MEMBER_BYTES or not usual:
                raise DataError(
                    f"{path}: {entry.filename} claims {entry.file_size} bytes or is compressed in "
                    f"an unusual way: refused"
                )
            with archive.open(entry) as file:
                # No more is unpacked than asked for; the byte too many compares the checksum.
                yield entry.filename, file.read(entry.file_size + 1)


def _check_name(path: Path, name: str, plain: bool) -> None:
    parts = PurePosixPath(name)
    if not plain or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise DataError(
            f"{path} holds {name!r}, a link, device or path that leaves the archive: refused"
        )


class _Bounded(gzip.GzipFile):
    """Unpacks no more than a bound, whatever the headers in it claim."""

    left = TAR_BYTES

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.name} unpacks to more than {TAR_BYTES >> 20} MiB: refused")
        return content
