"""TinyImageNet from the published zip.

Choice: its validation part is the test part here, since the published test part has no labels.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.data import archives, download
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions
from semanticfl_ref.errors import DataError

SIDE = 64  # pixels per side, as published
CLASSES, TEST_IMAGES = 200, 50  # test images of each class


def read(options: ReadOptions) -> Parts:
    """100 000 training and 10 000 test images of 200 classes, 64x64."""
    path = download.locate(options)
    texts, images = _members(path, options.settings.image_size or SIDE)
    try:
        synsets = sorted(texts["wnids.txt"].decode().split())
        words = dict(
            line.split("\t", 1) for line in texts["words.txt"].decode().splitlines() if "\t" in line
        )
        annotations = texts["val/val_annotations.txt"].decode().splitlines()
        annotated = [line.split("\t")[:2] for line in annotations if line.strip()]
        names = tuple(words[synset].split(",")[0].strip() for synset in synsets)
        test = [(images["val", file][0], synsets.index(synset)) for file, synset in annotated]
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{path} lacks one of its lists, or an image that they name ({error}): download it again"
        ) from None
    train = [
        (image, label) for label, synset in enumerate(synsets) for image in images["train", synset]
    ]
    _check_counts(path, synsets, train, test)
    return Parts(class_names=names, train=_stacked(train), test=_stacked(test))


def _members(path: Path, size: int) -> tuple[dict[str, bytes], dict[tuple[str, str], list]]:
    """The lists by name, and the images by (part, synset or file name)."""
    root = download.ARCHIVES["tinyimagenet"].folder
    folders = (f"{root}/train/", f"{root}/val/images/")
    texts, images = {}, defaultdict(list)
    for member, content in archives.members(
        path, lambda name: name.endswith(".txt") or name.startswith(folders)
    ):
        pieces = member.removeprefix(f"{root}/").split("/")
        if member.endswith(".txt"):
            texts["/".join(pieces)] = content
        elif member.lower().endswith(".jpeg") and len(pieces) >= 3:
            key = pieces[1] if pieces[0] == "train" else pieces[-1]
            image = archives.decode_image(content, f"{path}: {member}", size)
            images[pieces[0], key].append(image)
    return texts, images


def _check_counts(path: Path, synsets: list[str], train: list, test: list) -> None:
    test_C = np.bincount([label for _, label in test], minlength=len(synsets))
    train_C = np.bincount([label for _, label in train], minlength=len(synsets))
    if len(synsets) != CLASSES or (test_C != TEST_IMAGES).any() or train_C.min() == 0:
        raise DataError(
            f"{path} does not have {CLASSES} classes with training images and {TEST_IMAGES} "
            f"validation images each: download it again"
        )


def _stacked(pairs: list[tuple[np.ndarray, int]]) -> Labelled:
    images, labels = zip(*pairs, strict=True)
    return Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64))
