"""From a configuration to everything a run needs: data, partition, anchors, identity.

Letters: N images, C classes.
"""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import NOT_IDENTITY, Config, DataSettings, to_flat
from semanticfl_ref.data.corruptions import apply_partition
from semanticfl_ref.data.dataset import Dataset, load_dataset
from semanticfl_ref.data.partition import Partition, make_partition
from semanticfl_ref.device import resolve_device
from semanticfl_ref.diffusion.anchors import Anchors, make_anchors
from semanticfl_ref.diffusion.extract import open_or_build
from semanticfl_ref.diffusion.feature_cache import CachePlan, plan_cache
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator
from semanticfl_ref.storage import cache_folder

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run.

    Attributes:
        dataset: as its clients hold it.
        partition: of its training images.
        held_out: images held out for the anchors, as the training part of a data set of their own;
            None without.
    """

    dataset: Dataset
    partition: Partition
    held_out: Dataset | None


def load_data(config: Config, *, offline: bool = False) -> RunData:
    """Load the data set, hold out images for the anchors if asked to, and partition the rest.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    dataset, held_out = load_images(config, offline=offline)
    partition = partition_images(config, dataset)
    dataset, partition = apply_partition(dataset, partition, config.run.seed)
    return RunData(dataset=dataset, partition=partition, held_out=held_out)


def load_images(config: Config, *, offline: bool = False) -> tuple[Dataset, Dataset | None]:
    """The data set as published, without the images held out for anchors; and those (or None)."""
    dataset = load_dataset(config.data, seed=config.run.seed, offline=offline)
    return hold_out_per_class(dataset, config.anchors.held_out, config.run.seed)


def partition_images(config: Config, dataset: Dataset) -> Partition:
    """The training images partitioned as configured; indices are those of `dataset`."""
    return make_partition(
        dataset.train_labels,
        config.partition,
        classes=dataset.classes,
        seed=config.run.seed,
        data_sha256=dataset.sha256,
    )


def hold_out_per_class(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Move `count` training images of every class into a data set of their own.

    Raises:
        UserError: a class has no more than `count` images.
    """
    if count == 0:
        return dataset, None
    labels = dataset.train_labels
    counts_C = torch.bincount(labels, minlength=dataset.classes)
    if int(counts_C.min()) <= count:
        name = dataset.class_names[int(counts_C.argmin())]
        raise UserError(
            f"anchors.images = heldout:{count} leaves no image of class {name!r}, which has "
            f"{int(counts_C.min())}"
        )
    order_N = torch.randperm(len(labels), generator=generator(seed, "heldout"))
    taken = [order_N[labels[order_N] == c][:count] for c in range(dataset.classes)]
    taken = torch.cat(taken).sort().values
    is_left_N = torch.ones(len(labels), dtype=torch.bool).index_fill(0, taken, False)

    def part(which: torch.Tensor, name: str) -> Dataset:
        sha256 = hashlib.sha256(f"{dataset.sha256}/{name}:{count}/{seed}".encode()).hexdigest()
        return replace(training_subset(dataset, which), sha256=sha256)

    return part(is_left_N, "without"), part(taken, "heldout")


def training_subset(dataset: Dataset, which: torch.Tensor) -> Dataset:
    """The data set with these training images only (indices or a mask)."""
    images, labels = dataset.train_images[which], dataset.train_labels[which]
    return replace(dataset, train_images=images, train_labels=labels)


def build_anchors(
    config: Config, data: RunData, *, offline: bool = False, say: Say = lambda text: None
) -> Anchors | None:
    """The anchors of a run; None for a method without.

    Their features come from the cache, and are extracted first if they are not there.

    Args:
        config: the configuration.
        data: of the run.
        offline: no network access.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    if not METHODS[config.federation.method].needs_anchors:
        return None
    images = anchor_images(config, data)
    plans = cache_plans(config, images, offline=offline)
    state = "from the feature cache" if plans["visual"].complete else "extracted now, once"
    say(
        f"anchors from {len(images.train_labels)} images by {config.diffusion.source} at t = "
        f"{config.diffusion.timestep}, {state}"
    )
    sources = {use: open_or_build(plan, say) for use, plan in plans.items()}
    anchors = make_anchors(
        sources["visual"],
        config.anchors,
        classes=images.classes,
        seed=config.run.seed,
        text_source=sources.get("text"),
    )
    total = len(data.dataset.train_labels)
    if anchors.per == "image" and len(images.train_labels) < total:
        # Back to the training set's indices; NaN, since the other images are never trained on.
        visual = torch.full((total, anchors.visual.shape[1]), torch.nan)
        visual.index_copy_(0, data.partition.trained, anchors.visual)
        anchors = replace(anchors, visual=visual)
    return anchors


def anchor_images(config: Config, data: RunData) -> Dataset:
    """The images that make the anchors, as `anchors.images` says.

    Images of the clients' own test sets are not among them.
    """
    if config.anchors.images == "train":
        trained = data.partition.trained
        everything = len(trained) == len(data.dataset.train_labels)
        return data.dataset if everything else training_subset(data.dataset, trained)
    return data.held_out or _image_folder(config, data.dataset)


def cache_plans(config: Config, images: Dataset, *, offline: bool = False) -> dict[str, CachePlan]:
    """The feature caches that the anchors need: "visual", and "text" with anchors.text = unet."""
    plans = {"visual": cache_plan(config, images, offline=offline)}
    if config.anchors.text == "unet":
        labels, count = images.train_labels, config.anchors.text_images
        firsts = [(labels == c).nonzero().flatten()[:count] for c in labels.unique()]
        chosen = training_subset(images, torch.cat(firsts).sort().values)
        own_class = replace(config.diffusion, condition="own-class")
        config = replace(config, diffusion=own_class)
        plans["text"] = cache_plan(config, chosen, offline=offline)
    return plans


def cache_plan(config: Config, images: Dataset, *, offline: bool = False) -> CachePlan:
    """The feature cache of a data set's training images."""
    return plan_cache(
        images,
        config.diffusion,
        seed=config.run.seed,
        device=resolve_device(config.run.device),
        folder=cache_folder() / "features",
        offline=offline,
        remedy=f"build it again with: {rebuild_command(config)}",
    )


def rebuild_command(config: Config) -> str:
    """The command that builds the feature caches of a configuration again."""
    source, partition = config.diffusion.source, config.partition
    preset = to_flat(resolve({"data.name": config.data.name, "diffusion.source": source}))
    settings = to_flat(config)
    prefixes = ("data.", "diffusion.")
    names = {"anchors.images", "anchors.text", "anchors.text_images", "run.seed", "run.device"}
    partitioned = partition.file or partition.imbalance > 1 or partition.held_out_share > 0
    if partitioned or partition.feature_shift != "none":
        # The images are those that the clients train on, as they hold them.
        prefixes += ("partition.",)
        names.add("federation.clients_per_round")
    relevant = [name for name in settings if name.startswith(prefixes) or name in names]
    changed = [name for name in relevant if settings[name] != preset[name]]
    command = ["python", "-m", "semanticfl_ref", "features", "build", "--rebuild"]
    command += ["--dataset", config.data.name, "--sd", source]
    for name in changed:
        command += ["--set", f"{name}={settings[name]}"]
    return shlex.join(command)


def identity_of(config: Config, data: RunData, anchors: Anchors | None) -> dict:
    """What a checkpoint must agree with: every setting that affects the numbers, and the content
    behind those that are paths."""
    settings = {k: v for k, v in to_flat(config).items() if k not in NOT_IDENTITY}
    made_by = None
    if anchors is not None:
        keys = ("cache", "text_cache", "per", "control")
        made_by = {key: anchors.provenance[key] for key in keys}
    content = {"data": data.dataset.sha256, "partition": data.partition.sha256}
    return {**settings, **content, "anchors": made_by}


def provenance_of(config: Config, anchors: Anchors | None) -> dict:
    """How the anchors were made, and what the server had to see for it; JSON values."""
    if anchors is None:
        return {"anchors": None}
    own = config.anchors.images == "train"
    seen = "all clients' training images" if own else f"separate images: {config.anchors.images}"
    return {**anchors.provenance, "server_saw": seen}


def _image_folder(config: Config, dataset: Dataset) -> Dataset:
    """The training part of class folders, with the size and the class numbers of `dataset`."""
    path, name = Path(config.anchors.images), f"anchors.images = {config.anchors.images}"
    if not path.is_dir():
        raise DataError(
            f"{name}: there is no such folder; expected train, heldout:N, or a folder of class "
            f"folders"
        )
    settings = DataSettings(name="image_folder", dir=str(path), image_size=dataset.image_size)
    folder = load_dataset(settings, seed=config.run.seed)
    if sorted(folder.class_names) != sorted(dataset.class_names):
        differing = sorted(set(folder.class_names) ^ set(dataset.class_names))
        raise UserError(
            f"{name}: its class folders are not the classes of {dataset.name}: "
            f"{', '.join(differing[:5])}"
        )
    # Folders are sorted by name; a data set's classes have their own order.
    number_C = torch.tensor([dataset.class_names.index(name) for name in folder.class_names])
    labels = number_C[folder.train_labels]
    return replace(folder, train_labels=labels, class_names=dataset.class_names)
