"""TinyImageNet from the published zip.

Choice: its validation part is the test part here, since the published test part has no labels. The
validation images may lie in one folder, as published, or in a folder per class.

Letters: C classes.
"""

import re
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
    try:
        lists, images = _members(path, options.settings.image_size or SIDE)
        synsets = sorted(lists["wnids.txt"].split())
        words = dict(re.findall(r"(?m)^(.+?)\t(.*)", lists["words.txt"]))
        names = tuple(words[synset].split(",")[0].strip() for synset in synsets)
        train, test = (
            [(image, c) for c, synset in enumerate(synsets) for image in images[part, synset]]
            for part in ("train", "val")
        )
        if not test:  # as published: in one folder, with a list
            annotated = re.findall(r"(?m)^(.+?)\t(.+?)\t", lists["val/val_annotations.txt"])
            test = [(images["val", file][0], synsets.index(synset)) for file, synset in annotated]
        parts = Parts(class_names=names, train=_stacked(train), test=_stacked(test))
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{path} lacks one of its lists, or an image that they name ({error}): download it "
            f"again"
        ) from None
    trained_classes = len(parts.train.labels.unique())
    test_C = torch.bincount(parts.test.labels, minlength=CLASSES)
    if not len(names) == trained_classes == CLASSES or (test_C != TEST_IMAGES).any():
        raise DataError(
            f"{path} does not have {CLASSES} classes with training images and {TEST_IMAGES} "
            f"validation images each: download it again, or read it with --dataset image_folder"
        )
    return parts


def _members(
    path: Path, size: int
) -> tuple[dict[str, str], dict[tuple[str, str], list[np.ndarray]]]:
    """The lists by name, and the images by (part, synset or file name)."""
    root = download.ARCHIVES["tinyimagenet"].folder
    labelled = (f"{root}/train/", f"{root}/val/")

    def wanted(name: str) -> bool:
        return name.endswith(".txt") or name.startswith(labelled)

    lists, images = {}, defaultdict(list)
    for member, content in archives.members(path, wanted):
        name = member.removeprefix(f"{root}/")
        part, *folders = name.split("/")
        if name.endswith(".txt"):
            lists[name] = content.decode()
        elif name.lower().endswith(".jpeg") and len(folders) > 1:
            image = archives.decode_image(content, f"{path}: {member}", size)
            # The published validation images lie in one folder; many copies have them by class.
            key = folders[-1] if folders[0] == "images" else folders[0]
            images[part, key].append(image)
    return lists, images


def _stacked(pairs: list[tuple[np.ndarray, int]]) -> Labelled:
    images, labels = zip(*pairs, strict=True)
    return Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels))
