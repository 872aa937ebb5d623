"""Synthetic federations for the benchmarks: random images, equal clients, no downloads."""

import torch

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import make_partition
from semanticfl_ref.federated.context import RunContext, make_context


def synthetic_context(
    clients: int, samples: int, width: int = 16, clients_per_round: int | None = None
) -> RunContext:
    """A FedAvg run on random 32x32 images of 10 classes, with a test part of one image.

    Args:
        clients: M.
        samples: training images of each client.
        width: of the model's first block.
        clients_per_round: K; all of them if left out.
    """
    labels = torch.arange(clients * samples) % 10
    config = resolve(
        {
            "data.name": "digits",
            "federation.method": "fedavg",
            "federation.clients_per_round": clients_per_round or clients,
            "federation.local_epochs": 1,
            "model.width": width,
            "partition.clients": clients,
            "partition.scenario": "iid",
            "run.device": "cpu",
        }
    )
    dataset = Dataset(
        name="synthetic",
        class_names=tuple("abcdefghij"),
        train_images=random_images(len(labels)),
        train_labels=labels,
        validation_images=random_images(0),
        validation_labels=labels[:0],
        test_images=random_images(1),
        test_labels=labels[:1],
        sha256="0" * 64,
    )
    partition = make_partition(labels, config.partition, classes=10, seed=0)
    return make_context(config, dataset, partition, None)


def random_images(count: int) -> torch.Tensor:
    """uint8 [count, 32, 32, 3], the same in every run."""
    source = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=source)
