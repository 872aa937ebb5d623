"""Data sets: raw files -> `Dataset`, one resident uint8 tensor per part.

    digit-scenes  the digits below, each turned, scaled, shifted and coloured by `scenes.py`; in the
    package digits        1 797 handwritten digits as grey 32x32 images; in the package cifar10,
    cifar100, tinyimagenet   the published archives, fetched or local folder        class folders of
    images

Letters: N images, C classes.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load

from semanticfl_ref.config import DATASETS
from semanticfl_ref.data import archives, fetch
from semanticfl_ref.data.scenes import plain, scenes
from semanticfl_ref.errors import DataError, UserError, unknown
from semanticfl_ref.randomness import generator

DIGITS_FILE = Path(__file__).parent / "assets" / "digits.safetensors"
DIGITS_SHA256 = "a30e67a092a3d97f0abfb32a3b1bb85d96a99e6b66794d351b29f17a6566f5c7"
DIGITS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_SHARES = (
    0.25,
    0.25,
    0.5,
    # of each class: train, validation, test; few to train on, as where federations are worth the
    # trouble
)
DIGITS_SEED = 20240  # of the split and the scenes; the run's seed does not move them
SCENES_PER_DIGIT = {
    "train": 1,
    "validation": 2,
    "test": 1,
}  # more where it only costs evaluation: less noise in the accuracy

FOLDER_SIZE = 32  # pixels a side, where image_size is not given
FOLDER_TEST_SHARE = 0.2  # of each class, where there is no test/ folder
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
TINYIMAGENET_CLASSES, TINYIMAGENET_TEST_IMAGES = (
    200,
    50,
)  # test images of each class: the published validation part, as the test part has no labels


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images uint8 [N, H, W, 3] and labels int64 [N] of three parts; validation may be empty.
    `sha256` covers names, images and labels.
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

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.train_images.shape[1]


@dataclass
class _Raw:
    """What a reader returns: parts as (images uint8 [N, H, W, 3], labels int64 [N]); validation is
    None where it is still to be held out.
    """

    class_names: tuple[str, ...]
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor] | None = None


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    validation_share: float = 0.0,
    seed: int = 0,
    offline: bool = False,
    data_sha256: str | None = None,
) -> Dataset:
    """Read a data set, wholly into memory.

    Args:
        name: one of DATASETS.
        data_dir: where the archive, its unpacked folder or the class folders lie; None = the
            download cache (needed for `folder`).
        image_size: side to resize to, in pixels; None = as published (32 for `folder`).
        validation_share: part of each class of the training images to set aside, 0 ... 0.9; the
            digits have a fixed one and ignore it.
        seed: of what is held out.
        offline: open no connection.
        data_sha256: accept local content with this hash, where it differs from the published one.

    Raises:
        UserError: an unknown name; an option that the data set does not have.
        DataError: files that are missing, damaged or hostile.
        DownloadError: a download is needed and impossible.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if not 0 <= validation_share <= 0.9:
        raise UserError(f"data.validation_share = {validation_share}: must lie in 0 ... 0.9")
    if name in ("digits", "digit-scenes"):
        if data_dir is not None or data_sha256 is not None:
            raise UserError(
                f"{name} is in the package: it takes neither --data-dir nor --data-sha256"
            )
        raw = _digits(name)
    elif name == "folder":
        if data_dir is None or data_sha256 is not None:
            raise UserError("--dataset folder needs --data-dir FOLDER, and takes no --data-sha256")
        raw = _folder(Path(data_dir), image_size or FOLDER_SIZE, seed)
    else:
        path = fetch.locate(name, data_dir=data_dir, offline=offline, data_sha256=data_sha256)
        raw = _tinyimagenet(path, image_size) if name == "tinyimagenet" else _cifar(path, name)
    if raw.validation is None:
        raw.train, raw.validation = _hold_out(
            raw.train, validation_share, generator(seed, "validation")
        )
    tensors = {}
    for part in ("train", "validation", "test"):
        images, tensors[f"{part}_labels"] = getattr(raw, part)
        tensors[f"{part}_images"] = _resized(images, image_size)
    return Dataset(
        name=name,
        class_names=raw.class_names,
        sha256=content_sha256(raw.class_names, tensors),
        **tensors,
    )


def stratified(
    labels: torch.Tensor, shares: tuple[float, ...], source: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Cut every class by the same shares; the first part gets at least one image of each.

    Args:
        labels: int64 [N].
        shares: of the parts, summing to one.

    Returns:
        For each share the ascending indices, int64; disjoint, together all of them.
    """
    part_N = torch.empty_like(labels)
    for c in labels.unique():
        (mine,) = torch.where(labels == c)
        mine = mine[torch.randperm(len(mine), generator=source)]
        for part in reversed(
            range(len(shares))
        ):  # every pass leaves to the parts before it what is theirs
            part_N[mine[: max(1, round(sum(shares[: part + 1]) * len(mine)))]] = part
    return tuple(torch.where(part_N == part)[0] for part in range(len(shares)))


def _hold_out(pair, share: float, source: torch.Generator):
    """(images, labels) -> what stays and what is set aside."""
    images, labels = pair
    if share == 0:
        return pair, (images[:0], labels[:0])
    stay, aside = stratified(labels, (1 - share, share), source)
    return (images[stay], labels[stay]), (images[aside], labels[aside])


def _digits(name: str) -> _Raw:
    """The embedded digits, split once and for all; as scenes, each part from generators of its own."""
    content = DIGITS_FILE.read_bytes() if DIGITS_FILE.is_file() else b""
    if hashlib.sha256(content).hexdigest() != DIGITS_SHA256:
        raise DataError(f"{DIGITS_FILE} is missing or damaged: install the package again")
    stored = load(content)
    masks, labels = stored["masks"], stored["labels"].long()
    parts = {}
    for part, index in zip(
        SCENES_PER_DIGIT,
        stratified(labels, DIGITS_SHARES, generator(DIGITS_SEED, "digits-split")),
        strict=True,
    ):
        if name == "digits":
            drawn = [plain(masks[index])]
        else:
            drawn = [
                scenes(
                    masks[index],
                    generator(DIGITS_SEED, f"digit-scenes-{part}", repeat),
                    light_on_dark=True,
                )
                for repeat in range(SCENES_PER_DIGIT[part])
            ]
        images = (torch.cat(drawn) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        parts[part] = (images, labels[index].repeat(len(drawn)))
    return _Raw(class_names=DIGITS_NAMES, **parts)


def _cifar(path: Path, name: str) -> _Raw:
    """The published python archives: pickled dicts of rows of 3072 bytes, channel by channel."""
    classes, key, meta = (
        (10, "labels", ("batches.meta", "label_names"))
        if name == "cifar10"
        else (100, "fine_labels", ("meta", "fine_label_names"))
    )
    train = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    test = "test_batch" if name == "cifar10" else "test"
    folder = fetch.ARCHIVES[name].folder
    wanted = {f"{folder}/{file}": file for file in (*train, test, meta[0])}
    read = {}
    for member, content in archives.members(path, wanted.__contains__):
        content = archives.unpickle(content, f"{path}: {member}")
        is_meta = wanted[member] == meta[0]
        read[wanted[member]] = (
            _names(content, meta[1], classes, path)
            if is_meta
            else _cifar_part(content, key, classes, f"{path}: {member}")
        )
    missing = set(wanted.values()) - set(read)
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(sorted(missing))}: it is incomplete, get it again"
        )
    images, labels = (torch.cat([read[file][i] for file in train]) for i in (0, 1))
    return _Raw(class_names=read[meta[0]], train=(images, labels), test=read[test])


def _cifar_part(
    content: dict, key: str, classes: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pickled part -> images uint8 [N, 32, 32, 3] and labels int64 [N]."""
    rows, labels = content.get("data"), content.get(key)
    if (
        not isinstance(rows, np.ndarray)
        or rows.dtype != np.uint8
        or rows.ndim != 2
        or rows.shape[1] != 3072
        or len(rows) == 0
    ):
        raise DataError(f"{where} has no data of shape [N, 3072] in bytes: not a CIFAR archive")
    if (
        not isinstance(labels, list)
        or len(labels) != len(rows)
        or not all(type(c) is int and 0 <= c < classes for c in labels)
    ):
        raise DataError(
            f"{where} has no {len(rows)} {key} between 0 and {classes - 1}: not a CIFAR archive"
        )
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


def _names(content: dict, key: str, classes: int, path: Path) -> tuple[str, ...]:
    names = content.get(key)
    if (
        not isinstance(names, list)
        or len(names) != classes
        or not all(isinstance(n, str | bytes) for n in names)
    ):
        raise DataError(f"{path} has no {classes} {key}: not a CIFAR archive")
    return tuple(
        _readable(n.decode("ascii", "replace") if isinstance(n, bytes) else n) for n in names
    )


def _tinyimagenet(path: Path, image_size: int | None) -> _Raw:
    """The published zip. Its test part has no labels, so its validation part is the test part here."""
    root = fetch.ARCHIVES["tinyimagenet"].folder
    texts, images = {}, defaultdict(list)  # images: (part, synset or file name) -> arrays
    for member, content in archives.members(
        path,
        lambda m: m.endswith(".txt") or m.startswith((f"{root}/train/", f"{root}/val/images/")),
    ):
        pieces = member.removeprefix(f"{root}/").split("/")
        if member.endswith(".txt"):
            texts["/".join(pieces)] = content
        elif member.lower().endswith(".jpeg") and len(pieces) >= 3:
            image = archives.decode_image(content, f"{path}: {member}", image_size or 64)
            images[(pieces[0], pieces[1] if pieces[0] == "train" else pieces[-1])].append(image)
    try:
        synsets = sorted(texts["wnids.txt"].decode().split())
        words = dict(
            line.split("\t", 1) for line in texts["words.txt"].decode().splitlines() if "\t" in line
        )
        annotated = [
            line.split("\t")[:2]
            for line in texts["val/val_annotations.txt"].decode().splitlines()
            if line.strip()
        ]
        class_names = tuple(words[synset].split(",")[0].strip() for synset in synsets)
        test = [(images[("val", file)][0], synsets.index(synset)) for file, synset in annotated]
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{path} lacks part of its lists, or an image that they name ({error}): get it again"
        ) from None
    test_counts = np.bincount([label for _, label in test], minlength=len(synsets))
    train_counts = [len(images[("train", synset)]) for synset in synsets]
    if (
        len(synsets) != TINYIMAGENET_CLASSES
        or (test_counts != TINYIMAGENET_TEST_IMAGES).any()
        or min(train_counts) == 0
    ):
        expected = f"{TINYIMAGENET_CLASSES} classes with training images and {TINYIMAGENET_TEST_IMAGES} validation images each"
        raise DataError(f"{path} has not {expected}: get it again")
    train = [
        (image, label)
        for label, synset in enumerate(synsets)
        for image in images[("train", synset)]
    ]
    return _Raw(class_names=class_names, train=_stacked(train), test=_stacked(test))


def _folder(folder: Path, size: int, seed: int) -> _Raw:
    """train/ and test/ with the same class folders, or class folders alone, of which a seeded part
    becomes the test part.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: correct --data-dir")
    split = [part for part in ("train", "test") if (folder / part).is_dir()]
    if len(split) == 1:
        raise DataError(
            f"{folder} has {split[0]}/ but not its counterpart: give both train/ and test/, or the class folders alone"
        )
    if not split:
        names, pair = _class_folders(folder, size)
        train, test = _hold_out(pair, FOLDER_TEST_SHARE, generator(seed, "folder-test"))
        if len(test[1]) == 0:
            raise DataError(
                f"{folder} has too few images to set {FOLDER_TEST_SHARE:.0%} of each class aside as test: add some, or give train/ and test/"
            )
        return _Raw(class_names=names, train=train, test=test)
    (names, train), (test_names, test) = (_class_folders(folder / part, size) for part in split)
    if names != test_names:
        raise DataError(
            f"{folder}: train/ and test/ differ in class folders: {', '.join(sorted(set(names) ^ set(test_names))[:5])}"
        )
    return _Raw(class_names=names, train=train, test=test)


def _class_folders(folder: Path, size: int):
    """Names of the class folders, sorted, and (images, labels) of all the images below them, in the
    order of their paths.
    """
    try:
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(classes) < 2:
            raise DataError(f"{folder} holds {len(classes)} class folders: at least two are needed")
        images = []
        for label, of_class in enumerate(classes):
            files = sorted(
                p
                for p in of_class.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not p.name.startswith(".")
            )
            if not files:
                raise DataError(f"class folder {of_class} holds no image: fill or remove it")
            images += [
                (archives.decode_image(file.read_bytes(), str(file), size), label) for file in files
            ]
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from None
    return tuple(_readable(p.name) for p in classes), _stacked(images)


def _stacked(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of an image and its label -> two tensors."""
    return torch.from_numpy(np.stack([image for image, _ in pairs])), torch.tensor(
        [label for _, label in pairs], dtype=torch.int64
    )


def _readable(name: str) -> str:
    """A name as it stands in a caption: "maple_tree" -> "maple tree"."""
    return name.replace("_", " ")


def _resized(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> [N, size, size, 3], a thousand at a time."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    out = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    for start in range(0, len(images), 1000):
        chunk = images[start : start + 1000].permute(0, 3, 1, 2).float()
        scaled = F.interpolate(
            chunk, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        )
        out[start : start + 1000] = scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return out


def content_sha256(class_names: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and bytes, part by part in alphabetical order."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().numpy())
    return digest.hexdigest()
