"""Archives and images that may be damaged or hostile, read member by member in memory.

Nothing is extracted to a path. What an archive may hold is bounded before it is read: 256 MiB in a
tar; 2 GiB, 200 000 entries and 16 MiB per entry in a zip.
"""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from semanticfl_ref.errors import DataError

TAR_BYTES = 256 << 20  # unpacked; CIFAR's archives hold 186 MB
ZIP_BYTES = 2 << 30  # unpacked; TinyImageNet's holds 250 MB
ZIP_MEMBER_BYTES = 16 << 20  # unpacked; TinyImageNet's words.txt has 2.7 MB
ZIP_ENTRIES = 200_000
IMAGE_PIXELS = 64 << 20
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every wanted file of a .tar.gz, a .zip or a folder, one at a time.

    Names are relative with forward slashes and include the archive's top folder, for a folder its
    own name.

    Raises:
        DataError: damaged, or not what such an archive may be: a link, a path that leaves the
            archive, too large.
    """
    if path.is_dir():
        read = _folder_members
    else:
        read = _zip_members if path.suffix == ".zip" else _tar_members
    try:
        yield from read(path, wanted)
    except DataError:
        raise
    # what damaged bytes raise has no bounds: TarError, zlib.error, EOFError, KeyError,
    # struct.error, ...
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None
        raise DataError(
            f"{path} is damaged or incomplete ({error or type(error).__name__}): get it again"
        ) from None


def _folder_members(path, wanted):
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path.parent).as_posix()
        if wanted(name):
            yield name, file.read_bytes()


def _tar_members(path, wanted):
    with (
        gzip.open(path) as unzipped,
        tarfile.open(fileobj=_Bounded(unzipped, path), mode="r|", bufsize=1 << 20) as tar,
    ):
        # Tar headers cannot claim more memory than the bounded stream holds.
        for member in tar:
            _check_name(path, member.name, plain=member.isfile() or member.isdir())
            if member.size > TAR_BYTES:
                raise DataError(f"{path}: {member.name} claims {member.size} bytes: refused")
            if member.isfile() and wanted(member.name):
                content = tar.extractfile(member).read()
                if len(content) != member.size:
                    raise DataError(f"{path} ends inside {member.name}: get it again")
                yield member.name, content
        while tar.fileobj.fileobj.read(
            1 << 20
        ):  # to the end: only there gzip's own checksum stands
            pass


def _zip_members(path, wanted):
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > ZIP_ENTRIES or sum(entry.file_size for entry in entries) > ZIP_BYTES:
            raise DataError(
                f"{path} unpacks to more than {ZIP_ENTRIES} entries or {ZIP_BYTES >> 20} MiB: refused"
            )
        for entry in entries:
            _check_name(
                path, entry.filename, plain=(entry.external_attr >> 28) in (0, 4, 8)
            )  # the Unix file type: none, folder, file
            if not entry.is_dir() and wanted(entry.filename):
                if entry.file_size > ZIP_MEMBER_BYTES or entry.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):
                    raise DataError(
                        f"{path}: {entry.filename} claims {entry.file_size} bytes or is packed in a rare way: refused"
                    )
                with (
                    archive.open(entry) as file
                ):  # told how much to read, it unpacks no more; the last byte compares the checksum
                    yield entry.filename, file.read(entry.file_size + 1)


def _check_name(path: Path, name: str, plain: bool) -> None:
    parts = PurePosixPath(name)
    if not plain or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise DataError(
            f"{path} holds {name!r}, a link, device or path that leaves the archive: refused"
        )


class _Bounded:
    """A stream that stops at TAR_BYTES, whatever the headers inside it claim."""

    def __init__(self, stream, path: Path):
        self.stream, self.path, self.left = stream, path, TAR_BYTES

    def read(self, n: int) -> bytes:
        content = self.stream.read(n)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.path} unpacks to more than {TAR_BYTES >> 20} MiB: refused")
        return content


def decode_image(content: bytes, where: str, size: int | None) -> np.ndarray:
    """uint8 [H, W, 3] of an image file; with a size, scaled to cover the square and cropped to its
    middle.

    Raises:
        DataError: not an image, broken, too large, or of more than 8 bits a channel; `where` names
            it.
    """
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > IMAGE_PIXELS:
                raise DataError(
                    f"{where} has {image.width} x {image.height} pixels: refused, scale it down"
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where} has more than 8 bits a channel: convert it")
            image = ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise DataError(
            f"{where} is not a readable image ({error}): replace or remove it"
        ) from None
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)
