"""Files that are complete or absent: written beside their place, flushed to disk, renamed.

Tensor files carry a SHA-256 over every byte. Checkpoints, feature caches and run folders all read
and write through here. torch is imported only where tensors are, since the command line looks into
run folders before it loads torch.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from semanticfl_ref.errors import DataError, UserError

if TYPE_CHECKING:
    import torch

# Locks on files and folders are those of Linux and macOS. On Windows nothing is locked: there, one
# process at a time may write into a run folder or a cache.
try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock

    LOCKS = True
except ImportError:
    LOCK_EX = LOCK_NB = LOCK_SH = 0
    LOCKS = False

    def flock(file, kind: int) -> None:
        """Lock nothing."""


METADATA_KEY = "semanticfl_ref"  # a single key: safetensors writes several in random order
PART = ".part"  # suffix of a file that is still being written
HEADER_BYTES = 100 << 20  # of a tensor file, at most; as safetensors has it
REMEDY = "free some disk space"


def cache_folder() -> Path:
    """Where downloads and features are kept: $SEMANTICFL_CACHE, or ~/.cache/semanticfl_ref."""
    return user_path(os.environ.get("SEMANTICFL_CACHE") or "~/.cache/semanticfl_ref")


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` and variables are replaced.

    Raises:
        UserError: there is no home folder, as in a container of an unknown user.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if path.partition("/")[0] == "~":
        raise UserError(
            f"{text}: this user has no home folder; write the whole path, or set HOME or "
            f"SEMANTICFL_CACHE"
        )
    return Path(path)


class Damaged(Exception):
    """A tensor file does not have the SHA-256 that it records, or cannot be parsed."""


def write_atomic(path: Path, content: bytes | str, remedy: str = REMEDY) -> None:
    """Put `content` at `path` by a rename: readers see the old file or the new one, never a part.

    Args:
        remedy: ends the error message.

    Raises:
        DataError: the file cannot be written (disk full, permission); the old file stays.
    """
    # The name is unique, so that two processes can write the same file at once.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
    with write_errors(path, remedy):
        try:
            write_flushed(temporary, content)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise


def remove_parts(folder: Path) -> None:
    """Delete what killed processes left half-written; no other process may be writing there."""
    for part in folder.glob(f"*{PART}"):
        part.unlink(missing_ok=True)


def write_flushed(path: Path, content: bytes | str) -> None:
    """Write a new file and flush it to disk; a link or file that is there is not followed."""
    with open(path, "xb") as file:
        # A name that is no Unicode (of a file on disk) must not cost the work that is reported.
        is_text = isinstance(content, str)
        file.write(content.encode("utf-8", "backslashreplace") if is_text else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def write_errors(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn the system's errors inside into a DataError that names the file and the remedy."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


def canonical_json(document) -> str:
    """JSON with one spelling: equal documents give equal texts."""
    return json.dumps(document, sort_keys=True, ensure_ascii=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(document, tensors: "dict[str, torch.Tensor] | None" = None) -> str:
    """SHA-256 of a JSON document and of every tensor's name, dtype, shape and bytes."""
    import torch

    total = hashlib.sha256(canonical_json(document).encode())
    for name, tensor in sorted((tensors or {}).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy())  # NumPy has no bfloat16
    return total.hexdigest()


def save_tensors(
    path: Path, tensors: "dict[str, torch.Tensor]", about: dict, remedy: str = REMEDY
) -> str:
    """Write one safetensors file atomically; equal content gives equal bytes.

    Args:
        tensors: name -> tensor, on any device.
        about: plain JSON values, stored in the metadata and covered by the same SHA-256.
        remedy: ends the error message.

    Returns:
        The SHA-256, which `load_tensors` checks and returns.

    Raises:
        DataError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    recorded = sha256_of(about, tensors)
    metadata = {METADATA_KEY: canonical_json({**about, "sha256": recorded})}
    write_atomic(path, save(tensors, metadata), remedy)
    return recorded


def described(file: BinaryIO) -> dict:
    """The JSON values in the metadata of a file that `save_tensors` wrote; unchecked.

    Of a damaged file, the parsers may raise anything.
    """
    length = min(int.from_bytes(file.read(8), "little"), HEADER_BYTES)
    return json.loads(json.loads(file.read(length))["__metadata__"][METADATA_KEY])


def load_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict, str]":
    """Read a file that `save_tensors` wrote and check every byte.

    Returns:
        Tensors on the CPU, the document, and the SHA-256 of both.

    Raises:
        Damaged: the content is not what was written.
        DataError: the file is missing or cannot be read.
    """
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        about = described(io.BytesIO(content))
        recorded = about.pop("sha256")
        tensors = load(content)
        intact = recorded == sha256_of(about, tensors)
    except Exception as error:  # damaged bytes may make the parsers raise anything
        raise Damaged(type(error).__name__) from None
    if not intact:
        raise Damaged("its content does not match the SHA-256 that it records")
    return tensors, about, recorded
