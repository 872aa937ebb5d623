"""What the readers of a user's own data share: where it lies, its parts, classes and clients."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, hold_out, readable
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator
from semanticfl_ref.storage import user_path

SIDE = 32  # pixels per side of images that have no common size, without data.image_size
TEST_SHARE = 0.2  # of each class, without a test part
# Word in a name -> the part that it holds.
PART_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "t10k"), "test"),
}


@dataclass(frozen=True)
class Read:
    """A part as it was read.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: [N], integers or texts.
        clients: [N], what names each image's client; None without.
    """

    images: torch.Tensor
    labels: np.ndarray
    clients: np.ndarray | None = None


def own_path(options: ReadOptions, expected: str) -> Path:
    """data.dir, which exists.

    Raises:
        UserError: it is missing, or data.sha256 is given.
        DataError: there is nothing of that name.
    """
    settings = options.settings
    if not settings.dir or settings.sha256:
        raise UserError(
            f"--dataset {settings.name} needs --data-dir {expected} (and takes no --data-sha256)"
        )
    path = user_path(settings.dir)
    if not path.exists():
        raise DataError(f"{path} is not a folder or file: correct --data-dir")
    return path


def part_of(name: str) -> str | None:
    """The part that a word of a name stands for, such as "train"; None if there is no such word."""
    known = {PART_OF[word] for word in re.split("[^a-z0-9]+", name.lower()) if word in PART_OF}
    return known.pop() if len(known) == 1 else None


def assemble(
    names: tuple[str, ...],
    parts: dict[str, Labelled],
    options: ReadOptions,
    path: Path,
    *,
    client_names: tuple[str, ...] = (),
    notes: Sequence[str] = (),
) -> Parts:
    """The parts of a data set, from those that were found.

    Without a test part the validation part serves as one, or else a share of each class that the
    seed chooses.

    Raises:
        UserError: there is a validation part, and another share is asked for.
        DataError: fewer than two classes, or two of one name; too few images to choose a test part
            from.
    """
    notes = list(notes)
    if len(set(names)) < max(2, len(names)):
        listed = ", ".join(names[:10])
        raise DataError(f"{path} has the classes {listed}: two or more are needed, of other names")
    for part in [part for part, found in parts.items() if len(found.labels) == 0]:
        notes.append(f"{path}: the {part} part is empty: left out")
        del parts[part]
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
        notes.append(f"{path}: the validation part is the test part, since there is no other")
    elif "test" not in parts:
        source = generator(options.seed, "folder-test")
        parts["train"], parts["test"] = hold_out(parts["train"], TEST_SHARE, source)
        if len(parts["test"].labels) == 0:
            raise DataError(
                f"{path} has too few images to set {TEST_SHARE:.0%} of each class aside for the "
                f"test: add some, or a test part"
            )
        notes.append(f"{path}: no test part: {TEST_SHARE:.0%} of each class becomes one")
    if "validation" in parts and options.settings.validation_share:
        raise UserError(f"data.validation_share: {path} has a validation part: leave it out")
    return Parts(class_names=names, client_names=client_names, notes=tuple(notes), **parts)


def assemble_read(
    parts: dict[str, Read],
    options: ReadOptions,
    path: Path,
    *,
    label_names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Parts:
    """As `assemble`, from labels as they were read.

    Args:
        label_names: the name of each integer label; None: the label itself is the name.

    Returns:
        Its classes are the different labels of the training part, in ascending order, and so are
        its clients.

    Raises:
        DataError: no training images; images, labels and clients are not as many; or a part has a
            label that the training part, or `label_names`, lacks.
    """
    if "train" not in parts or len(parts["train"].labels) == 0:
        raise DataError(f"{path} holds no training images with labels")
    labels = np.unique(parts["train"].labels)
    numbered, client_names = {}, ()
    for part, read in parts.items():
        clients = None
        for what, values in (("labels", read.labels), ("clients", read.clients)):
            if values is not None and values.shape != (len(read.images),):
                raise DataError(
                    f"{path}: the {part} part has {len(read.images)} images and {what} of shape "
                    f"{list(values.shape)}; it needs one for each image"
                )
        strange = np.setdiff1d(read.labels, labels)
        if len(strange):
            raise DataError(
                f"{path}: the {part} part has the label {strange[0]}, which no training image has"
            )
        if part == "train" and read.clients is not None:
            names, inverse = np.unique(read.clients, return_inverse=True)
            client_names, clients = tuple(map(str, names)), torch.from_numpy(inverse)
        found = torch.from_numpy(np.searchsorted(labels, read.labels))
        numbered[part] = Labelled(read.images, found, clients)
    if label_names is not None and not 0 <= labels[0] <= labels[-1] < len(label_names):
        raise DataError(
            f"{path} has labels from {labels[0]} to {labels[-1]}, and names for {len(label_names)}"
        )
    names = labels if label_names is None else [label_names[label] for label in labels]
    names = tuple(readable(str(name)) for name in names)
    return assemble(names, numbered, options, path, client_names=client_names, notes=notes)
