"""InfoNCE at the training shape on a GPU, a stage of `bench/gpu.sh`.

K1: at most 15 us as a CUDA-graph node, and at least 4x the eager expression per client. K2: at
most three launches: the kernel, the sum of its tiles, and the scaling by the upstream gradient; a
fourth in 16 bits, where the gradient is cast. K3: a CUDA graph captures it.

Bytes are the least that a call must move: each input read once, each output written once.

Letters: G clients, B queries, N keys, D feature width.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.harness import (
    BOTH,
    OURS,
    Bench,
    Case,
    Contender,
    as_graph,
    captured,
    explain,
    guarded,
    measure,
    name_of,
)
from bench.peers import EAGER, compiled, eager_info_nce
from bench.record import Record
from semanticfl_ref.kernels.info_nce import info_nce

TAU = 0.05
# G, B, N, D, dtype; the first of each dtype has torch.compile beside it.
CASES = [
    (1, 64, 10, 512, torch.float32),
    (1, 64, 100, 512, torch.float32),
    (1, 64, 200, 768, torch.float32),
    (1, 64, 1000, 512, torch.float32),
    (10, 64, 10, 512, torch.float32),
    (10, 64, 10, 512, torch.bfloat16),
    (50, 64, 200, 512, torch.float32),
    (50, 64, 200, 512, torch.bfloat16),
]
TINY = [(2, 5, 3, 20, torch.float32), (2, 5, 3, 20, torch.bfloat16)]
# Relative error of a gradient (2-norm) and absolute error of a loss in nats above which a result is
# wrong: about ten times what rounding to the dtype costs at this temperature.
LIMITS = {"fp32": 1e-4, "bf16": 6e-2}


@dataclass(frozen=True)
class Inputs:
    """The clients' batches: queries that want a gradient [G, B, D], keys [N, D], labels [G, B]."""

    queries_GBD: torch.Tensor
    keys_ND: torch.Tensor
    labels_GB: torch.Tensor


def stage(record: Record, bench: Bench) -> None:
    seen = set()
    for *shape, dtype in TINY if bench.rehearse else CASES:
        with guarded(record, f"info_nce, {words(*shape)}, {name_of(dtype)}"):
            info_nce_case(record, bench, shape, dtype, with_compile=dtype not in seen)
        seen.add(dtype)


def info_nce_case(
    record: Record,
    bench: Bench,
    shape: list[int],
    dtype: torch.dtype,
    *,
    with_compile: bool = False,
) -> None:
    """Measure one shape and dtype."""
    inputs, dtype_name = random_inputs(*shape, bench.device, dtype), name_of(dtype)
    exact = in_fp64(inputs)
    calls = contenders(inputs, bench.impl)
    if with_compile:
        compiled_losses = compiled(eager_losses, bench.rehearse)
        calls["torch.compile of eager"] = with_gradient(compiled_losses, inputs)
    read = inputs.queries_GBD.nbytes + inputs.keys_ND.nbytes + inputs.labels_GB.nbytes
    case = Case(
        kernel="info_nce",
        case=words(*shape),
        dtype=dtype_name,
        direction=BOTH,
        shape=dict(zip("GBND", shape, strict=True)),
        bytes=read + inputs.queries_GBD.nbytes,
    )
    runs = {name: Contender(call) for name, call in calls.items()}
    for name in (OURS, EAGER) if bench.device.type == "cuda" else ():
        try:
            runs[as_graph(name)] = Contender(captured(calls[name]))
        except Exception as error:
            row = dataclasses.asdict(case) | {"contender": as_graph(name)}
            record.add("rows", row | {"failed": explain(error)})
    measure(record, bench, case, runs, lambda _, found: errors(found, exact, dtype_name))


def words(clients: int, queries: int, keys: int, width: int) -> str:
    """A shape for the reader."""
    return f"{clients} client{'s' * (clients > 1)} x {queries} x {keys} x {width}"


def random_inputs(
    clients: int, queries: int, keys: int, width: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """The same in every run on a device."""
    source = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=source, device=device).to(dtype)

    return Inputs(
        queries_GBD=normal(clients, queries, width).requires_grad_(),
        keys_ND=normal(keys, width),
        labels_GB=torch.randint(0, keys, (clients, queries), generator=source, device=device),
    )


def contenders(inputs: Inputs, impl: str) -> dict[str, Callable]:
    """Name -> a call that returns the losses [G] and d(sum of losses)/d(queries) [G, B, D]."""

    def ours(queries_GBD, keys_ND, labels_GB) -> torch.Tensor:
        return info_nce(queries_GBD, keys_ND, labels_GB, TAU, impl=impl)

    return {
        OURS: with_gradient(ours, inputs),
        EAGER: client_by_client(inputs),
        "eager, all clients at once": with_gradient(eager_losses, inputs),
    }


def client_by_client(inputs: Inputs) -> Callable:
    """A call of the eager expression for each client."""
    each = [queries_BD.detach().requires_grad_() for queries_BD in inputs.queries_GBD]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        losses, gradients = [], []
        for queries_BD, labels_B in zip(each, inputs.labels_GB, strict=True):
            losses.append(eager_info_nce(queries_BD, inputs.keys_ND, labels_B, TAU))
            gradients += torch.autograd.grad(losses[-1], queries_BD)
        return torch.stack(losses).detach(), torch.stack(gradients)

    return call


def in_fp64(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [G] and gradient [G, B, D] in fp64."""
    queries_GBD, keys_ND = inputs.queries_GBD.double(), inputs.keys_ND.double()
    return client_by_client(Inputs(queries_GBD, keys_ND, inputs.labels_GB))()


def eager_losses(
    queries_GBD: torch.Tensor, keys_ND: torch.Tensor, labels_GB: torch.Tensor
) -> torch.Tensor:
    """The losses [G] of all clients in one expression."""
    logits_GBN = F.normalize(queries_GBD, dim=-1) @ F.normalize(keys_ND, dim=-1).mT
    logits = (logits_GBN.float() / TAU).flatten(0, 1)
    losses = F.cross_entropy(logits, labels_GB.flatten(), reduction="none")
    return losses.view_as(labels_GB).mean(1)


def with_gradient(losses_of: Callable, inputs: Inputs) -> Callable:
    """A call of a function that takes all clients at once."""
    queries_GBD = inputs.queries_GBD
    ones_G = torch.ones(len(queries_GBD), device=queries_GBD.device)

    def call() -> tuple[torch.Tensor, ...]:
        losses_G = losses_of(queries_GBD, inputs.keys_ND, inputs.labels_GB)
        return losses_G, *torch.autograd.grad(losses_G, queries_GBD, ones_G)

    return call


def errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], dtype: str) -> dict:
    """Largest error of a loss, in nats, and of the gradient, relative in the 2-norm."""
    of_loss = (found[0].double() - exact[0]).abs().max().item()
    of_gradient = ((found[1].double() - exact[1]).norm() / exact[1].norm()).item()
    measured = {"loss": of_loss, "query_gradient": of_gradient}
    correct = all(value <= LIMITS[dtype] for value in measured.values())
    return {"errors": measured, "correct": correct}
