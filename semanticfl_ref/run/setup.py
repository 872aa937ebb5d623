"""From a configuration to everything a run needs: data, partition, anchors, identity.

Letters: N images, C classes.
"""

import hashlib
from dataclasses import dataclass, replace

import torch

from semanticfl_ref.config.command_line import shell_command, to_flags
from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import NOT_IDENTITY, Config, DataSettings, to_flat
from semanticfl_ref.data.corruptions import apply_partition
from semanticfl_ref.data.dataset import Dataset, load_dataset
from semanticfl_ref.data.image_folder import renumbered
from semanticfl_ref.data.partition import Partition, make_partition
from semanticfl_ref.device import resolve_device
from semanticfl_ref.diffusion.anchors import Anchors, make_anchors
from semanticfl_ref.diffusion.extract import open_or_build
from semanticfl_ref.diffusion.feature_cache import CachePlan, plan_cache
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.flat import ORDER
from semanticfl_ref.formatting import Say
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.preconditions import check_anchors
from semanticfl_ref.storage import cache_folder, sha256_of, user_path

# Prefixes of the settings that features depend on. The partition counts: features are those of the
# images that clients train on, as clients hold them.
FEATURE_SETTINGS = (
    "data.",
    "partition.",
    "diffusion.",
    "anchors.images",
    "anchors.text",
    "federation.clients_per_round",
    "federation.method",
    "feddifrc.",
    "run.seed",
    "run.device",
)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run.

    Attributes:
        dataset: the data set as the clients hold it.
        partition: partition of its training images.
        held_out: images held out for the anchors, as the training part of a data set of their own;
            None without.
    """

    dataset: Dataset
    partition: Partition
    held_out: Dataset | None


def set_up_torch(config: Config) -> None:
    """Set torch's CPU threads per client: results are reproducible for a fixed number.

    Raises:
        UserError: the device is not available, which is known at once.
    """
    resolve_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)


def load_data(config: Config, *, offline: bool = False) -> RunData:
    """Load the data set, hold out images for the anchors if asked to, and partition the rest.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    dataset, held_out = load_images(config, offline=offline)
    if config.run.patience and not len(dataset.validation_labels):
        raise UserError(
            f"run.patience needs validation images, {dataset.name} has none: set training images "
            f"aside with --set data.validation_share=0.1"
        )
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
        natural_N=dataset.train_clients,
        client_names=dataset.client_names,
    )


def hold_out_per_class(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Move `count` training images of every class into a data set of their own.

    Raises:
        UserError: a class has no more than `count` images.
    """
    if count == 0:
        return dataset, None
    labels = dataset.train_labels
    fewest = torch.bincount(labels, minlength=dataset.classes).min(0)
    if fewest.values <= count:
        raise UserError(
            f"anchors.images = heldout:{count} leaves no image of class "
            f"{dataset.class_names[fewest.indices]!r}, which has {int(fewest.values)}"
        )
    order_N = torch.randperm(len(labels), generator=generator(seed, "heldout"))
    taken = [order_N[labels[order_N] == c][:count] for c in range(dataset.classes)]
    is_taken_N = torch.zeros(len(labels), dtype=torch.bool)
    is_taken_N[torch.cat(taken)] = True

    def part(which_N: torch.Tensor, name: str) -> Dataset:
        sha256 = hashlib.sha256(f"{dataset.sha256}/{name}:{count}/{seed}".encode()).hexdigest()
        return replace(training_subset(dataset, which_N), sha256=sha256)

    return part(~is_taken_N, "without"), part(is_taken_N, "heldout")


def training_subset(dataset: Dataset, which: torch.Tensor) -> Dataset:
    """The data set with these training images only (indices or a mask)."""
    return replace(
        dataset,
        train_images=dataset.train_images[which],
        train_labels=dataset.train_labels[which],
        train_clients=None if dataset.train_clients is None else dataset.train_clients[which],
    )


def build_anchors(
    config: Config, data: RunData, *, offline: bool = False, say: Say = lambda text: None
) -> Anchors | None:
    """The anchors of a run; None for a method without.

    Their features come from the cache, and are extracted first if they are not there.

    Args:
        config: the configuration.
        data: the run's data.
        offline: no network access.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    if not METHODS[config.federation.method].needs_anchors:
        return None
    images = anchor_images(config, data)
    check_anchors(config, images)
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
    if config.anchors.images != "train" or len(images.train_labels) == total:
        return anchors

    def at_indices(rows: torch.Tensor) -> torch.Tensor:
        """Back to the training set's indices; NaN, since the other images are never trained on."""
        whole = rows.new_full((total, *rows.shape[1:]), torch.nan)
        whole[data.partition.trained] = rows
        return whole

    if anchors.per == "image":
        anchors = replace(anchors, visual=at_indices(anchors.visual))
    if anchors.text.ndim == 3:
        anchors = replace(anchors, text=at_indices(anchors.text))
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
    basis = plans["visual"].id
    if config.anchors.levels == "unet":  # the latent is the same for all captions
        layers = ",".join(name for name in config.diffusion.layer_names if name != "vae")
        config = replace(config, diffusion=replace(config.diffusion, layers=layers))
    if METHODS[config.federation.method].texts_per_image(config):
        plans["text"] = cache_plan(config, images, offline=offline, every_class=True, basis=basis)
    elif config.anchors.text == "unet":
        labels, count = images.train_labels, config.anchors.text_images
        firsts = [(labels == c).nonzero().flatten()[:count] for c in labels.unique()]
        chosen = training_subset(images, torch.cat(firsts).sort().values)
        config = replace(config, diffusion=replace(config.diffusion, condition="own-class"))
        plans["text"] = cache_plan(config, chosen, offline=offline, basis=basis)
    return plans


def cache_plan(config: Config, images: Dataset, *, offline: bool = False, **options) -> CachePlan:
    """The feature cache of a data set's training images; `options` are those of `plan_cache`."""
    plan = plan_cache(
        images,
        config.diffusion,
        seed=config.run.seed,
        device=resolve_device(config.run.device),
        folder=cache_folder() / "features",
        offline=offline,
        **options,
    )
    return replace(plan, remedy=f"build it again with: {rebuild_command(config)}")


def rebuild_command(config: Config) -> str:
    """The command that builds the feature caches of a configuration again."""
    settings = to_flat(config)
    relevant = {name: settings[name] for name in settings if name.startswith(FEATURE_SETTINGS)}
    return shell_command("features", "build", "--rebuild", *to_flags(resolve(relevant)))


def identity_of(context: RunContext) -> dict:
    """What a checkpoint must agree with: every setting that affects the numbers, and the content
    behind those that are paths."""
    settings, made_by = to_flat(context.config), None
    if context.anchors is not None:
        anchors, keys = context.anchors, ("cache", "text_cache", "per", "control")
        made_by = {key: anchors.provenance.get(key) for key in keys}
        if made_by["cache"] is None:  # the caller's own
            made_by["sha256"] = sha256_of({}, {"visual": anchors.visual, "text": anchors.text})
    return {
        **{name: value for name, value in settings.items() if name not in NOT_IDENTITY},
        "order": ORDER,
        "data": context.dataset.sha256,
        "partition": context.partition.sha256,
        "anchors": made_by,
    }


def provenance_of(context: RunContext) -> dict:
    """How the anchors were made, and what the server had to see for it; JSON values."""
    if context.anchors is None:
        return {"anchors": None}
    images = context.config.anchors.images
    own = "all clients' training images"
    seen = own if images == "train" else f"separate images: {images}"
    return {**context.anchors.provenance, "server_saw": seen}


def _image_folder(config: Config, dataset: Dataset) -> Dataset:
    """The training part of class folders, with the size and the class numbers of `dataset`."""
    path = user_path(config.anchors.images)
    if not path.is_dir():
        raise DataError(
            f"anchors.images = {path}: there is no such folder; expected train, heldout:N, or a "
            f"folder of class folders"
        )
    settings = DataSettings(name="image_folder", dir=str(path), image_size=dataset.image_size)
    folder = load_dataset(settings, seed=config.run.seed)
    differing = sorted(set(folder.class_names) ^ set(dataset.class_names))
    if differing:
        raise UserError(
            f"anchors.images = {path}: its class folders are not the classes of {dataset.name}: "
            f"{', '.join(differing[:5])}"
        )
    # Folders are sorted by name; a data set's classes have their own order.
    labels = renumbered(folder.train_labels, folder.class_names, dataset.class_names)
    return replace(folder, train_labels=labels, class_names=dataset.class_names)
