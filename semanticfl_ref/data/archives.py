"""Reading files that may be damaged or hostile: archives member by member in memory, pickles
without running them, images by name.

Nothing is extracted to a path. What an archive may hold is bounded before it is read: 256 MiB in a
tar; 2 GiB, 200 000 entries and 16 MiB an entry in a zip. Pickles go through an unpickler that knows
five names; NumPy's own constructors never run, a stand-in collects the bytes."""

import gzip
import io
import pickle
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
    read = (
        _folder_members
        if path.is_dir()
        else _zip_members
        if path.suffix == ".zip"
        else _tar_members
    )
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


def unpickle(content: bytes, where: str) -> object:
    """Plain values and NumPy arrays of a pickle; nothing in it can run.

    Returns:
        dicts, lists, tuples, numbers, text, bytes (Python 2's text too), and numpy arrays of uint8
        or integers.

    Raises:
        DataError: any other name or opcode, or damaged bytes.
    """
    try:
        return _finished(_Plain(io.BytesIO(content), encoding="bytes").load())
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    # what a damaged pickle raises has no bounds: IndexError, KeyError, UnicodeDecodeError, ...
    except Exception as error:
        raise DataError(
            f"{where} is a damaged pickle ({type(error).__name__}): get the archive again"
        ) from None


class _Dtype:
    """Stands in for numpy.dtype: the code, from a list of admitted ones."""

    def __init__(self, code, *_):
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        if self.code not in ("u1", "i4", "i8"):
            raise DataError("an array of something other than bytes or integers: refused")

    def set(self, state):
        if state[1] not in ("|", "<", b"|", b"<"):
            raise DataError("an array of big-endian numbers: refused")


class _Array:
    """Stands in for numpy.ndarray while it is being filled; `array` is the real one, made of the
    bytes alone.
    """

    array = None

    def set(self, state):
        _, shape, dtype, columns_first, content = state
        if not isinstance(dtype, _Dtype) or columns_first:
            raise DataError("an array of an unknown layout: refused")
        self.array = np.frombuffer(content, dtype="<" + dtype.code).reshape(shape)


def _latin1(text, encoding):
    """Python 3 writes bytes in old protocols as codecs.encode(text, "latin1"); other codecs are not
    admitted.
    """
    if encoding not in ("latin1", b"latin1"):
        raise DataError("a text in a codec other than latin1: refused")
    return text.encode("latin1")


# Functions of one expression: what a REDUCE may call. None is the real thing.
_NAMES = {
    **{
        (module, "_reconstruct"): lambda *_: _Array()
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): lambda *arguments: _Dtype(*arguments),
    ("_codecs", "encode"): lambda *arguments: _latin1(*arguments),
}
# Opcodes that make objects by other means, call registries or allocate what they please, are left
# out.
_LEFT_OUT = (
    *(
        "PERSID",
        "BINPERSID",
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        "EXT1",
        "EXT2",
        "EXT4",
        "DICT",
        "EMPTY_SET",
        "ADDITEMS",
        "FROZENSET",
    ),
    *("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"),
)


class _Plain(pickle._Unpickler):
    """The unpickler written in Python: the one in C reserves memory for any memo index that a
    damaged byte names.
    """

    dispatch = {
        code: action
        for code, action in pickle._Unpickler.dispatch.items()
        if code not in {getattr(pickle, name)[0] for name in _LEFT_OUT}
    }

    def find_class(self, module, name):
        if (module, name) not in _NAMES:
            raise DataError(f"a pickle that names {module}.{name}: refused, it may be hostile")
        return _NAMES[module, name]

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Dtype)):
            raise DataError(
                "a pickle that sets the state of something other than an array: refused, it may be hostile"
            )
        self.stack[-1].set(state)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.put(key, value)

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.put(key, value)

    def put(self, key, value):
        if not isinstance(key, str | bytes) or not isinstance(
            self.stack[-1], dict
        ):  # a nested tuple may take for ever to hash
            raise DataError("a dict whose keys are not names: refused")
        self.stack[-1][key] = value

    dispatch.update(
        {
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
        }
    )


def _finished(value):
    """The dict of a CIFAR file with its names as text and its stand-ins as arrays."""
    if not isinstance(value, dict):
        raise DataError(f"a {type(value).__name__} where a dict belongs")
    return {
        k.decode() if isinstance(k, bytes) else k: v.array if isinstance(v, _Array) else v
        for k, v in value.items()
    }


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
