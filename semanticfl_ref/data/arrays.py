"""Files of arrays: idx, as MNIST has them, and NumPy's npz, as MedMNIST and Keras have them."""

import filecmp
import glob
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.data.archives import ZIP_BYTES, read_gzip
from semanticfl_ref.data.dataset import Parts, ReadOptions
from semanticfl_ref.data.own_data import Read, assemble_read, own_path, part_of
from semanticfl_ref.errors import DataError

IDX = re.compile(r"(images|labels)[.-]idx[13][.-]ubyte(\.gz)?$")
# Names of the arrays of a part: MedMNIST's and Keras's.
ARRAYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


def read_idx(options: ReadOptions) -> Parts:
    """The files of a folder, or of a folder below it, packed by gzip or not.

    Where a folder holds several sets, data.dir is a file of one.

    Raises:
        UserError: an option that does not fit.
        DataError: a file is missing, damaged, or there twice.
    """
    path, notes, prefix = own_path(options, "FOLDER"), [], ""
    folder = path
    if path.is_file():  # those that are called alike
        folder, prefix = path.parent, re.split("train|test|t10k", path.name)[0]
    files = {}  # (part, "images" or "labels") -> file
    for file in sorted(folder.rglob(f"{glob.escape(prefix)}*ubyte*")):  # unpacked ones before .gz
        match, part = IDX.search(file.name), part_of(file.name)
        if not match or part is None or not file.is_file():
            continue
        first = files.setdefault((part, match[1]), file)
        packed = first.with_name(f"{first.name}.gz")
        if file not in (first, packed) and not filecmp.cmp(first, file, shallow=False):
            raise DataError(
                f"{folder}: {first} and {file} both look like the {match[1]} of the {part} part: "
                f"name one file of the set with --data-dir"
            )
    if not files:
        raise DataError(
            f"{path} holds no files such as train-images-idx3-ubyte or "
            f"train-labels-idx1-ubyte.gz: correct --data-dir"
        )
    parts = {}
    for part in {part: None for part, _ in files}:
        for kind in ("images", "labels"):
            if (part, kind) not in files:
                raise DataError(f"{folder} lacks the {kind} of the {part} part")
        file = files[part, "images"]
        pixels = _idx(file, dimensions=3)
        if "emnist" in file.name.lower():
            pixels = pixels.swapaxes(1, 2)
            notes.append(f"{file.name}: EMNIST's images lie on their side, and are set upright")
        parts[part] = Read(_rgb(pixels, file), _idx(files[part, "labels"], dimensions=1))
    return assemble_read(parts, options, folder, notes=notes)


def read_npz(options: ReadOptions) -> Parts:
    """The arrays of a file; no object is unpickled.

    Raises:
        UserError: an option that does not fit.
        DataError: an array is missing, damaged, or of another type or shape.
    """
    file = own_path(options, "FILE.npz")
    if file.is_dir():
        inside = sorted(file.glob("*.npz"))
        if len(inside) != 1:
            raise DataError(f"{file} holds {len(inside)} .npz files: name one with --data-dir")
        file = inside[0]
    wanted = {name for pairs in ARRAYS.values() for pair in pairs for name in pair}
    by = options.settings.clients_from
    arrays = _npz(file, wanted | {by})
    if by and by not in arrays:
        raise DataError(f"{file} has no array {by!r}: correct data.clients_from")
    if by and arrays[by].dtype.kind not in "uiSU":
        raise DataError(f"{file}: {by} is {arrays[by].dtype}; clients are integers or texts")
    parts, notes = {}, []
    for part, pairs in ARRAYS.items():
        for images, labels in pairs:
            if images in arrays and labels in arrays and part not in parts:
                clients = arrays[by].reshape(-1) if by and part == "train" else None
                label_N = _labels(arrays[labels], file, labels)
                parts[part] = Read(_rgb(arrays[images], file), label_N, clients)
                if len(label_N) and 255 < arrays[images].max() < 2**15:
                    notes.append(
                        f"{images} has 16 bits and no value above {arrays[images].max()}: divided "
                        f"by 256 it is dark; use the whole range, or 8 bits"
                    )
    if "train" not in parts:
        raise DataError(
            f"{file} has no arrays train_images and train_labels, or x_train and y_train"
        )
    return assemble_read(parts, options, file, notes=notes)


def _idx(file: Path, dimensions: int) -> np.ndarray:
    """The bytes of an idx file, uint8 of so many dimensions."""
    content = read_gzip(file) if file.suffix == ".gz" else file.read_bytes()
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{file} is no idx file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    size = int(np.prod(shape, dtype=object))
    if len(content) - start != size or size == 0:
        raise DataError(
            f"{file} is damaged or incomplete: {len(content) - start} bytes for shape {shape}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _npz(file: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if sum(sizes.get(f"{name}.npy", 0) for name in wanted) > ZIP_BYTES:
                raise DataError(f"{file} unpacks to more than {ZIP_BYTES >> 20} MiB: refused")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if name in wanted}
    except DataError:
        raise
    except Exception as error:  # damaged files raise anything: BadZipFile, ValueError, zlib.error
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
        raise DataError(f"{file} is no whole npz file of plain arrays ({error})") from None


def _labels(labels: np.ndarray, file: Path, name: str) -> np.ndarray:
    """Labels of shape [N] or [N, 1], integers."""
    if labels.dtype.kind not in "ui" or labels.ndim == 0 or labels.size != len(labels):
        raise DataError(
            f"{file}: {name} is {labels.dtype} {list(labels.shape)}; one integer per image is "
            f"needed (of several classes per image, choose one)"
        )
    return labels.reshape(-1).astype(np.int64)


def _rgb(images: np.ndarray, file: Path) -> torch.Tensor:
    """Images of 8 or 16 bits, grey [N, H, W(, 1)] or coloured [N, H, W, 3] -> uint8 [N, H, W, 3].

    16 bits are scaled to 8.
    """
    if images.ndim == 3:
        images = images[..., None]
    kind = images.dtype.kind, images.dtype.itemsize
    if kind not in (("u", 1), ("u", 2)) or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"{file} has images {images.dtype} {list(images.shape)}; expected integers of 8 or 16 "
            f"bits without a sign, [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        )
    if images.dtype.itemsize == 2:
        images = (images >> 8).astype(np.uint8)
    return torch.from_numpy(np.repeat(images, 3 // images.shape[3], axis=3))
