"""A folder of class folders of images, with or without a folder for each part."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.config.schema import is_unicode
from semanticfl_ref.data.archives import decode_image, raise_problems
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, readable
from semanticfl_ref.data.own_data import PART_OF, SIDE, assemble, own_path, part_of
from semanticfl_ref.errors import DataError, UserError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif"}
SUFFIXES |= {".tiff", ".webp"}
BESIDE = {"", "set", "data", "images", "seg"}  # words that may stand beside it: seg_train, test set
# What systems and programs leave in folders.
LITTER = {"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"}


def read(options: ReadOptions) -> Parts:
    """The images of data.dir, in the order of the class folders' names, then of their paths.

    It holds folders of parts (train, test, validation, in usual spellings), each with the same
    class folders; or only class folders. With data.clients_from = folder, each holds a folder for
    every client, and this the class folders.

    Raises:
        UserError: an option that does not fit.
        DataError: a folder that can be understood in several ways, or in none; an image that
            cannot be read; a class whose images are all alike.
    """
    folder, settings = own_path(options, "FOLDER"), options.settings
    size = settings.image_size or SIDE
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: correct --data-dir")
    if settings.clients_from not in ("", "folder"):
        raise UserError(
            f"data.clients_from = {settings.clients_from!r}: image_folder accepts only `folder`"
        )
    places, passed, notes = part_folders(folder), Counter(), []
    clients = _visible_folders(places["train"]) if settings.clients_from else []
    for part in ("validation", "test"):
        if part in places and not _is_labelled(places[part], [places["train"], *clients]):
            notes.append(f"{places.pop(part)} holds no class folders: left out, as unlabelled")
    if settings.clients_from:
        found = {"train": client_folders(places["train"], size, passed)}
        for part, place in places.items():
            if part != "train":
                found[part] = _without_clients(place, size, passed, found["train"][0])
    else:
        found = {part: class_folders(place, size, passed) for part, place in places.items()}
    names = found["train"][0]
    for part, (others, _) in found.items():
        if others != names:
            differing = ", ".join(sorted(set(names) ^ set(others))[:5])
            raise DataError(
                f"{places['train']} and {places[part]} have different class folders "
                f"({differing}): give both the same"
            )
    parts = {part: images for part, (_, images) in found.items()}
    if passed:
        listed = ", ".join(f"{count} {kind}" for kind, count in passed.most_common(5))
        notes.append(f"passed over in {folder}: {listed}")
    names_M = tuple(path.name for path in clients)
    return assemble(names, parts, options, folder, client_names=names_M, notes=notes)


def part_folders(folder: Path) -> dict[str, Path]:
    """Part ("train", "validation", "test") -> its folder; {"train": folder} for class folders.

    Raises:
        DataError: folders of parts beside other folders, two of one part, or none to train on.
    """
    parts, others = {}, []
    for path in _visible_folders(folder):
        words = re.split("[^a-z]+", path.name.lower())
        known = [PART_OF[word] for word in words if word in PART_OF]
        if len(known) != 1 or not BESIDE.issuperset(set(words) - set(PART_OF)):
            others.append(path)
        elif known[0] in parts:
            raise DataError(
                f"{folder}: {parts[known[0]].name} and {path.name} both look like the {known[0]} "
                f"part: rename or remove one"
            )
        else:
            parts[known[0]] = path
    if not parts or (len(parts) == 1 and others):  # a class may be called train
        return {"train": folder}
    if others:
        raise DataError(
            f"{folder} holds parts ({', '.join(p.name for p in parts.values())}) and other folders "
            f"({', '.join(p.name for p in others[:5])}): move the others elsewhere"
        )
    if "train" not in parts:
        raise DataError(f"{folder} holds no train/ beside {next(iter(parts.values())).name}")
    return dict(sorted(parts.items(), key=lambda item: item[0] != "train"))  # it is read first


def _is_labelled(place: Path, trained: list[Path]) -> bool:
    """Whether a part has class folders: more than one folder, or one that a training folder has."""
    folders = _visible_folders(place)
    return len(folders) > 1 or any((own / f.name).is_dir() for own in trained for f in folders)


def class_folders(
    folder: Path, size: int, passed: Counter[str], least: int = 2
) -> tuple[tuple[str, ...], Labelled]:
    """The names of the class folders, sorted, and the images below them; counts other files.

    Raises:
        DataError: fewer than `least` classes, or what `read` refuses.
    """
    images, labels, problems = [], [], []
    classes = _visible_folders(folder)
    if len(classes) < least:
        raise DataError(f"{folder} holds {len(classes)} class folders: at least {least} are needed")
    names = tuple(readable(path.name) for path in classes)
    for name in names:
        if not is_unicode(name):
            raise DataError(f"{folder}: the name of class folder {name!r} is not UTF-8: rename it")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{folder}: two class folders are called {twice[0]!r}: rename one")
    try:
        for label, class_folder in enumerate(classes):
            files = sorted(_files(class_folder, passed))
            if not files:
                raise DataError(f"class folder {class_folder} holds no image: fill or remove it")
            own = []
            for file in files:
                try:
                    own.append(decode_image(file.read_bytes(), str(file), size))
                except DataError as error:
                    problems.append(str(error))
            if len(own) > 1 and all((image == own[0]).all() for image in own):
                raise DataError(
                    f"the {len(own)} images of class folder {class_folder} are all alike, as read: "
                    f"open one and correct or remove them"
                )
            images += own
            labels += [label] * len(own)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from None
    raise_problems(problems)
    return names, Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def client_folders(
    folder: Path, size: int, passed: Counter[str]
) -> tuple[tuple[str, ...], Labelled]:
    """As `class_folders`, from a folder for every client, which may lack classes."""
    found = [class_folders(own, size, passed, least=1) for own in _visible_folders(folder)]
    names = tuple(sorted({name for own, _ in found for name in own}))
    if len(names) < 2 or all(map(part_of, names)):
        raise DataError(
            f"{folder} does not hold a folder of class folders for every client (parts, such as "
            f"train/, lie outside): it holds {', '.join(names[:5]) or 'none'} in them"
        )
    images, labels, clients = [], [], []
    for client, (own, part) in enumerate(found):
        images.append(part.images)
        labels.append(renumbered(part.labels, own, names))
        clients.append(torch.full_like(part.labels, client))
    return names, Labelled(torch.cat(images), torch.cat(labels), torch.cat(clients))


def _without_clients(
    folder: Path, size: int, passed: Counter[str], names: tuple[str, ...]
) -> tuple[tuple[str, ...], Labelled]:
    """A part beside training clients: class folders, or a folder of them for every client; in
    either case it may lack classes."""
    shared = any(readable(path.name) in names for path in _visible_folders(folder))
    own, part = (
        class_folders(folder, size, passed, least=1)
        if shared
        else client_folders(folder, size, passed)
    )
    if not set(own) <= set(names):
        return own, part
    return names, Labelled(part.images, renumbered(part.labels, own, names))


def renumbered(labels: torch.Tensor, own: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """Labels of the classes `own` as labels of the same classes among `names`."""
    return torch.tensor([names.index(name) for name in own])[labels]


def _visible_folders(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
        return [path for path in inside if _is_visible(path.name) and path.is_dir()]
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from None


def _files(folder: Path, passed: Counter[str]) -> Iterator[Path]:
    """The image files below a folder, through links too; other files are counted by suffix."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        identity = os.path.realpath(place)
        if identity in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = filter(_is_visible, folders)
        for name in filter(_is_visible, files):
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path
            elif not path.exists():
                passed["broken links"] += 1
            else:
                passed[path.suffix.lower() or "without suffix"] += 1


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in LITTER
