"""A federation small enough to play in a second: random 32x32 images, three clients."""

import pytest
import torch

from semanticfl_ref.config import build
from semanticfl_ref.data.partition import make_partition
from semanticfl_ref.data.sources import Dataset
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.world import make_world

CLASSES, TRAIN, TEST = 3, 30, 12


@pytest.fixture
def small_world():
    """A function: settings by dotted name -> World."""

    def make(**settings):
        source = torch.Generator().manual_seed(0)
        labels = torch.arange(TRAIN) % CLASSES
        images = torch.randint(0, 256, (TRAIN + TEST, 32, 32, 3), dtype=torch.uint8, generator=source)
        dataset = Dataset(
            name="synthetic", class_names=("a", "b", "c"), train_images=images[:TRAIN], train_labels=labels, validation_images=images[:0],
            validation_labels=labels[:0], test_images=images[TRAIN:], test_labels=torch.arange(TEST) % CLASSES, sha256="0" * 64,
        )  # fmt: skip
        values = {"data.name": "digits", "model.width": 2, "partition.clients": 3, "federation.clients_per_round": 2, "federation.local_epochs": 1,
                  "federation.batch_size": 8, "run.precision": "fp32"}  # fmt: skip
        config = build(values | {name.replace("__", "."): value for name, value in settings.items()})
        partition = make_partition(labels, scenario="iid", clients=config.partition.clients, classes=CLASSES, alpha=1.0, seed=0)
        visual, text = torch.randn(TRAIN, 8, generator=source), torch.randn(CLASSES, 6, generator=source)
        return make_world(config, dataset, partition, Anchors(visual=visual, text=text, per="image", provenance={}))

    return make
