"""The sizes of a run, without training or downloading anything."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.batches import batch_sizes
from semanticfl_ref.device import resolve_device
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.diffusion.expected import expected
from semanticfl_ref.diffusion.extract import images_left
from semanticfl_ref.diffusion.model_files import TINY
from semanticfl_ref.errors import DownloadError
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.metrics import communication_cost
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.initial import read_initial
from semanticfl_ref.run.preconditions import check_anchors
from semanticfl_ref.run.setup import RunData, anchor_images, cache_plans, load_data

SD15_TEXT_WIDTH = 768


def dry_run(
    config: Config, data: RunData | None = None, *, offline: bool = True, measure: bool = False
) -> dict:
    """Images, clients, steps and bytes of a run. Reads the data set, writes no run folder.

    Args:
        config: the configuration.
        data: the result of `load_data`; made here if absent.
        offline: no network access.
        measure: also the time that missing diffusion features take on this machine, by one pass
            through the model.

    Raises:
        UserError: and its kinds, see errors.py; what the run itself would raise before its work.
    """
    resolve_device(config.run.device)
    data = data or load_data(config, offline=offline)
    if METHODS[config.federation.method].needs_anchors:
        check_anchors(config, anchor_images(config, data))
    dataset, partition, federation = data.dataset, data.partition, config.federation
    read_initial(config, dataset)  # checked here too
    context = rehearse(config, data)
    state, cost = initial_state(context), communication_cost(context)
    batches = [len(batch_sizes(size, federation.batch_size)) for size in partition.sizes]
    steps = federation.clients_per_round * federation.local_epochs * sum(batches) / len(batches)
    return {
        "dataset": dataset.name,
        "images": {
            "train": len(dataset.train_labels),
            "validation": len(dataset.validation_labels),
            "test": len(dataset.test_labels),
        },
        "image_size": dataset.image_size,
        "classes": dataset.classes,
        "clients": len(partition.sizes),
        "client_images": list(partition.sizes),
        "clients_per_round": federation.clients_per_round,
        "rounds": federation.rounds,
        "steps_per_round": round(steps, 1),
        "model": config.model.name,
        "parameters": context.layout.size,
        "needs_anchors": context.method.needs_anchors,
        "features": features_to_make(config, data) if measure else [],
        "checkpoint_bytes": sum(tensor.nbytes for tensor in state.tensors.values()),
        "bytes_down_per_round": federation.clients_per_round * sum(cost["down"].values()),
        "bytes_up_per_round": federation.clients_per_round * sum(cost["up"].values()),
    }


def features_to_make(config: Config, data: RunData) -> list[dict]:
    """A dict for each feature cache that the run has to make, see `expected`; with `why` in place
    of numbers if the model is not on this machine.
    """
    if not METHODS[config.federation.method].needs_anchors:
        return []
    try:
        plans = cache_plans(config, anchor_images(config, data), offline=True)
    except DownloadError:
        return [{"use": "visual", "why": "the model is not on this machine"}]
    left = {use: images_left(plan) for use, plan in plans.items()}
    return [{"use": use, **expected(plans[use], count)} for use, count in left.items() if count]


def rehearse(config: Config, data: RunData) -> RunContext:
    """A run's constants on the CPU, with placeholders as anchors.

    Raises:
        UserError: a model that does not fit, as `make_context` does.
    """
    run = replace(config.run, device="cpu", replicas=1)
    anchors = placeholder_anchors(config, data.dataset.classes)
    return make_context(replace(config, run=run), data.dataset, data.partition, anchors)


def placeholder_anchors(config: Config, classes: int) -> Anchors:
    """Zero anchors of the right widths.

    Without a model folder to read it from, the text width is Stable Diffusion 1.5's.
    """
    width = text_width = config.anchors.width
    if config.anchors.text == "clip":
        source = config.diffusion.source
        folder = TINY if source == "tiny" else Path(source)
        description, text_width = folder / "text_encoder/config.json", SD15_TEXT_WIDTH
        if description.is_file():
            text_width = json.loads(description.read_text(encoding="utf-8"))["hidden_size"]
    return Anchors(
        visual=torch.zeros(classes, width),
        text=torch.zeros(classes, text_width),
        per="class",
        provenance={},
    )
