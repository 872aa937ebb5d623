"""The sub-command `features`: build a cache ahead of time, look at it, check it, and probe the
layers of a model.

Letters: N images, C classes.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset, stratified
from semanticfl_ref.diffusion.extract import done_already, length
from semanticfl_ref.diffusion.feature_cache import TEXT, Plan, finished, open_cache, open_or_build
from semanticfl_ref.diffusion.probe import describe_layer
from semanticfl_ref.errors import DataError
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.setup import (
    anchor_images,
    cache_plan,
    cache_plans,
    build_command,
    load_data,
    load_images,
)
from semanticfl_ref.tools.report.drawing import COLOURS, need_matplotlib, new_figure, save_figure

PROBE_IMAGES = 2000  # at most, to fit on and to judge on
JUDGED_SHARE = 0.2  # of the training images, where a data set has no validation part
CONDITIONED = "each image passed under its own class's caption, so these features hold its label: the numbers say nothing of the image"


def build(config: Config, *, offline: bool, rebuild: bool, say: Callable[[str], None]) -> dict:
    """Make the caches that `train` with this configuration would use, go on with unfinished ones, or
    check finished ones.

    Args:
        offline: open no connection.
        rebuild: throw away what is there.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see `errors.py`.
    """
    plans = _plans(config, offline)
    for wanted in plans.values():
        open_or_build(wanted, say, progress=True, rebuild=rebuild)
    return {"caches": [_described(name, wanted) for name, wanted in plans.items()]}


def info(config: Config, *, offline: bool) -> dict:
    """What is known of the configuration's caches, finished or not; no byte of a finished one is
    checked.
    """
    return {
        "caches": [_described(name, wanted) for name, wanted in _plans(config, offline).items()],
        "command": build_command(config).replace(" --rebuild", ""),
    }


def verify(config: Config, *, offline: bool) -> dict:
    """Check every byte of the configuration's caches.

    Raises:
        MismatchError: one is damaged. DataError: one is not finished. Both name the command that
            makes it.
    """
    plans = _plans(config, offline)
    for wanted in plans.values():
        open_cache(wanted)
    return {
        "caches": [{**_described(name, wanted), "verified": True} for name, wanted in plans.items()]
    }


def probe(
    config: Config,
    *,
    offline: bool,
    layers: str,
    timesteps: list[int],
    images: int,
    figure: Path | None,
    say: Callable[[str], None],
) -> dict:
    """What each layer knows of the classes, see `diffusion/probe.py`: fitted on training images,
    judged on validation images, never on test images.

    Args:
        layers: layers separated by commas, or "all".
        timesteps: noise levels; none = the configured one.
        images: at most so many to fit on, and to judge on.
        figure: a PNG to write.

    Raises:
        UserError: matplotlib is needed and not there; and whatever `build` raises.
    """
    if figure is not None:
        need_matplotlib("--figure", figure)
    _set_threads(config)
    dataset = load_images(config, offline)[0]
    settings = [
        replace(config, diffusion=replace(config.diffusion, layers=layers, timestep=t))
        for t in timesteps or [config.diffusion.timestep]
    ]
    fitted, judged, part = _two_sets(dataset, images, config.run.seed)
    rows = [
        _row(
            None,
            "pixels",
            (fitted.train_images.flatten(1), judged.train_images.flatten(1)),
            fitted,
            judged,
            None,
        )
    ]
    for chosen in settings:
        plans = [
            replace(cache_plan(chosen, subset, offline), remedy="delete its folder and probe again")
            for subset in (fitted, judged)
        ]
        caches = [open_or_build(wanted, say, progress=True) for wanted in plans]
        rows += [
            _row(
                chosen.diffusion.timestep,
                layer,
                [cache.read(layer) for cache in caches],
                fitted,
                judged,
                caches[0].text,
            )
            for layer in caches[0].widths
        ]
    result = {
        "dataset": dataset.name,
        "source": config.diffusion.source,
        "fitted_on": len(fitted.train_labels),
        "judged_on": len(judged.train_labels),
        "judged_part": part,
        "condition": config.diffusion.condition,
        "label_conditioned": config.diffusion.condition == "own-class",
        "rows": rows,
    }
    if figure is not None:
        draw(result, figure)
        say(f"figure: {figure}")
    return result


def cache_words(document: dict) -> str:
    """The caches for a reader."""
    lines = []
    for cache in document["caches"]:
        state = (
            "finished"
            if cache["finished"]
            else f"{cache['images_done']} of {cache['images']} images done"
            if cache["images_done"]
            else "not made yet"
        )
        lines += [
            f"{cache['use'] + ' cache':<12}  {cache['path']}",
            f"{'':<12}  {state}{', every byte checked' if cache.get('verified') else ''}; {cache['images']} images, {cache['bytes'] / 2**20:.1f} MiB on the disk",
            f"{'':<12}  {cache['source']}, {', '.join(cache['layers'])} at t = {cache['timestep']}, condition {cache['condition']}, {cache['precision']}",
        ]
        if cache["condition"] == "own-class":
            lines.append(f"{'':<12}  note: {CONDITIONED}")
    if not all(cache["finished"] for cache in document["caches"]):
        lines.append(f"{'make it':<12}  {document['command']}")
    return "\n".join(lines)


def probe_words(document: dict) -> str:
    """The table of layers, as Markdown."""
    lines = [
        f"{document['dataset']} by {document['source']}: fitted on {document['fitted_on']} training images, judged on {document['judged_on']} {document['judged_part']}"
    ]
    if document["label_conditioned"]:
        lines.append(f"note: {CONDITIONED}")
    lines += [
        "",
        "| t | layer | width | linear probe | nearest | Fisher ratio | effective rank | text alignment |",
        "|" + " --- |" * 8,
    ]
    for row in document["rows"]:
        timestep, text = (
            "" if row["timestep"] is None else row["timestep"],
            "" if row["text_alignment"] is None else f"{row['text_alignment']:.2f}",
        )
        cells = [
            timestep,
            row["layer"],
            row["width"],
            f"{row['linear_probe']:.1%}",
            f"{row['nearest']:.1%}",
            f"{row['fisher_ratio']:.3f}",
            f"{row['effective_rank']:.1f}",
            text,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(document: dict, file: Path) -> None:
    """The table as a figure: one panel a number, one line a timestep; written whole or not at all."""
    panels = {
        name: name.replace("_", " ")
        for name in ("linear_probe", "nearest", "fisher_ratio", "effective_rank", "text_alignment")
    }
    figure, grid = new_figure(1, len(panels), width=3.4 * len(panels), height=3.6)
    pixels, rows = document["rows"][0], document["rows"][1:]
    for axes, (key, title) in zip(grid[0], panels.items(), strict=True):
        axes.set_title(title)
        for colour, timestep in zip(
            itertools.cycle(COLOURS), dict.fromkeys(row["timestep"] for row in rows)
        ):
            here = [row for row in rows if row["timestep"] == timestep and row[key] is not None]
            axes.plot(
                [row["layer"] for row in here],
                [row[key] for row in here],
                marker="o",
                color=colour,
                label=f"t = {timestep}",
            )
        if key in ("linear_probe", "nearest"):
            axes.axhline(pixels[key], color="grey", linestyle=":", label="raw pixels")
            axes.set_ylim(0, 1)
        axes.tick_params(axis="x", rotation=90)
    grid[0, 0].legend(fontsize="small")
    figure.suptitle(
        f"{document['dataset']} by {document['source']}"
        + (f" ({CONDITIONED})" if document["label_conditioned"] else ""),
        fontsize="small",
    )
    save_figure(figure, file)


def _plans(config: Config, offline: bool) -> dict[str, Plan]:
    _set_threads(config)
    return cache_plans(config, anchor_images(config, *load_data(config, offline)), offline)


def _set_threads(config: Config) -> None:
    if config.run.threads:
        torch.set_num_threads(
            config.run.threads
        )  # features repeat bit for bit at equal threads, as training does


def _described(use: str, wanted: Plan) -> dict:
    """A cache for a reader and for JSON; of an unfinished one, the shards that are whole are
    counted.
    """
    files = (
        [file for file in wanted.path.iterdir() if file.is_file()] if wanted.path.is_dir() else []
    )
    done = (
        len(wanted.images)
        if finished(wanted)
        else sum(length(wanted, file) for file in done_already(wanted) if file.name != TEXT)
    )
    kept = (
        "source",
        "layers",
        "timestep",
        "pool",
        "prompt",
        "condition",
        "latent",
        "input_size",
        "seed",
        "precision",
        "vae_precision",
        "weights_sha256",
        "dataset_sha256",
    )
    return {
        "use": use,
        "id": wanted.id,
        "path": str(wanted.path),
        "finished": finished(wanted),
        "images": len(wanted.images),
        "images_done": done,
        "bytes": sum(file.stat().st_size for file in files),
        **{key: wanted.meta[key] for key in kept},
    }


def _two_sets(dataset: Dataset, images: int, seed: int) -> tuple[Dataset, Dataset, str]:
    """What is fitted on and what is judged on, both as training parts, and the name of the latter."""
    if len(dataset.validation_labels):
        fitted, judged, part = (
            (dataset.train_images, dataset.train_labels),
            (dataset.validation_images, dataset.validation_labels),
            "validation images",
        )
    else:
        stay, aside = stratified(
            dataset.train_labels, (1 - JUDGED_SHARE, JUDGED_SHARE), generator(seed, "probe")
        )
        fitted, judged = (
            (dataset.train_images[which], dataset.train_labels[which]) for which in (stay, aside)
        )
        part = "other training images (the data set has no validation part)"
    if not len(judged[1]):
        raise DataError(
            f"{dataset.name} has too few images to judge a probe on: one in five of every class is set aside for it"
        )
    return *(_at_most(dataset, *pair, images, seed) for pair in (fitted, judged)), part


def _at_most(
    dataset: Dataset, images: torch.Tensor, labels: torch.Tensor, count: int, seed: int
) -> Dataset:
    if len(labels) > count:
        chosen = stratified(
            labels, (count / len(labels), 1 - count / len(labels)), generator(seed, "probe-subset")
        )[0]
        images, labels = images[chosen], labels[chosen]
    return replace(dataset, train_images=images, train_labels=labels)


def _row(
    timestep: int | None, layer: str, values, fitted: Dataset, judged: Dataset, text_CD
) -> dict:
    numbers = describe_layer(
        values[0].float(),
        fitted.train_labels,
        values[1].float(),
        judged.train_labels,
        len(fitted.class_names),
        text_CD,
    )
    return {"timestep": timestep, "layer": layer, "width": values[0].shape[1], **numbers}
