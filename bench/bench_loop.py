"""The federated loop against the bare work inside it.  `pytest --benchmark-only bench/bench_loop.py
-s`

F1: a round costs at most 1.05x the bare SGD steps it contains. A round of one client of ten is
    measured, so that many repeats fit between whatever else
the machine does: its choice of clients, evaluation and books are then carried by that one.
F2 (the loop's side): client-steps a second with 200 small clients.
F4: batches from one resident uint8 tensor, augmented whole, at least 3x a DataLoader (CPU).
F5: bf16 autocast + channels-last at least 1.8x fp32 contiguous, where the processor has native
    bf16.
Ratios are of the fastest of interleaved repeats in this run; absolute times mean nothing on a
shared machine."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bench.timing import fastest
from bench.contexts import synthetic_context
from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.federated.context import new_state, precision_for
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.randomness import generator


def bare_steps(context) -> None:
    """The SGD steps of as many clients as a round has, and nothing else: no rows, no averaging, no
    books.
    """
    options, data = context.config.federation, context.dataset
    optimizer = torch.optim.SGD(
        context.model.parameters(),
        options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    context.model.train()
    for indices in context.partition.indices[: options.clients_per_round]:
        for batch in epoch_batches(
            indices, batch_size=options.batch_size, generator=generator(0, "bare")
        ):
            with context.autocast():
                logits, _ = context.model(
                    network_input(data.train_images[batch], augment=False, generator=None)
                )
            loss = F.cross_entropy(logits, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_round_against_bare_steps(benchmark):
    context = synthetic_context(clients=10, samples=320, clients_per_round=1)
    state = new_state(context)
    ours, bare = fastest(lambda: run_round(state, context), lambda: bare_steps(context), repeats=30)
    benchmark.extra_info["F1 round / bare steps"] = round(ours / bare, 3)
    print(
        f"\nF1: a round takes {ours / bare:.3f}x its bare steps (one of 10 clients x 320 images, width 16; target 1.05)"
    )
    benchmark.pedantic(run_round, (state, context), rounds=3)


def test_client_steps_per_second(benchmark):
    context = synthetic_context(clients=200, samples=20, width=8)
    state = new_state(context)
    benchmark.pedantic(run_round, (state, context), rounds=3, warmup_rounds=1)
    steps = 200 / benchmark.stats.stats.min if benchmark.stats else float("nan")
    print(f"\nF2: {steps:.0f} client-steps a second (200 clients x 20 images, width 8)")


class PerImage(TorchDataset):
    """The usual way: one image at a time, flipped and cropped by itself."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = (self.images[i].permute(2, 0, 1).float() / 255 - 0.5) / 0.5
        image = image.flip(2) if torch.rand(()) < 0.5 else image
        top, left = torch.randint(0, 9, (2,)).tolist()
        return F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]


def test_resident_batches_against_dataloader(benchmark):
    images = torch.randint(0, 256, (6_400, 32, 32, 3), dtype=torch.uint8)
    loader = DataLoader(PerImage(images), batch_size=64, shuffle=True)

    def resident():
        source = generator(0, "bench")
        for batch in epoch_batches(torch.arange(len(images)), batch_size=64, generator=source):
            network_input(images[batch], augment=True, generator=source)

    ours, theirs = fastest(resident, lambda: [None for _ in loader])
    benchmark.extra_info["F4 DataLoader / resident"] = round(theirs / ours, 1)
    print(
        f"\nF4: {theirs / ours:.1f}x a DataLoader (6 400 images, batch 64, flip and crop; target 3)"
    )
    benchmark.pedantic(resident, rounds=3)


def test_bf16_against_fp32(benchmark):
    if precision_for("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor has no native bf16")
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % 10

    def step(model, inputs, context):
        with context():
            logits, _ = model(inputs)
        F.cross_entropy(logits, labels).backward()

    fast, slow = ResNet10(64, 10).to(memory_format=torch.channels_last), ResNet10(64, 10)
    inputs = images.contiguous(memory_format=torch.channels_last)
    ours, plain = fastest(
        lambda: step(fast, inputs, lambda: torch.autocast("cpu", torch.bfloat16)),
        lambda: step(slow, images, nullcontext),
    )
    benchmark.extra_info["F5 fp32 / bf16"] = round(plain / ours, 2)
    print(
        f"\nF5: bf16 channels-last is {plain / ours:.2f}x fp32 contiguous (width 64, batch 64; target 1.8)"
    )
    benchmark.pedantic(
        step, (fast, inputs, lambda: torch.autocast("cpu", torch.bfloat16)), rounds=3
    )
