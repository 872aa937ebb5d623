"""InfoNCE on a GPU: K1 (training shape, at least 4x eager), K2 (launches), K3 (a CUDA graph), K4-K6
(64k x 64k), for `python -m bench.gpu`.

Floating-point operations are those of the mathematics, 2 B N D forward and three times as many with
both gradients (two thirds of the latter where the keys are frozen), not those that are done again
to save memory. Bytes are the least that a call must move: each input read once, each output written
once.
Letters: G clients, B queries, N keys, D feature width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.measure import OURS, Bench, Contender, captured, explain, guarded, launches, measure
from bench.peers import chunked_info_nce, compiled, eager_info_nce, inf_cl, liger
from bench.record import Record
from semanticfl_ref.kernels.info_nce import info_nce

TAU = 0.05
# clients, queries, keys, width; the dtype; the first of each dtype has torch.compile beside it
TRAINING = [
    (10, 64, 10, 512, torch.float32),
    (10, 64, 10, 512, torch.bfloat16),
    (5, 64, 100, 512, torch.float32),
    (50, 64, 10, 512, torch.float32),
    (50, 64, 200, 512, torch.float32),
    (50, 64, 200, 512, torch.bfloat16),
]
LARGE = [
    (65_536, 512, torch.bfloat16, "ieee"),
    (16_384, 512, torch.bfloat16, "ieee"),
    (16_384, 512, torch.float16, "ieee"),
    (16_384, 512, torch.float32, "tf32"),
    (8_192, 512, torch.float32, "ieee"),
]
# queries of the large case that has torch.compile beside it: the similarities of the largest do not
# fit
COMPILED = 16_384
TINY_TRAINING = [(2, 5, 3, 20, torch.float32), (2, 5, 3, 20, torch.bfloat16)]
TINY_LARGE = [(272, 24, torch.float32, "tf32")]  # more keys than the kernel for few of them takes
# Relative error of a gradient (2-norm) and absolute error of a loss in nats above which a result is
# wrong: some ten times what the dtype's rounding of inputs,
# products and outputs gives at this temperature.
LIMITS = {"fp32": 1e-4, "tf32": 3e-2, "bf16": 6e-2, "fp16": 1e-2}


def training_stage(record: Record, bench: Bench) -> None:
    """K1-K3: all clients' batches against the class anchors, which are frozen."""
    seen = set()
    for clients, queries, keys, width, dtype in TINY_TRAINING if bench.rehearse else TRAINING:
        with guarded(
            record, f"info_nce, {clients} clients x {queries} x {keys}, {name_of(dtype, 'ieee')}"
        ):
            training_case(
                record,
                bench,
                (clients, queries, keys, width),
                dtype,
                with_compile=dtype not in seen,
            )
        seen.add(dtype)


def large_stage(record: Record, bench: Bench) -> None:
    """K4-K6: in-batch pairs, gradients for both sides."""
    for size, width, dtype, precision in TINY_LARGE if bench.rehearse else LARGE:
        with guarded(record, f"info_nce, {size} x {size}, {name_of(dtype, precision)}"):
            large_case(record, bench, size, width, dtype, precision)


def training_case(
    record: Record,
    bench: Bench,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    with_compile: bool,
) -> None:
    clients, queries, keys, width = shape
    source = torch.Generator(bench.device).manual_seed(0)
    queries_GBD = (
        torch.randn(clients, queries, width, generator=source, device=bench.device)
        .to(dtype)
        .requires_grad_()
    )
    keys_ND = torch.randn(keys, width, generator=source, device=bench.device).to(dtype)
    labels_GB = torch.randint(0, keys, (clients, queries), generator=source, device=bench.device)
    exact = training_truth(queries_GBD, keys_ND, labels_GB)
    calls = training_calls(bench, queries_GBD, keys_ND, labels_GB)
    if with_compile:
        calls["torch.compile of eager"] = batched(
            compiled(eager_batched, bench.rehearse), queries_GBD, keys_ND, labels_GB
        )
    flop = 2 * clients * queries * keys * width
    size = queries_GBD.element_size()
    reads = (queries_GBD.numel() + keys_ND.numel()) * size + labels_GB.numel() * 8
    for direction, work, moved in (
        ("forward", flop, reads),
        ("forward and backward", 2 * flop, reads + queries_GBD.numel() * size),
    ):
        runs = {
            name: Contender(without_gradient(call) if direction == "forward" else call)
            for name, call in calls.items()
        }
        runs[OURS] = Contender(runs[OURS].run, notes={"launches": counted(runs[OURS].run, bench)})
        case = {
            "kernel": "info_nce",
            "case": f"{clients} clients x {queries} x {keys}",
            "dtype": name_of(dtype, "ieee"),
            "direction": direction,
            "shape": {"G": clients, "B": queries, "N": keys, "D": width},
            "ceiling": name_of(dtype, "ieee"),
            "bytes": moved,
            "flop": work,
        }
        runs |= graphs(
            record,
            case,
            {name: runs[name].run for name in (OURS, "eager, client by client")},
            bench,
        )
        measure(record, bench, case, runs, lambda _, result: errors(result, exact, case["dtype"]))


def training_calls(
    bench: Bench,
    queries_GBD: torch.Tensor,
    keys_ND: torch.Tensor,
    labels_GB: torch.Tensor,
    impl: str | None = None,
) -> dict[str, Callable]:
    """name -> a call that gives the losses [G], and where gradients are recorded d(sum of
    losses)/d(queries) [G, B, D].
    """
    each = [queries_BD.detach().requires_grad_() for queries_BD in queries_GBD]

    def one_by_one():
        losses = [
            eager_info_nce(queries_BD, keys_ND, labels_B, TAU)
            for queries_BD, labels_B in zip(each, labels_GB, strict=True)
        ]
        if not torch.is_grad_enabled():
            return (torch.stack(losses),)
        return torch.stack(losses), torch.stack(
            [
                torch.autograd.grad(loss, queries_BD)[0]
                for loss, queries_BD in zip(losses, each, strict=True)
            ]
        )

    return {
        OURS: batched(
            lambda q, k, y: info_nce(q, k, y, TAU, impl=impl or bench.impl),
            queries_GBD,
            keys_ND,
            labels_GB,
        ),
        "eager, client by client": one_by_one,
        "eager, all clients at once": batched(eager_batched, queries_GBD, keys_ND, labels_GB),
    }


def eager_batched(
    queries_GBD: torch.Tensor, keys_ND: torch.Tensor, labels_GB: torch.Tensor
) -> torch.Tensor:
    """The losses [G] of all clients in one expression."""
    similarities_GBN = (
        F.normalize(queries_GBD, dim=-1) @ F.normalize(keys_ND, dim=-1).mT
    ).float() / TAU
    return (
        F.cross_entropy(similarities_GBN.flatten(0, 1), labels_GB.flatten(), reduction="none")
        .view_as(labels_GB)
        .mean(1)
    )


def batched(
    function: Callable, queries_GBD: torch.Tensor, keys_ND: torch.Tensor, labels_GB: torch.Tensor
) -> Callable:
    """A call of a function that takes all clients at once."""

    ones_G = torch.ones(len(queries_GBD), device=queries_GBD.device)

    def call():
        losses_G = function(queries_GBD, keys_ND, labels_GB)
        return (
            (losses_G, *torch.autograd.grad(losses_G, queries_GBD, ones_G))
            if torch.is_grad_enabled()
            else (losses_G,)
        )

    return call


def without_gradient(call: Callable) -> Callable:
    """The call as an evaluation makes it: nothing is kept for a backward pass."""

    def quiet():
        with torch.no_grad():
            return call()

    return quiet


def training_truth(
    queries_GBD: torch.Tensor, keys_ND: torch.Tensor, labels_GB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [G] and gradient [G, B, D] in fp64."""
    exact_GBD = queries_GBD.detach().double().requires_grad_()
    losses = [
        eager_info_nce(exact_BD, keys_ND.double(), labels_B, TAU)
        for exact_BD, labels_B in zip(exact_GBD, labels_GB, strict=True)
    ]
    losses_G = torch.stack(losses)
    return losses_G.detach(), torch.autograd.grad(losses_G.sum(), exact_GBD)[0]


def large_case(
    record: Record, bench: Bench, size: int, width: int, dtype: torch.dtype, precision: str
) -> None:
    source = torch.Generator(bench.device).manual_seed(0)
    queries_BD = torch.randn(size, width, generator=source, device=bench.device)
    # A pair of a learnt model: alike, not equal. Without that every loss is log N and every
    # gradient nearly the same.
    keys_ND = (
        (0.2 * queries_BD + torch.randn(size, width, generator=source, device=bench.device))
        .to(dtype)
        .requires_grad_()
    )
    queries_BD = queries_BD.to(dtype).requires_grad_()
    labels_B = torch.arange(size, device=bench.device)
    exact = large_truth(queries_BD, keys_ND, labels_B)
    losses = {
        OURS: lambda q, k, y, tau: info_nce(q, k, None, tau, precision=precision, impl=bench.impl),
        "torch, chunked and checkpointed": chunked_info_nce,
        "Inf-CL": inf_cl(),
        "Liger, fused linear cross-entropy": liger(),
        "eager": eager_info_nce,
    }
    if (size == COMPILED and dtype == torch.bfloat16) or bench.rehearse:
        losses["torch.compile of eager"] = compiled(eager_info_nce, bench.rehearse)
    called, rows = name_of(dtype, precision), queries_BD.numel() * queries_BD.element_size()
    torch.set_float32_matmul_precision(
        "high" if precision == "tf32" else "highest"
    )  # the peers compute as ours does
    for direction, work, moved in (("forward", 2, 2 * rows), ("forward and backward", 6, 4 * rows)):
        case = {
            "kernel": "info_nce",
            "case": f"{size} x {size}",
            "dtype": called,
            "direction": direction,
            "shape": {"B": size, "N": size, "D": width},
            "ceiling": called,
            "bytes": moved,
            "flop": work * size * size * width,
        }
        for name in [name for name, loss in losses.items() if loss is None]:
            record.add("rows", case | {"contender": name, "skipped": "not installed"})
        calls = {
            name: large_call(loss, queries_BD, keys_ND, labels_B)
            for name, loss in losses.items()
            if loss is not None
        }
        runs = {
            name: Contender(without_gradient(call) if direction == "forward" else call)
            for name, call in calls.items()
        }
        runs[OURS] = Contender(runs[OURS].run, notes={"launches": counted(runs[OURS].run, bench)})
        measure(record, bench, case, runs, lambda _, result: errors(result, exact, called))
    torch.set_float32_matmul_precision("highest")


def large_call(
    loss_of: Callable, queries_BD: torch.Tensor, keys_ND: torch.Tensor, labels_B: torch.Tensor
) -> Callable:
    """A call that gives the loss, and where gradients are recorded those of queries and keys."""

    def call():
        loss = loss_of(queries_BD, keys_ND, labels_B, TAU)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return (
            (loss, *torch.autograd.grad(loss, (queries_BD, keys_ND)))
            if torch.is_grad_enabled()
            else (loss,)
        )

    return call


def large_truth(
    queries_BD: torch.Tensor, keys_ND: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Loss and both gradients in fp64, chunk by chunk."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (queries_BD, keys_ND)]
    loss = chunked_info_nce(*exact, labels_B, TAU, rows=1024)
    return loss.detach(), *torch.autograd.grad(loss, exact)


def errors(result: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], called: str) -> dict:
    """Largest error of a loss, in nats, and of each gradient, relative in the 2-norm."""
    found = {"loss": (result[0].double() - exact[0]).abs().max().item()}
    for name, gradient, truth in zip(
        ("query_gradient", "key_gradient"), result[1:], exact[1:], strict=False
    ):
        found[name] = ((gradient.double() - truth).norm() / truth.norm()).item()
    return {"errors": found, "correct": all(value <= LIMITS[called] for value in found.values())}


def graphs(
    record: Record, case: dict, runs: dict[str, Callable], bench: Bench
) -> dict[str, Contender]:
    """The same calls as CUDA graphs; a row says why for one that cannot be captured."""
    found = {}
    for name, run in runs.items():
        try:
            found[f"{name}, as a CUDA graph"] = Contender(captured(run, bench.device))
        except Exception as error:
            why = (
                {"skipped": "needs a CUDA device"}
                if bench.device.type != "cuda"
                else {"failed": explain(error)}
            )
            record.add("rows", case | {"contender": f"{name}, as a CUDA graph"} | why)
    return found


def counted(run: Callable, bench: Bench) -> dict[str, int] | None:
    """The kernels that a call launches; None where that cannot be known, so that a failing call
    fails in its own row.
    """
    try:
        return launches(run, bench.device)
    except Exception:
        return None


def name_of(dtype: torch.dtype, precision: str) -> str:
    return (
        precision
        if dtype == torch.float32 and precision == "tf32"
        else {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    )
