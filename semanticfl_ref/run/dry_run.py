"""The sizes of a run, without training or downloading anything."""

import json
from pathlib import Path

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.batches import batch_sizes
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.diffusion.model_files import TINY
from semanticfl_ref.federated.context import make_context
from semanticfl_ref.federated.metrics import communication_cost
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.initial import read_initial
from semanticfl_ref.run.setup import load_data

SD15_TEXT_WIDTH = 768


def dry_run(config: Config) -> dict:
    """Images, clients, steps and bytes of a run. Reads the data set, writes nothing.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    data = load_data(config, offline=True)
    dataset, partition, federation = data.dataset, data.partition, config.federation
    read_initial(config, dataset)  # checked here too
    anchors = placeholder_anchors(config, dataset.classes)
    context = make_context(config, dataset, partition, anchors)
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
        "checkpoint_bytes": sum(tensor.nbytes for tensor in state.tensors.values()),
        "bytes_down_per_round": federation.clients_per_round * sum(cost["down"].values()),
        "bytes_up_per_round": federation.clients_per_round * sum(cost["up"].values()),
    }


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
