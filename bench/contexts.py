"""Synthetic federations for the benchmarks: random images, equal clients, no downloads."""

import torch
import torch.nn.functional as F

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import make_partition
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.randomness import generator


def synthetic_context(
    clients: int,
    samples: int,
    width: int = 16,
    clients_per_round: int | None = None,
    **settings: object,
) -> RunContext:
    """A run on random 32x32 images of 10 classes, with a test part of one image.

    Args:
        clients: M.
        samples: training images of each client.
        width: of the model's first block.
        clients_per_round: K; all of them if left out.
        settings: others, written section__field=value; FedAvg on the CPU without augmentation if
            left out.
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
            **{name.replace("__", "."): value for name, value in settings.items()},
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
    source = torch.Generator().manual_seed(0)
    anchors = Anchors(
        visual=torch.randn(len(labels), config.anchors.width, generator=source),
        text=torch.randn(10, 768, generator=source),
        per="image",
        provenance={},
    )
    return make_context(config, dataset, partition, anchors)


def bare_steps(context: RunContext, clients: list[int]) -> None:
    """The SGD steps of some clients' first round, and nothing else: each goes on from the model of
    the one before."""
    settings, data = context.config.federation, context.dataset
    optimizer = torch.optim.SGD(
        context.model.parameters(),
        settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    context.model.train()
    for client in clients:
        source = generator(0, "batches", 1, client, 0)
        indices, batch_size = context.partition.indices[client], settings.batch_size
        indices = indices.to(context.device)
        for batch in epoch_batches(indices, batch_size=batch_size, generator=source):
            images = network_input(data.train_images[batch])
            with context.autocast():
                logits, _ = context.model(images)
            loss = F.cross_entropy(logits, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def random_images(count: int) -> torch.Tensor:
    """uint8 [count, 32, 32, 3], the same in every run."""
    source = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=source)
