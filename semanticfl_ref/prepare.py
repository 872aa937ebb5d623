"""What is settled before the first round: the data, their split, the anchors, and what identifies
them.

Letters: M clients in all, C classes, N images.
"""

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from semanticfl_ref.config import NOT_IDENTITY, Config, build, held_out_images, to_flat
from semanticfl_ref.data.cameras import as_held
from semanticfl_ref.data.fetch import cache_folder
from semanticfl_ref.data.partition import Partition, make_partition
from semanticfl_ref.data.sources import Dataset, load_dataset
from semanticfl_ref.diffusion.anchors import Anchors, make_anchors
from semanticfl_ref.diffusion.bank import Plan, Recipe, finished, open_or_build, plan
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.federated.ledger import row_bytes
from semanticfl_ref.federated.methods import METHODS
from semanticfl_ref.federated.world import make_world, new_state
from semanticfl_ref.randomness import generator


def load_data(config: Config, offline: bool) -> tuple[Dataset, Partition, Dataset | None]:
    """The data set as its clients hold it, its split over them, and the images held out for anchors
    as a data set of their own (None without).
    """
    dataset, held = load_images(config, offline)
    return *as_held(dataset, split(config, dataset), config.run.seed), held


def split(config: Config, dataset: Dataset) -> Partition:
    """The training images spread over clients, as the configuration says; places are those in
    `dataset`.
    """
    p = config.partition
    return make_partition(
        dataset.train_labels,
        scenario=p.scenario,
        clients=p.clients,
        classes=len(dataset.class_names),
        alpha=p.alpha,
        seed=config.run.seed,
        held_out_share=p.held_out_share,
        classes_per_client=p.classes_per_client,
        imbalance=p.imbalance,
        features=p.features,
        modality=p.modality,
        file=Path(p.file) if p.file else None,
        data_sha256=dataset.sha256,
    )


def load_images(config: Config, offline: bool) -> tuple[Dataset, Dataset | None]:
    """The data set, and the images held out for anchors as a data set of their own (None without)."""
    d = config.data
    dataset = load_dataset(
        d.name,
        data_dir=Path(d.dir) if d.dir else None,
        image_size=d.image_size or None,
        validation_share=d.validation_share,
        seed=config.run.seed,
        offline=offline,
        data_sha256=d.sha256 or None,
    )
    return take_out(dataset, held_out_images(config), config.run.seed)


def take_out(dataset: Dataset, n: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Move n training images of every class into a data set of their own; n = 0 moves none.

    Raises:
        UserError: a class has no more than n images.
    """
    if n == 0:
        return dataset, None
    counts_C = torch.bincount(dataset.train_labels, minlength=len(dataset.class_names))
    if int(counts_C.min()) <= n:
        raise UserError(
            f"anchors.images = heldout:{n} leaves no image of class {dataset.class_names[int(counts_C.argmin())]!r}, which has {int(counts_C.min())}"
        )
    order_N = torch.randperm(len(dataset.train_labels), generator=generator(seed, "heldout"))
    taken = (
        torch.cat([order_N[dataset.train_labels[order_N] == c][:n] for c in range(len(counts_C))])
        .sort()
        .values
    )
    keep_N = torch.ones(len(order_N), dtype=torch.bool).index_fill(0, taken, False)

    def part(which, name: str) -> Dataset:
        digest = hashlib.sha256(f"{dataset.sha256}/{name}:{n}/{seed}".encode()).hexdigest()
        return replace(
            dataset,
            train_images=dataset.train_images[which],
            train_labels=dataset.train_labels[which],
            sha256=digest,
        )

    return part(keep_N, "without"), part(taken, "heldout")


def build_anchors(
    config: Config,
    dataset: Dataset,
    partition: Partition,
    held: Dataset | None,
    offline: bool,
    say: Callable[[str], None],
) -> Anchors | None:
    """The anchors of the run, from the feature banks in the cache, which are made when they are not
    there; None for a method without.
    """
    if not METHODS[config.federation.method].needs_anchors:
        return None
    d, a = config.diffusion, config.anchors
    images = anchor_images(config, dataset, partition, held)
    plans = bank_plans(config, images, offline)
    state = "from the feature bank in the cache" if finished(plans["visual"]) else "made now, once"
    say(
        f"anchors from {len(images.train_labels)} images by {d.source} at t = {d.timestep}, {state}"
    )
    banks = {name: open_or_build(wanted, say, progress=True) for name, wanted in plans.items()}
    per = (
        a.per if a.images == "train" else "class"
    )  # a client's image has no anchor of its own when other images made them
    anchors = make_anchors(
        banks["visual"],
        images.train_labels,
        width=a.width,
        control=a.control,
        per=per,
        seed=config.run.seed,
        classes=len(images.class_names),
        whiten=a.whiten,
        aggregation=a.aggregation,
        images=a.images,
        text_bank=banks.get("text"),
        text_labels=plans["text"].labels if "text" in plans else None,
    )
    if per == "image" and len(images.train_labels) < len(
        dataset.train_labels
    ):  # back to the training set's places; NaN, as nobody trains on the others
        everywhere = torch.full((len(dataset.train_labels), anchors.visual.shape[1]), torch.nan)
        anchors = replace(
            anchors, visual=everywhere.index_copy_(0, _trained_on(partition), anchors.visual)
        )
    return anchors


def anchor_images(
    config: Config, dataset: Dataset, partition: Partition, held: Dataset | None
) -> Dataset:
    """Whose images make the anchors, as `anchors.images` says; what clients keep for a test of
    their own is not among them.
    """
    if config.anchors.images != "train":
        return held or _folder_of_images(config, dataset)
    kept = _trained_on(partition)
    return (
        dataset
        if len(kept) == len(dataset.train_labels)
        else replace(
            dataset,
            train_images=dataset.train_images[kept],
            train_labels=dataset.train_labels[kept],
        )
    )


def _trained_on(partition: Partition) -> torch.Tensor:
    return torch.cat(partition.indices).sort().values


def bank_plans(config: Config, images: Dataset, offline: bool) -> dict[str, Plan]:
    """The banks that the anchors need: "visual", and "text" where the text anchors are the U-Net's."""
    plans = {"visual": bank_plan(config, images, offline)}
    if config.anchors.text == "unet":
        labels, n = images.train_labels, config.anchors.text_images
        chosen = (
            torch.cat([(labels == c).nonzero().flatten()[:n] for c in labels.unique()])
            .sort()
            .values
        )
        plans["text"] = bank_plan(
            config,
            replace(images, train_images=images.train_images[chosen], train_labels=labels[chosen]),
            offline,
            condition="own-class",
        )
    return plans


def bank_plan(config: Config, images: Dataset, offline: bool, condition: str | None = None) -> Plan:
    """The bank of a data set's training images by the settings' recipe; `condition` in place of
    theirs.
    """
    d = config.diffusion
    recipe = Recipe(
        source=d.source,
        taps=tuple(tap.strip() for tap in d.taps.split(",")),
        timestep=d.timestep,
        pool=d.pool,
        prompt=d.prompt,
        condition=condition or d.condition,
        input_size=d.input_size or None,
        latent=d.latent,
        seed=config.run.seed,
        precision=d.precision,
    )
    return plan(
        images.train_images,
        images.train_labels,
        images.class_names,
        images.sha256,
        recipe,
        cache_dir=cache_folder() / "banks",
        offline=offline,
        device=None if config.run.device == "auto" else config.run.device,
        remedy=f"make it anew with: {build_command(config)}",
    )


def build_command(config: Config) -> str:
    """The command that makes the configuration's banks anew."""
    preset, given = (
        to_flat(
            build({"data.name": config.data.name, "diffusion.source": config.diffusion.source})
        ),
        to_flat(config),
    )
    p, parts = config.partition, ("data.", "diffusion.")
    if (
        p.file or p.imbalance > 1 or p.features != "none" or p.held_out_share > 0
    ):  # the images are those that the clients train on, as they hold them
        parts += ("partition.", "federation.clients_per_round")
    bearing = [
        name
        for name in given
        if name.startswith(parts)
        or name
        in ("anchors.images", "anchors.text", "anchors.text_images", "run.seed", "run.device")
    ]
    changed = [
        word
        for name in bearing
        if given[name] != preset[name]
        for word in ("--set", f"{name}={given[name]}")
    ]
    return shlex.join(
        [
            "python",
            "-m",
            "semanticfl_ref",
            "features",
            "build",
            "--anew",
            "--dataset",
            config.data.name,
            "--sd",
            config.diffusion.source,
            *changed,
        ]
    )


def identity_of(
    config: Config, dataset: Dataset, partition: Partition, anchors: Anchors | None
) -> dict:
    """What a checkpoint must agree with: every setting that bears on the numbers, and the content
    behind those that are paths.
    """
    settings = {name: value for name, value in to_flat(config).items() if name not in NOT_IDENTITY}
    bank = (
        None
        if anchors is None
        else {
            k: v
            for k, v in anchors.provenance.items()
            if k in ("bank", "text_bank", "per", "control")
        }
    )
    return {**settings, "data": dataset.sha256, "partition": partition.sha256, "anchors": bank}


def provenance_of(config: Config, anchors: Anchors | None) -> dict:
    """Whose images made the anchors, what the server had to see for it, and by what."""
    if anchors is None:
        return {"anchors": None}
    seen = {"train": "every client's training images"}.get(
        config.anchors.images, f"images of its own: {config.anchors.images}"
    )
    return {**anchors.provenance, "server_saw": seen}


def dry_run(config: Config) -> dict:
    """Sizes of the run: images, clients, steps, entries, bytes. Reads the data set, fetches and
    writes nothing.
    """
    dataset, partition, _ = load_data(config, offline=True)
    anchors = (
        _blank_anchors(config, len(dataset.class_names))
        if METHODS[config.federation.method].needs_anchors
        else None
    )
    world = make_world(config, dataset, partition, anchors)
    f, state = config.federation, new_state(world)
    per_client = [
        f.local_epochs * max(1, n // f.batch_size + (n % f.batch_size > 1)) for n in partition.sizes
    ]
    sent = {
        way: f.clients_per_round * sum(kinds.values()) for way, kinds in row_bytes(world).items()
    }
    return {
        "dataset": dataset.name,
        "images": {
            "train": len(dataset.train_labels),
            "validation": len(dataset.validation_labels),
            "test": len(dataset.test_labels),
        },
        "image_size": dataset.image_size,
        "classes": len(dataset.class_names),
        "clients": len(partition.sizes),
        "client_images": [int(n) for n in partition.sizes],
        "clients_per_round": f.clients_per_round,
        "rounds": f.rounds,
        "steps_per_round": round(f.clients_per_round * sum(per_client) / len(per_client), 1),
        "row_entries": world.layout.entries,
        "checkpoint_bytes": sum(
            tensor.nbytes
            for tensor in (state.row, state.served, state.batch_norm, *state.memory.values())
        ),
        "bytes_down_per_round": sent["down"],
        "bytes_up_per_round": sent["up"],
    }


def _folder_of_images(config: Config, dataset: Dataset) -> Dataset:
    """The training part of class folders, read to the data set's size and with its numbers of
    classes; their names must be the data set's classes.
    """
    if not Path(config.anchors.images).is_dir():
        raise DataError(
            f"anchors.images = {config.anchors.images}: there is no such folder; write train, heldout:n, or a folder of class folders"
        )
    folder = load_dataset(
        "folder",
        data_dir=Path(config.anchors.images),
        image_size=dataset.image_size,
        seed=config.run.seed,
    )
    if sorted(folder.class_names) != sorted(dataset.class_names):
        differing = sorted(set(folder.class_names) ^ set(dataset.class_names))
        raise UserError(
            f"anchors.images = {config.anchors.images}: its class folders are not the classes of {dataset.name}: {', '.join(differing[:5])}"
        )
    number_C = torch.tensor(
        [dataset.class_names.index(name) for name in folder.class_names]
    )  # folders come by name, a data set's classes in its own order
    return replace(
        folder, train_labels=number_C[folder.train_labels], class_names=dataset.class_names
    )


def _blank_anchors(config: Config, classes: int) -> Anchors:
    """Anchors of the right widths, for sizes only. Without a folder to read it from, the text width
    is Stable Diffusion 1.5's.
    """
    if config.anchors.text == "unet":
        return Anchors(
            visual=torch.zeros(classes, config.anchors.width),
            text=torch.zeros(classes, config.anchors.width),
            per="class",
            provenance={},
        )
    source = (
        Path(__file__).parent / "diffusion" / "tiny"
        if config.diffusion.source == "tiny"
        else Path(config.diffusion.source)
    )
    described = source / "text_encoder" / "config.json"
    text = (
        json.loads(described.read_text(encoding="utf-8"))["hidden_size"]
        if described.is_file()
        else 768
    )
    return Anchors(
        visual=torch.zeros(classes, config.anchors.width),
        text=torch.zeros(classes, text),
        per="class",
        provenance={},
    )
