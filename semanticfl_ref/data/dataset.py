"""Data sets: one uint8 tensor per part, in memory, read by the reader registered under the name.

    digit-scenes  the digits below, each rotated, scaled, shifted and coloured; embedded
    digits        1 797 handwritten digits as grey 32x32 images; embedded
    cifar10, cifar100, tinyimagenet   the published archives, downloaded or local
    synthetic     random patterns of CIFAR-10's shape, computed
    image_folder  a folder of class folders of images

Letters: N images, C classes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from semanticfl_ref.config.registry import DATASETS
from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.errors import DataError
from semanticfl_ref.randomness import generator

SHARED = 0.1  # share of the test images that also train, from which on a user is told
CHUNK = 1000  # images transformed at a time


class Labelled(NamedTuple):
    """Images uint8 [N, H, W, 3] and their labels int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def subset(self, indices: torch.Tensor) -> "Labelled":
        """The images with these indices, in their order."""
        return Labelled(self.images[indices], self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader gets: the section `data`, the run's seed, and whether to stay offline."""

    settings: DataSettings
    seed: int
    offline: bool


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a reader returns. Without `validation`, it is a share of the training images.

    `notes` are lines about what was read, for the user.
    """

    class_names: tuple[str, ...]
    train: Labelled
    test: Labelled
    validation: Labelled | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three parts, each images uint8 [N, H, W, 3] and labels int64 [N]; validation may be empty.

    `sha256` covers class names, images and labels. `notes` are lines about what was read.
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
        """Field name -> tensor, of all six."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}


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
    train, validation = parts.train, parts.validation
    if validation is None:
        share = settings.validation_share
        train, validation = hold_out(train, share, generator(seed, "validation"))
    tensors = {}
    for name, part in (("train", train), ("validation", validation), ("test", parts.test)):
        _check(part, len(parts.class_names), f"data set {settings.name}, part {name}")
        tensors[f"{name}_images"] = resized(part.images, settings.image_size)
        tensors[f"{name}_labels"] = part.labels
    notes = (*parts.notes, *_doubts(settings.name, parts))
    sha256 = content_sha256(parts.class_names, tensors)
    return Dataset(
        name=settings.name,
        class_names=parts.class_names,
        sha256=sha256,
        notes=notes,
        **tensors,
    )


def hold_out(part: Labelled, share: float, source: torch.Generator) -> tuple[Labelled, Labelled]:
    """Set the same share of every class aside: the images that stay, those set aside."""
    if share == 0:
        return part, Labelled(part.images[:0], part.labels[:0])
    stay, aside = stratified(part.labels, (1 - share, share), source)
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
    images, labels = part
    found = (images.dtype, images.shape[3:], labels.dtype, labels.shape)
    expected = (torch.uint8, (3,), torch.int64, images.shape[:1])
    if found != expected or ((labels < 0) | (labels >= classes)).any():
        raise DataError(
            f"{name}: images {images.dtype} {list(images.shape)}, labels {labels.dtype} "
            f"{list(labels.shape)}; its reader must return images uint8 [N, H, W, 3] and labels "
            f"int64 [N], 0 ... {classes - 1}"
        )


def _doubts(name: str, parts: Parts) -> list[str]:
    """A line for a test part that many training images are in, pixel by pixel.

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
    shared = sum(key in known for key in tested)
    if shared <= SHARED * len(tested):
        return []
    return [f"{shared} of {len(tested)} test images are training images too"]
