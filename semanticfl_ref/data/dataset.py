"""Data sets: one uint8 tensor per part, in memory, read by the reader registered under the name.

    digit-scenes  the digits below, each rotated, scaled, shifted and coloured; embedded
    digits        1 797 handwritten digits as grey 32x32 images; embedded
    cifar10, cifar100, tinyimagenet   the published archives, downloaded or local
    synthetic     random patterns of CIFAR-10's shape, computed
    image_folder, parquet, idx, npz   the user's own files

Letters: N images, C classes.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from semanticfl_ref.config.registry import DATASETS
from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator
from semanticfl_ref.storage import user_path

PARTS = ("train", "validation", "test")
SHARED = 0.1  # share of the test images that also train, from which on a user is told
CHUNK = 1000  # images transformed at a time


class Labelled(NamedTuple):
    """Images uint8 [N, H, W, 3], their labels int64 [N], and the numbers of their clients, int64
    [N], or None."""

    images: torch.Tensor
    labels: torch.Tensor
    clients: torch.Tensor | None = None

    def subset(self, indices: torch.Tensor) -> "Labelled":
        """The images with these indices, in their order."""
        return Labelled(*(None if field is None else field[indices] for field in self))


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader gets: the section `data`, the run's seed, and whether to stay offline."""

    settings: DataSettings
    seed: int
    offline: bool


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a reader returns. Without `validation`, it is a share of the training images.

    `client_names` are those of `train.clients`. `notes` are lines about what was read, for the
    user.
    """

    class_names: tuple[str, ...]
    train: Labelled
    test: Labelled
    validation: Labelled | None = None
    client_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three parts, each images uint8 [N, H, W, 3] and labels int64 [N]; validation may be empty.

    `train_clients`, int64 [N], are the data's own clients, which the scenario "natural" takes;
    None without. `sha256` covers class names, images and labels. `notes` are lines about what was
    read.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    validation_images: torch.Tensor
    validation_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    sha256: str
    train_clients: torch.Tensor | None = None
    client_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        return self.train_images.shape[1]

    @property
    def classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name -> tensor, of all images and labels."""
        names = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
        return {name: getattr(self, name) for name in names}


def load_dataset(settings: DataSettings, *, seed: int = 0, offline: bool = False) -> Dataset:
    """Read a data set into memory.

    Args:
        settings: the section `data`.
        seed: seed of the choice of validation images, and of test images where there is no test
            part.
        offline: no network access.

    Raises:
        UserError: an option that the data set does not have.
        DataError: files are missing, damaged or hostile, or the reader returns something else.
        DownloadError: a download is needed and impossible.
    """
    options = ReadOptions(settings=settings, seed=seed, offline=offline)
    parts: Parts = DATASETS[settings.name](options)
    if settings.class_names:
        parts = replace(parts, class_names=_read_names(settings.class_names, parts.class_names))
    if settings.clients_from and parts.train.clients is None:
        raise UserError(
            f"data.clients_from: {settings.name} has no information about clients: leave it out"
        )
    train, validation = parts.train, parts.validation
    if validation is None:
        share = settings.validation_share
        train, validation = hold_out(train, share, generator(seed, "validation"))
    tensors = {}
    for name, part in zip(PARTS, (train, validation, parts.test), strict=True):
        _check(part, len(parts.class_names), f"data set {settings.name}, part {name}")
        if name != "validation" and len(part.images) == 0:
            raise DataError(f"data set {settings.name}, part {name}: there are no images")
        tensors[f"{name}_images"] = resized(part.images, settings.image_size)
        tensors[f"{name}_labels"] = part.labels
    notes = (*parts.notes, *_doubts(settings.name, parts))
    sha256 = content_sha256(parts.class_names, tensors)
    return Dataset(
        name=settings.name,
        class_names=parts.class_names,
        sha256=sha256,
        train_clients=train.clients,
        client_names=_client_names(parts),
        notes=notes,
        **tensors,
    )


def hold_out(part: Labelled, share: float, source: torch.Generator) -> tuple[Labelled, Labelled]:
    """Set the same share of every class aside, of every client's where there are clients: the
    images that stay, those set aside."""
    if share == 0:
        return part, Labelled(part.images[:0], part.labels[:0])
    groups = part.labels
    if part.clients is not None:
        groups = part.clients * (groups.max() + 1) + groups
    stay, aside = stratified(groups, (1 - share, share), source)
    return part.subset(stay), part.subset(aside)


def stratified(
    labels: torch.Tensor, shares: tuple[float, ...], source: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Split every class by the same shares; the first part gets at least one image of each.

    Args:
        labels: int64 [N].
        shares: the parts' shares, summing to one.

    Returns:
        For each share the ascending indices, int64; disjoint, together all of them.
    """
    part_N = torch.empty_like(labels)
    for c in labels.unique():
        own = shuffled_class(labels, c, source)
        # From the last part to the first: each takes all that the parts before it leave.
        for part in reversed(range(len(shares))):
            part_N[own[: max(1, round(sum(shares[: part + 1]) * len(own)))]] = part
    return tuple(torch.where(part_N == part)[0] for part in range(len(shares)))


def shuffled_class(labels: torch.Tensor, c: int, source: torch.Generator) -> torch.Tensor:
    """The indices of the images of class c, in random order."""
    (own,) = torch.where(labels == c)
    return own[torch.randperm(len(own), generator=source)]


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images uint8 [N, H, W, 3] -> [N, size, size, 3], bicubic; size 0 leaves them."""
    if size == 0 or images.shape[1:3] == (size, size):
        return images

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)

    return transformed(images, scaled, images.new_empty(len(images), size, size, 3))


def transformed(
    images: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor
) -> torch.Tensor:
    """Apply a function of float32 [n, 3, H, W] in 0 ... 255 to images, a chunk at a time.

    Args:
        images: uint8 [N, H, W, 3].
        transform: the function.
        out: uint8, takes the rounded results.

    Returns:
        `out`.
    """
    for chunk, part in zip(images.split(CHUNK), out.split(CHUNK), strict=True):
        x = transform(chunk.permute(0, 3, 1, 2).float())
        part.copy_(x.round().clamp(0, 255).permute(0, 2, 3, 1))
    return out


def content_sha256(class_names: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of class names, shapes and bytes, tensor by tensor in alphabetical order."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().numpy())
    return digest.hexdigest()


def readable(name: str) -> str:
    """The name of a class as it appears in captions: maple_tree -> maple tree."""
    return name.replace("_", " ")


def _check(part: Labelled, classes: int, name: str) -> None:
    """Raise DataError unless a part has the shapes and types that `Dataset` promises."""
    images, labels, _ = part
    found = (images.dtype, images.shape[3:], labels.dtype, labels.shape)
    expected = (torch.uint8, (3,), torch.int64, images.shape[:1])
    if found != expected or ((labels < 0) | (labels >= classes)).any():
        raise DataError(
            f"{name}: images {images.dtype} {list(images.shape)}, labels {labels.dtype} "
            f"{list(labels.shape)}; its reader must return images uint8 [N, H, W, 3] and labels "
            f"int64 [N], 0 ... {classes - 1}"
        )
    if images.shape[1] != images.shape[2]:
        height, width = images.shape[1:3]
        raise DataError(
            f"{name}: images of {height} x {width} pixels; crop them or pad them to squares"
        )


def _client_names(parts: Parts) -> tuple[str, ...]:
    """The names of the data's own clients, or their numbers."""
    if parts.train.clients is None:
        return ()
    return parts.client_names or tuple(map(str, range(int(parts.train.clients.max()) + 1)))


def _read_names(file: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """The lines of a text file, as many as there are classes.

    Raises:
        DataError: it cannot be read, or has another number of lines, or one twice.
    """
    path = user_path(file)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.class_names = {path} is no text file with a name per line: {error}"
        ) from None
    names = tuple(readable(line.strip()) for line in lines if line.strip())
    if len(names) != len(found) or len(set(names)) != len(names):
        raise DataError(
            f"data.class_names = {path} has {len(set(names))} different names, the data set has "
            f"{len(found)} classes ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''}): "
            f"write one name per line, in this order"
        )
    return names


def _doubts(name: str, parts: Parts) -> list[str]:
    """Lines for a test part that many training images are in, pixel by pixel, and for classes
    whose names tell a text encoder nothing.

    Raises:
        DataError: all training images are alike.
    """

    def keys(images: torch.Tensor) -> list[int]:
        return [hash(image.numpy().tobytes()) for image in images]

    known, tested = set(keys(parts.train.images)), keys(parts.test.images)
    if len(known) == 1 < len(parts.train.images):
        raise DataError(
            f"the {len(parts.train.images)} training images of {name} are all alike, as read: look "
            f"at one and correct or replace them"
        )
    lines, shared = [], sum(key in known for key in tested)
    if shared > SHARED * len(tested):
        lines.append(f"{shared} of {len(tested)} test images are training images too")
    if all(re.fullmatch(r"n\d{8}|\d+", name) for name in parts.class_names):
        lines.append(
            f"classes are called {parts.class_names[0]} and the like, so captions say nothing of "
            f"them: name them in a file, a line each, for --set data.class_names=FILE"
        )
    return lines
