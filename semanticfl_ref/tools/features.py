"""Feature caches ahead of training, and a probe of the diffusion model's layers.

Letters: N images, C classes, D width of a vector.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset, Labelled, hold_out, stratified
from semanticfl_ref.diffusion.expected import expected
from semanticfl_ref.diffusion.extract import images_left, open_or_build
from semanticfl_ref.diffusion.feature_cache import CachePlan, open_cache
from semanticfl_ref.diffusion.probe import describe_layer
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.formatting import Say
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.setup import (
    anchor_images,
    cache_plan,
    cache_plans,
    load_data,
    load_images,
    rebuild_command,
    set_up_torch,
)
from semanticfl_ref.tools.report.drawing import new_figure
from semanticfl_ref.tools.report.page import render

PANELS = ("linear_probe", "nearest", "fisher_ratio", "effective_rank", "text_alignment")
# diffusion.condition -> what a reader must know.
NOTES = {
    "null": [],
    "own-class": [
        "each image's caption names its class, so its features contain its label: a probe says "
        "nothing about the image"
    ],
}


def caches(config: Config, action: str, *, offline: bool, rebuild: bool = False, say: Say) -> dict:
    """Build, check or look at the feature caches of a configuration.

    Args:
        config: the configuration with which `train` would use the caches.
        action: "build" what is missing of them, and check complete ones; "verify" every byte;
            "info": the bytes are not checked, and what is missing is measured on one pass.
        offline: no network access.
        rebuild: discard existing caches before building.
        say: takes one line of progress.

    Returns:
        caches: a dict per cache; command: the one that builds them; verified: whether
            they were.

    Raises:
        MismatchError: a cache is damaged; the message names the command that builds it again.
        DataError: a cache to verify is not complete, or see `open_or_build`.
    """
    set_up_torch(config)
    use_own_gpu()
    images = anchor_images(config, load_data(config, offline=offline))
    plans = cache_plans(config, images, offline=offline)
    for plan in plans.values():
        if action == "build":
            open_or_build(plan, say, rebuild=rebuild)
        if action == "verify":
            open_cache(plan)
    return {
        "caches": [{**_described(plan), "use": use} for use, plan in plans.items()],
        "command": rebuild_command(config).replace(" --rebuild", ""),
        "verified": action == "verify",
    }


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
    set_up_torch(config)
    configs = [
        replace(config, diffusion=replace(config.diffusion, layers=layers, timestep=timestep))
        for timestep in timesteps or [config.diffusion.timestep]
    ]
    dataset, _ = load_images(config, offline=offline)
    fitted, evaluated, evaluated_part = split_for_probe(dataset, images, config.run.seed)
    labels = fitted.train_labels, evaluated.train_labels

    def numbers(train, test, text_CD) -> dict:
        found = describe_layer(train, labels[0], test, labels[1], dataset.classes, text_CD)
        return {"width": train.shape[1], **found}

    pixels = (part.train_images.flatten(1) for part in (fitted, evaluated))
    rows = [{"timestep": None, "layer": "pixels", **numbers(*pixels, None)}]
    for probed in configs:
        first = cache_plan(probed, fitted, offline=offline)
        plans = [first, cache_plan(probed, evaluated, offline=offline, basis=first.id)]
        train, test = (
            open_or_build(replace(plan, remedy="delete its folder and probe again"), say)
            for plan in plans
        )
        for layer in train.widths:
            row = {"timestep": probed.diffusion.timestep, "layer": layer}
            rows.append(row | numbers(train.read(layer), test.read(layer), train.text))
    return {
        "dataset": dataset.name,
        "source": config.diffusion.source,
        "notes": NOTES[config.diffusion.condition],
        "fitted_on": len(labels[0]),
        "evaluated_on": len(labels[1]),
        "evaluated_part": evaluated_part,
        "rows": rows,
    }


def table(document: dict) -> str:
    """The result of `caches` or of `probe` for a reader."""
    template = "probe.md.jinja" if "rows" in document else "caches.txt.jinja"
    return render(Path(__file__).parent, template, **document).rstrip()


def probe_figure(document: dict):
    """The result of `probe` as a figure: a panel per number, a line per timestep."""
    figure, grid = new_figure(len(PANELS), width=17, height=3.6)
    pixels, *rows = document["rows"]
    timesteps = dict.fromkeys(row["timestep"] for row in rows)
    for axes, name in zip(grid, PANELS, strict=True):
        axes.set_title(name.replace("_", " "))
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
        UserError: the limit is too low.
        DataError: there are too few images.
    """
    if limit < 2 * dataset.classes:
        raise UserError(
            f"--probe-images {limit}: at least {2 * dataset.classes} are needed, since one image "
            f"per class has no variance within its class"
        )
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
        share = min(1, limit / len(part.labels))
        kept, _ = stratified(part.labels, (share, 1 - share), generator(seed, "probe-subset"))
        own = {f"train_{field}": values for field, values in part.subset(kept)._asdict().items()}
        parts.append(replace(dataset, **own))
    return *parts, name


def use_own_gpu() -> None:
    """Under torchrun each process of a machine uses a GPU of its own, as long as there are some."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(rank) % torch.cuda.device_count())


def _described(plan: CachePlan) -> dict:
    """A cache as JSON values; of an incomplete one, the complete shards are counted."""
    left = images_left(plan)
    return {
        **plan.meta,
        "id": plan.id,
        "path": str(plan.path),
        "notes": NOTES[plan.meta["condition"]],
        "complete": plan.complete,
        "images_done": len(plan.images) - left,
        "expected": expected(plan, left) if left else None,
        "bytes": sum(file.stat().st_size for file in plan.path.glob("*")),
    }
