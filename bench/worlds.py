"""Synthetic federations for the benchmarks: random images, equal clients, no downloads."""

import torch

from semanticfl_ref.config.settings import build
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import Partition, make_partition
from semanticfl_ref.federated.context import RunContext, make_context


def synthetic_context(
    clients: int,
    samples: int,
    width: int = 16,
    epochs: int = 1,
    clients_per_round: int | None = None,
    precision: str = "auto",
) -> RunContext:
    """A FedAvg context of `clients` x `samples` random 32x32 images with 10 classes, and a test part
    of one image.
    """
    source = torch.Generator().manual_seed(0)
    count = clients * samples

    def images(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=source)

    labels = torch.arange(count) % 10
    dataset = Dataset(
        name="synthetic",
        class_names=tuple("abcdefghij"),
        train_images=images(count),
        train_labels=labels,
        validation_images=images(0),
        validation_labels=labels[:0],
        test_images=images(1),
        test_labels=labels[:1],
        sha256="0" * 64,
    )
    settings = {
        "data.name": "digits",
        "federation.method": "fedavg",
        "model.width": width,
        "partition.clients": clients,
        "partition.scenario": "iid",
        "federation.clients_per_round": clients_per_round or clients,
        "federation.local_epochs": epochs,
        "run.precision": precision,
    }
    partition: Partition = make_partition(
        labels, scenario="iid", clients=clients, classes=10, alpha=1.0, seed=0
    )
    return make_context(build(settings), dataset, partition, None)
