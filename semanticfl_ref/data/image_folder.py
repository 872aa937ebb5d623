"""A folder of class folders of images, with or without train/ and test/."""

from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.data.archives import decode_image
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, hold_out, readable
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator

SIDE = 32  # pixels per side, without data.image_size
TEST_SHARE = 0.2  # of each class, without a test/ folder
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def read(options: ReadOptions) -> Parts:
    """The images of data.dir, in the order of the class folders' names, then of their paths.

    It holds train/ and test/ with the same class folders; or only class folders, of which a share
    chosen by the seed becomes the test part.
    """
    settings = options.settings
    if not settings.dir or settings.sha256:
        raise UserError(
            "--dataset image_folder needs --data-dir FOLDER (and takes no --data-sha256)"
        )
    folder, size = Path(settings.dir), settings.image_size or SIDE
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: correct --data-dir")
    train_folder, test_folder = folder / "train", folder / "test"
    if train_folder.is_dir() != test_folder.is_dir():
        raise DataError(
            f"{folder} has only one of train/ and test/: give both, or only class folders"
        )
    if train_folder.is_dir():
        names, train = _class_folders(train_folder, size)
        test_names, test = _class_folders(test_folder, size)
        if names != test_names:
            differing = ", ".join(sorted(set(names) ^ set(test_names))[:5])
            raise DataError(
                f"{folder}: train/ and test/ have different class folders ({differing}): give both "
                f"the same"
            )
    else:
        names, images = _class_folders(folder, size)
        train, test = hold_out(images, TEST_SHARE, generator(options.seed, "folder-test"))
        if len(test.labels) == 0:
            raise DataError(
                f"{folder} has too few images to set {TEST_SHARE:.0%} of each class aside for the "
                f"test: add some, or give train/ and test/"
            )
    return Parts(class_names=names, train=train, test=test)


def _class_folders(folder: Path, size: int) -> tuple[tuple[str, ...], Labelled]:
    """The names of the class folders, sorted, and the images below them."""
    images, labels = [], []
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
        classes = sorted(path for path in visible if path.is_dir())
        if len(classes) < 2:
            raise DataError(f"{folder} holds {len(classes)} class folders: at least 2 are needed")
        for label, class_folder in enumerate(classes):
            files = sorted(file for file in class_folder.rglob("[!.]*") if _is_image(file))
            if not files:
                raise DataError(f"class folder {class_folder} holds no image: fill or remove it")
            images += [decode_image(file.read_bytes(), str(file), size) for file in files]
            labels += [label] * len(files)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from None
    names = tuple(readable(path.name) for path in classes)
    return names, Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
