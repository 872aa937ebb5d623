"""The clients of a real federation: images of their own, and an anchors file that each gets once.

Letters: M clients in all, C classes.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset, content_sha256
from semanticfl_ref.data.image_folder import class_folders
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.ranks import differences
from semanticfl_ref.formatting import Say
from semanticfl_ref.run.setup import build_anchors, load_data, set_threads
from semanticfl_ref.run.train import shared_facts
from semanticfl_ref.storage import Damaged, load_tensors, save_tensors, sha256_of, write_atomic

ONE_DATASET = ("data", "partition")  # facts that clients share only if all read one data set


@dataclass(frozen=True)
class OwnData:
    """A client's images and anchors.

    Attributes:
        client: its number.
        folder: folder of class folders, of all classes or of some.
        anchors: the file that `export_anchors` made for it; empty for a method without.
        class_names, image_size: the federation's.
    """

    client: int
    folder: str
    anchors: str
    class_names: tuple[str, ...]
    image_size: int


@dataclass(frozen=True)
class ClientFacts:
    """What a client says when it joins: its number, node, image counts per class, whether its
    images are its own, and its settings and versions."""

    client: int
    node: int
    histogram: tuple[int, ...]
    owns: bool
    facts: dict


def export_anchors(
    config: Config, client: int, out: Path, *, offline: bool = False, say: Say = lambda text: None
) -> dict:
    """Write the anchors that a client gets, and beside it what it took to make them.

    Returns:
        The document beside it: what leaves the server, and what the client must reveal.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    if not METHODS[config.federation.method].needs_anchors:
        raise UserError(f"{config.federation.method} has no anchors: its clients need no file")
    if client not in range(config.partition.clients):
        raise UserError(f"--client {client}: expected 0 to {config.partition.clients - 1}")
    data = load_data(config, offline=offline)
    anchors = build_anchors(config, data, offline=offline, say=say)
    own, images = data.partition.indices[client], None
    tensors = {"visual": anchors.visual, "text": anchors.text}
    if anchors.per == "image":
        tensors["visual"] = anchors.visual[own]
        images = _images_sha256(data.dataset.train_images[own], data.dataset.train_labels[own])
    if anchors.text.ndim == 3:
        tensors["text"] = anchors.text[own]
    about = {
        "client": client,
        "class_names": list(data.dataset.class_names),
        "per": anchors.per,
        "images": images,
        "provenance": anchors.provenance,
    }
    save_tensors(out, tensors, about)
    revealed = f"nothing: the anchors were made from separate images ({config.anchors.images})"
    if config.anchors.images == "train":
        revealed = f"its {len(own)} training images, to the server that made the anchors"
    document = {
        "file": str(out),
        "leaves_the_server": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "bytes": sum(4 * tensor.numel() for tensor in tensors.values()),
        "client_reveals_for_it": revealed,
        "client_reveals_in_training": "its images per class, once; its parameters and means of its "
        "losses, every round",
    }
    write_atomic(out.with_name(f"{out.name}.json"), json.dumps(document, indent=2) + "\n")
    return document


def client_context(config: Config, own: OwnData | None) -> RunContext:
    """A client's constants; without data of its own, those of a simulated one.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    config = replace(config, run=replace(config.run, replicas=1))
    set_threads(config)
    if own is None:
        data = load_data(config, offline=True)
        anchors = build_anchors(config, data, offline=True)
        return make_context(config, data.dataset, data.partition, anchors)
    if (config.partition.feature_shift, config.partition.modality) != ("none", "none"):
        raise UserError("partition.feature_shift and modality simulate clients: leave them out")
    dataset, anchors = _own_dataset(own), None
    if METHODS[config.federation.method].needs_anchors:
        anchors = _own_anchors(own, dataset)
    return make_context(config, dataset, _alone(config, own.client, dataset), anchors)


def with_clients(context: RunContext, clients: Sequence[ClientFacts]) -> RunContext:
    """The server's constants, with the image counts of clients that have data of their own.

    Raises:
        UserError: clients are missing, or two have one number.
        MismatchError: a client has other settings, versions, data or partition.
    """
    ours, numbers = shared_facts(context), Counter(each.client for each in clients)
    expected = range(context.config.partition.clients)
    if sorted(numbers.elements()) != list(expected):
        raise UserError(
            f"clients {sorted(numbers.elements())} joined: expected each of 0 to {expected[-1]} "
            f"once; give every SuperNode its own partition-id"
        )
    for each in clients:
        left_out = ONE_DATASET if each.owns else ()
        pair = [{k: v for k, v in f.items() if k not in left_out} for f in (ours, each.facts)]
        found = differences(*pair, "on the server", f"with client {each.client}")
        if found:
            raise MismatchError(
                f"client {each.client} (node {each.node}) does not fit this run: {found}. Give it "
                f"the same versions, and the data or anchors file made for this run"
            )
    if not any(each.owns for each in clients):
        return context
    histograms = tuple(each.histogram for each in sorted(clients, key=lambda each: each.client))
    partition = replace(
        context.partition,
        scenario="the clients' own",
        sizes=tuple(map(sum, histograms)),
        histograms=histograms,
        sha256=sha256_of(histograms),
    )
    return replace(context, partition=partition)


def _images_sha256(images: torch.Tensor, labels: torch.Tensor) -> str:
    return sha256_of({}, {"images": images, "labels": labels})


def _own_dataset(own: OwnData) -> Dataset:
    names, found = class_folders(Path(own.folder), own.image_size, Counter(), least=1)
    strange = sorted(set(names) - set(own.class_names))
    if strange:
        raise UserError(
            f"{own.folder}: {', '.join(strange[:5])}: no classes of this federation, which has "
            f"{', '.join(own.class_names[:5])}, ...: rename or remove the folders"
        )
    number_C = torch.tensor([own.class_names.index(name) for name in names])
    labels = number_C[found.labels]
    tensors = {"train_images": found.images, "train_labels": labels}
    for part in ("validation", "test"):
        tensors |= {f"{part}_images": found.images[:0], f"{part}_labels": labels[:0]}
    return Dataset(
        name="own",
        class_names=own.class_names,
        sha256=content_sha256(own.class_names, tensors),
        **tensors,
    )


def _own_anchors(own: OwnData, dataset: Dataset) -> Anchors:
    if not own.anchors:
        raise UserError(
            f"client {own.client} has no anchors: start the SuperNode with --node-config "
            f"'anchors=\"FILE\" ...', made by `anchors export --client {own.client}`"
        )
    try:
        tensors, about, _ = load_tensors(Path(own.anchors))
    except Damaged as error:
        raise MismatchError(f"{own.anchors} is damaged ({error}): export it again") from None
    images = _images_sha256(dataset.train_images, dataset.train_labels)
    expected = {"client": own.client, "class_names": list(own.class_names)}
    expected |= {"images": images} if about["images"] else {}
    wrong = [name for name, value in expected.items() if about[name] != value]
    if wrong:
        raise MismatchError(
            f"{own.anchors} was made for another client: its {' and '.join(wrong)} differ; export "
            f"it again for client {own.client} and the images in {own.folder}"
        )
    return Anchors(tensors["visual"], tensors["text"], about["per"], about["provenance"])


def _alone(config: Config, client: int, dataset: Dataset) -> Partition:
    """The partition as a client with its own images knows it: nothing about the others."""
    clients, count = config.partition.clients, len(dataset.train_labels)
    if client not in range(clients):
        raise UserError(f"partition-id {client}: expected 0 to {clients - 1} (--clients)")
    nothing = torch.zeros(0, dtype=torch.int64)
    indices, none = [nothing] * clients, (0,) * dataset.classes
    indices[client] = torch.arange(count)
    histogram = torch.bincount(dataset.train_labels, minlength=dataset.classes).tolist()
    return Partition(
        scenario="own",
        seed=config.run.seed,
        alpha=None,
        indices=tuple(indices),
        held_out=(nothing,) * clients,
        sizes=tuple(map(len, indices)),
        histograms=tuple(tuple(histogram) if k == client else none for k in range(clients)),
        skew=0.0,
        kl=0.0,
        sha256=dataset.sha256,
    )
