"""CIFAR-10 and CIFAR-100 from the published Python archives."""

from typing import NamedTuple

import numpy as np
import torch

from semanticfl_ref.data import archives, download, pickles
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, readable
from semanticfl_ref.errors import DataError


class Layout(NamedTuple):
    """The files of an archive and the keys of the dicts in them."""

    classes: int
    train: tuple[str, ...]
    test: str
    names: str
    prefix: str  # of the keys "labels" and "label_names"


LAYOUTS = {
    "cifar10": Layout(
        classes=10,
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        names="batches.meta",
        prefix="",
    ),
    "cifar100": Layout(classes=100, train=("train",), test="test", names="meta", prefix="fine_"),
}


def read(options: ReadOptions) -> Parts:
    """50 000 training and 10 000 test images, 32x32, of 10 classes or of 100 fine classes."""
    path, layout = download.locate(options), LAYOUTS[options.settings.name]
    folder = download.ARCHIVES[options.settings.name].folder
    files = {f"{folder}/{file}": file for file in (*layout.train, layout.test, layout.names)}
    found = {}
    for member, content in archives.members(path, files.__contains__):
        file, where = files[member], f"{path}: {member}"
        parse = _class_names if file == layout.names else _part
        found[file] = parse(pickles.load_plain(content, where), layout, where)
    missing = ", ".join(sorted(set(files.values()) - set(found)))
    if missing:
        raise DataError(f"{path} lacks {missing}: download it again")
    images, labels, _ = zip(*(found[file] for file in layout.train), strict=True)
    train = Labelled(torch.cat(images), torch.cat(labels))
    return Parts(class_names=found[layout.names], train=train, test=found[layout.test])


def _part(values: dict, layout: Layout, where: str) -> Labelled:
    """One file: rows of 3072 bytes, channel by channel, and their labels."""
    rows = values.get("data")
    is_bytes = isinstance(rows, np.ndarray) and rows.dtype == np.uint8
    if not is_bytes or rows.shape[1:] != (3072,) or len(rows) == 0:
        raise DataError(f"{where} has no data of shape [N, 3072] in bytes: not a CIFAR archive")
    key = f"{layout.prefix}labels"
    labels = values.get(key)
    if isinstance(labels, np.ndarray) and labels.shape == rows.shape[:1]:  # no larger list is made
        labels = labels.tolist()
    is_list = isinstance(labels, list) and len(labels) == len(rows)
    if not is_list or not all(type(c) is int and 0 <= c < layout.classes for c in labels):
        raise DataError(
            f"{where} has no {len(rows)} {key} between 0 and {layout.classes - 1}: not a CIFAR "
            f"archive"
        )
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Labelled(torch.from_numpy(images), torch.tensor(labels))


def _class_names(values: dict, layout: Layout, where: str) -> tuple[str, ...]:
    key = f"{layout.prefix}label_names"
    names = values.get(key)
    is_list = isinstance(names, list) and len(names) == layout.classes
    if not is_list or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{where} has no {layout.classes} {key}: not a CIFAR archive")
    texts = (n.decode("ascii", "replace") if isinstance(n, bytes) else n for n in names)
    return tuple(readable(text) for text in texts)
