"""The clients of a real federation: images of their own, and an anchors file that each gets once.

Letters: M clients in all, C classes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.settings import Config, PartitionSettings
from semanticfl_ref.data.dataset import Dataset, content_sha256
from semanticfl_ref.data.image_folder import class_folders, renumbered
from semanticfl_ref.data.partition import Partition, make_partition
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.state import require_identity
from semanticfl_ref.formatting import Say
from semanticfl_ref.run.setup import build_anchors, load_data, set_up_torch
from semanticfl_ref.run.train import prepare, shared_facts
from semanticfl_ref.storage import Damaged, load_tensors, save_tensors, write_atomic

ONE_DATASET = ("data", "partition")  # facts that clients share only if all read one data set


class OwnData(NamedTuple):
    """What a client has itself.

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
    own, images = data.partition.indices[client], []
    visual, text = anchors.visual, anchors.text
    if anchors.per == "image":
        visual, images = visual[own], _digests(data.dataset.train_images[own])
    if text.ndim == 3:
        text = text[own]
    about = {
        "client": client,
        "class_names": list(data.dataset.class_names),
        "images": images,
        "per": anchors.per,
        "provenance": anchors.provenance,
    }
    save_tensors(out, {"visual": visual, "text": text}, about)
    revealed = f"nothing: the anchors were made from separate images ({config.anchors.images})"
    if config.anchors.images == "train":
        revealed = f"its {len(own)} training images, to the server that made the anchors"
    document = {
        "leaves_the_server": f"visual anchors {list(visual.shape)}, text anchors "
        f"{list(text.shape)}, float32, and how they were made",
        "client_reveals_for_it": revealed,
        "client_reveals_in_training": "its images per class, once; its parameters and its mean "
        "losses, every round",
    }
    write_atomic(out.with_name(f"{out.name}.json"), json.dumps(document, indent=2) + "\n")
    return {"file": str(out), **document}


def client_context(config: Config, own: OwnData | None) -> RunContext:
    """A client's constants; without data of its own, those of a simulated one.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    config = replace(config, run=replace(config.run, replicas=1))
    if own is None:
        return prepare(config, offline=True)
    set_up_torch(config)
    if (config.partition.feature_shift, config.partition.modality) != ("none", "none"):
        raise UserError("partition.feature_shift and modality simulate clients: leave them out")
    dataset, anchors = _own_dataset(own), None
    if METHODS[config.federation.method].needs_anchors:
        anchors = _own_anchors(own, dataset)
    return make_context(config, dataset, _alone(config, own.client, dataset), anchors)


def introduction(context: RunContext, client: int, owns: bool) -> dict:
    """What a client says of itself when it joins; plain values.

    Args:
        context: the client's.
        client: its number.
        owns: whether its images are its own.
    """
    left_out = ONE_DATASET if owns else ()
    facts = {name: value for name, value in shared_facts(context).items() if name not in left_out}
    histogram = list(context.partition.histograms[client])
    return {"client": client, "histogram": histogram, "facts": json.dumps(facts)}


def with_clients(context: RunContext, introductions: Sequence[dict]) -> RunContext:
    """The server's constants, with the image counts that clients have.

    Raises:
        UserError: clients are missing, or two have one number.
        MismatchError: a client has other settings, versions, data or partition.
    """
    ours, expected = shared_facts(context), range(context.config.partition.clients)
    clients = sorted(introductions, key=lambda each: each["client"])
    numbers = [each["client"] for each in clients]
    if numbers != list(expected):
        raise UserError(
            f"clients {numbers} joined: expected each of 0 to {expected[-1]} once; give every "
            f"SuperNode its own partition-id"
        )
    for each in clients:
        theirs = json.loads(each["facts"])
        same = {name: ours[name] for name in ours if name in theirs or name not in ONE_DATASET}
        remedy = "give it the same versions, and the data or anchors file made for this run"
        require_identity(f"client {each['client']}", theirs, same, remedy)
    histograms = tuple(tuple(each["histogram"]) for each in clients)
    sizes = tuple(map(sum, histograms))
    return replace(
        context, partition=replace(context.partition, histograms=histograms, sizes=sizes)
    )


def _digests(images: torch.Tensor) -> list[str]:
    """A short digest of each image, by which a client finds its anchor."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:32] for image in images]


def _own_dataset(own: OwnData) -> Dataset:
    names, found = class_folders(Path(own.folder), own.image_size, Counter(), least=1)
    strange = sorted(set(names) - set(own.class_names))
    if strange:
        raise UserError(
            f"{own.folder}: {', '.join(strange[:5])}: no classes of this federation, which has "
            f"{', '.join(own.class_names[:5])}, ...: rename or remove the folders"
        )
    labels = renumbered(found.labels, names, own.class_names)
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
    ours = {"client": own.client, "class_names": list(own.class_names)}
    remedy = f"export it again for client {own.client} and the images in {own.folder}"
    require_identity(own.anchors, {name: about[name] for name in ours}, ours, remedy)
    visual, text = tensors["visual"], tensors["text"]
    if about["images"]:
        row_of = {digest: row for row, digest in enumerate(about["images"])}
        found = [row_of.get(digest) for digest in _digests(dataset.train_images)]
        if None in found:
            raise MismatchError(
                f"{own.anchors} has no anchor for {found.count(None)} of {len(found)} images: "
                f"{remedy}"
            )
        visual = visual[found]
        text = text[found] if text.ndim == 3 else text
    return Anchors(visual, text, about["per"], about["provenance"])


def _alone(config: Config, client: int, dataset: Dataset) -> Partition:
    """The partition as a client with its own images knows it: nothing about the others."""
    clients = config.partition.clients
    if client not in range(clients):
        raise UserError(f"partition-id {client}: expected 0 to {clients - 1} (--clients)")
    settings = PartitionSettings(scenario="iid", clients=1)
    whole = make_partition(
        dataset.train_labels, settings, classes=dataset.classes, seed=config.run.seed
    )
    # Nobody else's place is looked at: its own data stand there.
    own = ("indices", "held_out", "sizes", "histograms")
    return replace(whole, **{name: getattr(whole, name) * clients for name in own})
