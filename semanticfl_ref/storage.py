"""Files that are whole or not there: written beside their place, flushed to the disk, renamed;
tensors with a digest over every byte.

Checkpoints, feature banks and run folders all write and read through here. torch is imported only
where tensors are, since the command line looks into run folders before it loads torch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from semanticfl_ref.errors import DataError

if TYPE_CHECKING:
    import torch

METADATA_KEY = "semanticfl_ref"  # one key: safetensors orders several at random
PART = ".part"  # ends the name of a file that is still being written


class Damaged(Exception):
    """A file of tensors does not have the digest that it records, or cannot be parsed; the caller
    knows the remedy.
    """


def replace(path: Path, content: bytes | str, remedy: str = "free space there") -> None:
    """Put `content` at `path` by one rename: a reader, or a kill at any moment, sees the old file
    or the new one, both whole.

    Raises:
        DataError: the disk is full or forbids it. The old file stays, no part of the new one does;
            `remedy` ends the message.
    """
    temporary = path.with_name(path.name + PART)
    with writing(path, remedy):
        try:
            write(temporary, content)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(
                OSError
            ):  # the folder itself may be unwritable; the first error says so
                temporary.unlink(missing_ok=True)
            raise


def write(path: Path, content: bytes | str) -> None:
    """Write a file and flush it to the disk; OSErrors pass through. For files inside a folder that
    is itself renamed into place.
    """
    with open(path, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path, remedy: str = "free space there") -> Iterator[None]:
    """Turns the system's refusal to write into a DataError that names the file and the remedy."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


def canonical(document) -> str:
    """JSON of one spelling: equal documents give equal texts, so their hashes agree."""
    return json.dumps(document, sort_keys=True, ensure_ascii=True)


def digest(document, tensors: "dict[str, torch.Tensor] | None" = None) -> str:
    """sha256 over a JSON document and every tensor's name, dtype, shape and bytes, whatever the
    order of the names.
    """
    total = hashlib.sha256(canonical(document).encode())
    for name, tensor in sorted((tensors or {}).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            import torch

            total.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )  # as bytes: NumPy has no bfloat16
    return total.hexdigest()


def save_tensors(
    path: Path, tensors: "dict[str, torch.Tensor]", about: dict, remedy: str = "free space there"
) -> str:
    """One safetensors file by one rename; equal tensors and documents give equal bytes.

    Args:
        tensors: name -> tensor, on any device.
        about: plain JSON values, kept in the file's metadata under the same digest.

    Returns:
        The digest, which `load_tensors` checks and returns again.

    Raises:
        DataError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    recorded = digest(about, tensors)
    replace(path, save(tensors, {METADATA_KEY: canonical({**about, "sha256": recorded})}), remedy)
    return recorded


def load_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict, str]":
    """Read a file of `save_tensors` and check every byte of it.

    Returns:
        Tensors on the CPU, the document, and the digest of both.

    Raises:
        Damaged: not such a file, or not the bytes that were written. DataError: it is missing or
            cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"][METADATA_KEY])
        recorded = about.pop("sha256")
        tensors = load(content)
        intact = recorded == digest(about, tensors)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise Damaged(type(error).__name__) from None
    if not intact:
        raise Damaged("its content does not have the hash that it records")
    return tensors, about, recorded
