"""A folder of class folders of images, with or without train/ and test/."""

from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.data import archives
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, hold_out, readable

from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator

SIDE = 32  # pixels per side, without data.image_size
TEST_SHARE = 0.2  # of each class, without a test/ folder
SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"),
}


def read(options: ReadOptions) -> Parts:
    """train/ and test/ with the same class folders; or class folders, of which a seeded share
    becomes the test part. Images are ordered by class, then by path."""
    settings = options.settings
    if not settings.dir or settings.sha256:
        raise UserError("--dataset image_folder needs --data-dir FOLDER, and no --data-sha256")
    folder, size = Path(settings.dir), settings.image_size or SIDE
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: correct --data-dir")
    present = [part for part in ("train", "test") if (folder / part).is_dir()]
    if len(present) == 1:
        raise DataError(
            f"{folder} has {present[0]}/ but not its counterpart: give both train/ and test/, or "
            f"class folders only"
        )
    if not present:
        names, images = _class_folders(folder, size)
        train, test = hold_out(images, TEST_SHARE, generator(options.seed, "folder-test"))
        if len(test.labels) == 0:
            raise DataError(
                f"{folder} has too few images to set {TEST_SHARE:.0%} of each class aside for the "
                f"test: add some, or give train/ and test/"
            )
        return Parts(class_names=names, train=train, test=test)
    names, train = _class_folders(folder / "train", size)
    test_names, test = _class_folders(folder / "test", size)
    if names != test_names:
        differing = sorted(set(names) ^ set(test_names))
        raise DataError(
            f"{folder}: train/ and test/ have different class folders: {', '.join(differing[:5])}"
        )
    return Parts(class_names=names, train=train, test=test)


def _class_folders(folder: Path, size: int) -> tuple[tuple[str, ...], Labelled]:
    """Names of the class folders, sorted, and the images below them, in the order of their paths."""
    try:
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        if len(classes) < 2:
            raise DataError(f"{folder} holds {len(classes)} class folders: at least 2 are needed")
        images, labels = [], []
        for label, class_folder in enumerate(classes):
            files = _image_files(class_folder)
            if not files:
                raise DataError(f"class folder {class_folder} holds no image: fill or remove it")
            images += [archives.decode_image(f.read_bytes(), str(f), size) for f in files]
            labels += [label] * len(files)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from None
    names = tuple(readable(path.name) for path in classes)
    return names, Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
