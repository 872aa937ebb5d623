"""Feature caches ahead of training, and a probe of the diffusion model's layers.

Letters: N images, C classes.
"""

from collections.abc import Callable
from dataclasses import replace

from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset, Labelled, hold_out, stratified
from semanticfl_ref.diffusion.extract import Say, complete_files, images_in, open_or_build
from semanticfl_ref.diffusion.feature_cache import CachePlan, open_cache
from semanticfl_ref.diffusion.probe import describe_layer
from semanticfl_ref.errors import DataError
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.setup import (
    anchor_images,
    cache_plan,
    cache_plans,
    load_data,
    load_images,
    rebuild_command,
    set_threads,
)
from semanticfl_ref.tools.report.drawing import COLOURS, new_figure

PANELS = ("linear_probe", "nearest", "fisher_ratio", "effective_rank", "text_alignment")
# diffusion.condition -> what a reader must know.
NOTES = {
    "null": [],
    "own-class": [
        "each image's caption names its class, so its features contain its label: a probe says "
        "nothing about the image"
    ],
}


def build(config: Config, *, offline: bool, rebuild: bool, say: Say) -> dict:
    """Build the feature caches of a configuration, or what is missing of them; check complete ones.

    Args:
        config: the configuration with which `train` would use the caches.
        offline: no network access.
        rebuild: discard existing caches.
        say: takes one line of progress.

    Returns:
        See `info`.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    return _each_cache(config, offline, lambda plan: open_or_build(plan, say, rebuild=rebuild))


def info(config: Config, *, offline: bool) -> dict:
    """What is known about a configuration's caches; the bytes of complete ones are not checked.

    Returns:
        caches: a dict per cache; command: the one that builds them.
    """
    return _each_cache(config, offline, lambda plan: None)


def verify(config: Config, *, offline: bool) -> dict:
    """Check every byte of a configuration's caches.

    Returns:
        See `info`; "verified" is true.

    Raises:
        MismatchError: a cache is damaged; the message names the command that builds it again.
        DataError: a cache is not complete.
    """
    return {**_each_cache(config, offline, open_cache), "verified": True}


def probe(
    config: Config,
    *,
    offline: bool,
    layers: str,
    timesteps: list[int],
    images: int,
    say: Say,
) -> dict:
    """What the features of every layer say about the classes, see diffusion/probe.py.

    Fitted on training images and evaluated on validation images, never on test images.

    Args:
        config: the configuration.
        offline: no network access.
        layers: layers separated by commas, or "all".
        timesteps: noise levels; none: that of the configuration.
        images: maximum number of images to fit on, and to evaluate on.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    set_threads(config)
    configs = [
        replace(config, diffusion=replace(config.diffusion, layers=layers, timestep=timestep))
        for timestep in timesteps or [config.diffusion.timestep]
    ]
    dataset, _ = load_images(config, offline=offline)
    fitted, evaluated, evaluated_part = split_for_probe(dataset, images, config.run.seed)
    labels = fitted.train_labels, evaluated.train_labels

    def row(layer, features, timestep=None, text_CD=None) -> dict:
        train, test = (part.float() for part in features)
        numbers = describe_layer(train, labels[0], test, labels[1], dataset.classes, text_CD)
        return {"timestep": timestep, "layer": layer, "width": train.shape[1], **numbers}

    rows = [row("pixels", (fitted.train_images.flatten(1), evaluated.train_images.flatten(1)))]
    for probed in configs:
        plans = [cache_plan(probed, part, offline=offline) for part in (fitted, evaluated)]
        remedy = "delete its folder and probe again"
        train, test = (open_or_build(replace(plan, remedy=remedy), say) for plan in plans)
        for layer in train.widths:
            features = train.read(layer), test.read(layer)
            rows.append(row(layer, features, probed.diffusion.timestep, train.text))
    return {
        "dataset": dataset.name,
        "source": config.diffusion.source,
        "notes": NOTES[config.diffusion.condition],
        "fitted_on": len(labels[0]),
        "evaluated_on": len(labels[1]),
        "evaluated_part": evaluated_part,
        "rows": rows,
    }


def probe_figure(document: dict):
    """The result of `probe` as a figure: a panel per number, a line per timestep."""
    figure, grid = new_figure(len(PANELS), width=17, height=3.6)
    pixels, *rows = document["rows"]
    timesteps = dict.fromkeys(row["timestep"] for row in rows)
    for axes, name in zip(grid, PANELS, strict=True):
        axes.set_title(name.replace("_", " "))
        axes.set_prop_cycle(color=COLOURS)
        for timestep in timesteps:
            shown = [row for row in rows if row["timestep"] == timestep]
            names, values = [row["layer"] for row in shown], [row[name] for row in shown]
            axes.plot(names, values, marker="o", label=f"t = {timestep}")
        if name in ("linear_probe", "nearest"):
            axes.axhline(pixels[name], color="grey", linestyle=":", label="raw pixels")
            axes.set_ylim(0, 1)
        axes.tick_params(axis="x", rotation=90)
    grid[0].legend(fontsize="small")
    lines = [f"{document['dataset']} by {document['source']}", *document["notes"]]
    figure.suptitle("\n".join(lines), fontsize="small")
    return figure


def split_for_probe(dataset: Dataset, limit: int, seed: int) -> tuple[Dataset, Dataset, str]:
    """Images to fit on and images to evaluate on, as training parts, and a name for the latter.

    Raises:
        DataError: there are too few images.
    """
    fitted = Labelled(dataset.train_images, dataset.train_labels)
    evaluated, name = Labelled(dataset.validation_images, dataset.validation_labels), "validation"
    if not len(evaluated.labels):
        fitted, evaluated = hold_out(fitted, 0.2, generator(seed, "probe"))
        name = "held-out training"
    if not len(evaluated.labels):
        raise DataError(
            f"{dataset.name} has too few images for a probe: add some, since one in five of every "
            f"class is held out"
        )
    parts = []
    for part in (fitted, evaluated):
        share = limit / len(part.labels)
        if share < 1:
            kept, _ = stratified(part.labels, (share, 1 - share), generator(seed, "probe-subset"))
            part = part.subset(kept)
        parts.append(replace(dataset, train_images=part.images, train_labels=part.labels))
    return *parts, name


def _each_cache(config: Config, offline: bool, act: Callable[[CachePlan], object]) -> dict:
    """Act on every cache of a configuration; returns their description."""
    set_threads(config)
    images = anchor_images(config, load_data(config, offline=offline))
    plans = cache_plans(config, images, offline=offline)
    for plan in plans.values():
        act(plan)
    return {
        "caches": [{**_described(plan), "use": use} for use, plan in plans.items()],
        "command": rebuild_command(config).replace(" --rebuild", ""),
    }


def _described(plan: CachePlan) -> dict:
    """A cache as JSON values; of an incomplete one, the complete shards are counted."""
    done = len(plan.images)
    if not plan.complete:
        complete = complete_files(plan)
        done = sum(images_in(plan, file) for file in plan.shard_files if file in complete)
    return {
        **plan.meta,
        "id": plan.id,
        "path": str(plan.path),
        "notes": NOTES[plan.meta["condition"]],
        "complete": plan.complete,
        "images_done": done,
        "bytes": sum(file.stat().st_size for file in plan.path.glob("*")),
    }
