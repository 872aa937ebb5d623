"""Federations small enough to run in a second: random 32x32 images, or quadratic losses."""

import pytest
import torch
from quadratic import TARGETS, Quadratic

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import Partition, make_partition
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated import client as client_module
from semanticfl_ref.federated import evaluate as evaluate_module
from semanticfl_ref.federated import replicas as replicas_module
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.flat import flat_layout
from semanticfl_ref.federated.replicas import Replicas

CLASSES, TRAIN, TEST = 3, 30, 12


def resolve_with(defaults: dict, settings: dict):
    return resolve(defaults | {name.replace("__", "."): v for name, v in settings.items()})


@pytest.fixture
def small_context():
    """A function: settings, written section__field=value -> RunContext."""

    def make(**settings):
        source = torch.Generator().manual_seed(0)
        labels = torch.arange(TRAIN) % CLASSES
        images = torch.randint(
            0, 256, (TRAIN + TEST, 32, 32, 3), dtype=torch.uint8, generator=source
        )
        dataset = Dataset(
            name="synthetic",
            class_names=("a", "b", "c"),
            train_images=images[:TRAIN],
            train_labels=labels,
            validation_images=images[:0],
            validation_labels=labels[:0],
            test_images=images[TRAIN:],
            test_labels=torch.arange(TEST) % CLASSES,
            sha256="0" * 64,
        )
        defaults = {
            "data.name": "digits",
            "model.width": 2,
            "partition.clients": 3,
            "federation.clients_per_round": 2,
            "federation.local_epochs": 1,
            "federation.batch_size": 8,
            "run.precision": "fp32",
        }
        config = resolve_with(defaults, settings)
        partition = make_partition(
            labels,
            PartitionSettings(scenario="iid", clients=config.partition.clients),
            classes=CLASSES,
            seed=0,
        )
        visual = torch.randn(TRAIN, 8, generator=source)
        method = config.methods["feddifrc"]
        texts = (TRAIN,) if method.keys == "per-image" else ()
        text = torch.randn(*texts, CLASSES, 6, generator=source)
        anchors = Anchors(visual=visual, text=text, per="image", provenance={})
        return make_context(config, dataset, partition, anchors)

    return make


@pytest.fixture
def quadratic_context(monkeypatch):
    """A function: settings -> three clients with the loss |w - t_k|^2 / 2, without randomness.

    t_k is `TARGETS[k]`; each client holds `images[k]` copies of it, one batch per epoch unless the
    batch size is set. Learning rate 1/2, two epochs, no momentum.
    """
    for module in (client_module, evaluate_module):
        monkeypatch.setattr(module, "cross_entropy", lambda logits, labels: logits.mean())

    def make(images=(4, 4, 4), **settings):
        defaults = {
            "data.name": "digits",
            "partition.clients": 3,
            "federation.clients_per_round": 3,
            "federation.local_epochs": 2,
            "federation.learning_rate": 0.5,
            "federation.momentum": 0.0,
            "federation.weight_decay": 0.0,
            "run.precision": "fp32",
        }
        labels = torch.repeat_interleave(torch.arange(3), torch.tensor(images))
        pixels = ((TARGETS + 1) * 127.5).round().to(torch.uint8)[labels][:, None, None]
        dataset = Dataset(
            name="targets",
            class_names=("a", "b", "c"),
            train_images=pixels,
            train_labels=labels,
            validation_images=pixels[:0],
            validation_labels=labels[:0],
            test_images=pixels,
            test_labels=labels,
            sha256="0" * 64,
        )
        partition = Partition(
            scenario="iid",
            alpha=None,
            seed=0,
            indices=tuple((labels == k).nonzero()[:, 0] for k in range(3)),
            held_out=(labels[:0],) * 3,
            sizes=tuple(images),
            histograms=tuple(tuple(images[k] if c == k else 0 for c in range(3)) for k in range(3)),
            skew=1.0,
            kl=0.0,
            sha256="0" * 64,
        )
        config, model = resolve_with(defaults, settings), Quadratic()
        return RunContext(
            config=config,
            dataset=dataset,
            partition=partition,
            anchors=None,
            method=METHODS[config.federation.method],
            model=model,
            layout=flat_layout(model),
            replicas=Replicas(model, config, torch.device("cpu")),
            device=torch.device("cpu"),
            precision="fp32",
        )

    return make


@pytest.fixture
def tamper(monkeypatch):
    """A function that takes a function (update, replica, report) to call after every local
    training."""
    honest = replicas_module.train_client

    def install(change):
        def train(update, replica):
            report = honest(update, replica)
            with torch.no_grad():
                change(update, replica, report)
            return report

        monkeypatch.setattr(replicas_module, "train_client", train)

    return install
