"""The weighted average on a GPU, a stage of `bench/gpu.sh`.

A1: at least 85 % of the copy bandwidth, also with non-finite counts and update norms in the same
pass. A3: at least 5x Flower's NumPy aggregation.

Bytes are the least that a call must move: all parameters and the reference read once, the average
written once.

Letters: S clients, P size of a flat vector.
"""

import dataclasses
from collections.abc import Callable

import torch

from bench.claims import WITH_DIAGNOSTICS
from bench.harness import OURS, Bench, Case, Contender, guarded, measure, name_of
from bench.peers import (
    COPY,
    ON_THE_HOST,
    PRODUCT,
    as_layers,
    eager_average,
    flower,
    one_product,
)
from bench.record import Record
from semanticfl_ref.kernels.weighted_average import Average, weighted_average

RESNET10 = 4_900_000
# S, P, dtype; the first has the peers that are worth one look.
CASES = [
    (10, RESNET10, torch.float32),
    (10, RESNET10, torch.bfloat16),
    (5, RESNET10, torch.float32),
    (100, RESNET10, torch.float32),
    (10, 100_000_000, torch.float32),
    (10, 100_000_000, torch.bfloat16),
    (100, 100_000_000, torch.bfloat16),
]
TINY = [(3, 1_001, torch.float32), (3, 515, torch.bfloat16)]
COPY_BYTES = 4 << 30  # a larger copy is no faster
EAGER_ENTRIES = 1_000_000_000  # the eager expression copies them in fp64


def stage(record: Record, bench: Bench) -> None:
    for number, (clients, size, dtype) in enumerate(TINY if bench.rehearse else CASES):
        with guarded(record, f"weighted_average, {clients} x {size}, {name_of(dtype)}"):
            average_case(record, bench, (clients, size), dtype, with_peers=number == 0)


def average_case(
    record: Record,
    bench: Bench,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    with_peers: bool = False,
) -> None:
    """Measure one shape and dtype."""
    clients, size = shape
    source = torch.Generator(bench.device).manual_seed(0)
    params_SP = torch.empty(shape, dtype=dtype, device=bench.device).normal_(generator=source)
    weights_S = torch.arange(1.0, clients + 1, device=bench.device)
    exact_P = average_in_fp64(params_SP, weights_S)
    size_P = average_in_fp64(params_SP, weights_S, torch.abs)
    case = Case(
        kernel="weighted_average",
        case=f"{clients} x {millions(size)}",
        dtype=name_of(dtype),
        shape={"S": clients, "P": size},
        bytes=(clients + 1) * size * dtype.itemsize,
    )

    def check(name: str, average) -> dict:
        """Errors in units of the dtype's epsilon: relative to the entry, of which our one rounding
        costs at most a half, and to the mean of |w x|, by which the others are judged."""
        if average is None:  # the copy
            return {"errors": {}, "correct": True}
        average_P = average.values_P if isinstance(average, Average) else average
        epsilon, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        difference_P = (average_P.double() - exact_P).abs() / epsilon
        of_entry = (difference_P / exact_P.abs().clamp_min(smallest)).max().item()
        of_sizes = (difference_P / size_P.clamp_min(smallest)).max().item()
        return {
            "errors": {"epsilons of the entry": of_entry, "epsilons of the sizes": of_sizes},
            "correct": of_entry <= 0.501 if name.startswith(OURS) else of_sizes <= 2,
        }

    runs = ours(bench, case, params_SP, weights_S, exact_P) | peers(bench, params_SP, weights_S)
    measure(record, bench, case, runs, check)
    if with_peers:
        measure_flower(record, bench, case, params_SP.cpu(), weights_S.cpu())


def average_in_fp64(
    params_SP: torch.Tensor, weights_S: torch.Tensor, of: Callable = torch.positive
) -> torch.Tensor:
    """The average of `of(params)`, float64 [P], in chunks that fit beside large matrices."""
    weights_S = weights_S.double()
    chunks = [weights_S @ of(chunk.double()) for chunk in params_SP.split(1 << 20, dim=1)]
    return torch.cat(chunks) / weights_S.sum()


def ours(
    bench: Bench,
    case: Case,
    params_SP: torch.Tensor,
    weights_S: torch.Tensor,
    exact_P: torch.Tensor,
) -> dict[str, Contender]:
    """The forms that a round uses."""
    start_P, impl = exact_P.to(params_SP.dtype), bench.impl
    return {
        OURS: Contender(lambda: weighted_average(params_SP, weights_S, impl=impl)),
        WITH_DIAGNOSTICS: Contender(
            lambda: weighted_average(params_SP, weights_S, start_P, impl=impl),
            {"bytes": case.bytes + start_P.nbytes},
        ),
    }


def peers(bench: Bench, params_SP: torch.Tensor, weights_S: torch.Tensor) -> dict[str, Contender]:
    """A copy on the device, the matrix library, and the eager expression where its copy in fp64
    fits."""
    some_SP = params_SP[: max(1, COPY_BYTES // params_SP[0].nbytes)]
    copy_SP = torch.empty_like(some_SP)

    def copy() -> None:
        copy_SP.copy_(some_SP)

    found = {
        PRODUCT: Contender(lambda: one_product(params_SP, weights_S)),
        COPY: Contender(copy, {"bytes": 2 * some_SP.nbytes}),
    }
    if params_SP.numel() <= EAGER_ENTRIES:
        found["eager, fp64"] = Contender(lambda: eager_average(params_SP, weights_S))
    return found


def measure_flower(
    record: Record, bench: Bench, case: Case, params_SP: torch.Tensor, weights_S: torch.Tensor
) -> None:
    """Flower's aggregation on the host, where its arrays are: fetching them is not counted."""
    name, aggregate = flower()
    size = params_SP.shape[1]
    sizes = [size // 24] * 24 + [size % 24]  # about a ResNet-10's number of arrays
    clients = [
        (as_layers(params_P, sizes), int(weight))
        for params_P, weight in zip(params_SP, weights_S.tolist(), strict=True)
    ]

    expected_P = weighted_average(params_SP, weights_S, impl="torch").values_P

    def check(_name: str, layers) -> dict:
        average_P = torch.cat([torch.from_numpy(layer).flatten() for layer in layers])
        return {"errors": {}, "correct": torch.allclose(average_P, expected_P, 1e-4, 1e-5)}

    host = dataclasses.replace(bench, device=torch.device("cpu"))
    on_host = dataclasses.replace(case, bytes=0)
    run = Contender(lambda: aggregate(clients))
    measure(record, host, on_host, {name + ON_THE_HOST: run}, check)


def millions(count: int) -> str:
    """A number as a person writes it."""
    return f"{count / 1e6:g} M" if count >= 100_000 else str(count)
