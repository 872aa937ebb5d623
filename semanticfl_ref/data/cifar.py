"""CIFAR-10 and CIFAR-100 from the published Python archives."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from semanticfl_ref.data import archives, download, pickles
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, readable

from semanticfl_ref.errors import DataError


class _Layout(NamedTuple):
    """Which files of the archive hold what, and under which keys."""

    classes: int
    train: tuple[str, ...]
    test: str
    label_key: str
    meta: str
    names_key: str


CIFAR10 = _Layout(
    classes=10,
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    label_key="labels",
    meta="batches.meta",
    names_key="label_names",
)
CIFAR100 = _Layout(
    classes=100,
    train=("train",),
    test="test",
    label_key="fine_labels",
    meta="meta",
    names_key="fine_label_names",
)


def read_cifar10(options: ReadOptions) -> Parts:
    """CIFAR-10: 50 000 training and 10 000 test images of 10 classes, 32x32."""
    return _read(options, CIFAR10)


def read_cifar100(options: ReadOptions) -> Parts:
    """CIFAR-100 with its 100 fine classes: 50 000 training and 10 000 test images, 32x32."""
    return _read(options, CIFAR100)


def _read(options: ReadOptions, layout: _Layout) -> Parts:
    name = options.settings.name
    path = download.locate(options)
    folder = download.ARCHIVES[name].folder
    wanted = {f"{folder}/{file}": file for file in (*layout.train, layout.test, layout.meta)}
    names, parts = (), {}
    for member, content in archives.members(path, wanted.__contains__):
        where = f"{path}: {member}"
        values = pickles.load_plain(content, where)
        if wanted[member] == layout.meta:
            names = _class_names(values, layout, path)
        else:
            parts[wanted[member]] = _part(values, layout, where)
    missing = {*layout.train, layout.test} - set(parts) | ({layout.meta} if not names else set())
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}: it is incomplete")
    train = [parts[file] for file in layout.train]
    return Parts(
        class_names=names,
        train=Labelled(*(torch.cat(tensors) for tensors in zip(*train, strict=True))),
        test=parts[layout.test],
    )


def _part(values: dict, layout: _Layout, where: str) -> Labelled:
    """One file: rows of 3072 bytes, channel by channel, and their labels."""
    rows, labels = values.get("data"), values.get(layout.label_key)
    is_rows = isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2
    if not is_rows or rows.shape[1] != 3072 or len(rows) == 0:
        raise DataError(f"{where} has no data of shape [N, 3072] in bytes: not a CIFAR archive")
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    is_list = isinstance(labels, list) and len(labels) == len(rows)
    if not is_list or not all(type(c) is int and 0 <= c < layout.classes for c in labels):
        raise DataError(
            f"{where} has no {len(rows)} {layout.label_key} between 0 and {layout.classes - 1}: "
            f"not a CIFAR archive"
        )
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Labelled(torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64))


def _class_names(values: dict, layout: _Layout, path: Path) -> tuple[str, ...]:
    names = values.get(layout.names_key)
    is_list = isinstance(names, list) and len(names) == layout.classes
    if not is_list or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{path} has no {layout.classes} {layout.names_key}: not a CIFAR archive")
    return tuple(
        readable(name.decode("ascii", "replace") if isinstance(name, bytes) else name)
        for name in names
    )
