"""The average on a GPU: A1 (at least 85 % of the copy bandwidth) and A3 (at least 5x Flower's NumPy
aggregation), for `python -m bench.gpu`.

Bytes are the least that a call must move: every row once, the average once, the reference once
where there is one. The streaming form reads and writes its fp64 sum with each row, which is the
price of O(P) memory, and is counted so. Letters: K clients, P entries of a row, G groups."""

from collections.abc import Callable

import torch

from bench.measure import OURS, Bench, Contender, guarded, measure
from bench.peers import as_layers, compiled, eager_average, flower, one_product
from bench.record import Record
from bench.timing import interleaved
from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average

RESNET10 = 4_900_000
CASES = [  # clients, entries, dtype; the first has the peers that are worth one look
    (10, RESNET10, torch.float32),
    (10, RESNET10, torch.bfloat16),
    (5, RESNET10, torch.float32),
    (100, RESNET10, torch.float32),
    (10, 100_000_000, torch.float32),
    (10, 100_000_000, torch.bfloat16),
    (100, 100_000_000, torch.bfloat16),
]
TINY = [(3, 1_001, torch.float32), (3, 515, torch.bfloat16)]
COPY_LIMIT = 4 << 30  # bytes: a larger copy is no faster


def stage(record: Record, bench: Bench) -> None:
    for number, (clients, entries, dtype) in enumerate(TINY if bench.rehearse else CASES):
        with guarded(record, f"weighted_average, {clients} x {entries}, {name_of(dtype)}"):
            one_case(record, bench, clients, entries, dtype, with_peers=number == 0)


def one_case(
    record: Record, bench: Bench, clients: int, entries: int, dtype: torch.dtype, with_peers: bool
) -> None:
    source = torch.Generator(bench.device).manual_seed(0)
    rows_KP = torch.empty(clients, entries, dtype=dtype, device=bench.device).normal_(
        generator=source
    )
    weights_K = torch.arange(1.0, clients + 1, device=bench.device)
    exact_P, size_P = (
        average_in_fp64(rows_KP, weights_K, of) for of in (torch.positive, torch.abs)
    )
    moved = (rows_KP.numel() + entries) * rows_KP.element_size()
    case = {
        "kernel": "weighted_average",
        "case": f"{clients} x {millions(entries)}",
        "dtype": name_of(dtype),
        "direction": "forward",
        "shape": {"K": clients, "P": entries},
        "ceiling": "copy",
        "bytes": moved,
        "flop": 2 * rows_KP.numel(),
    }

    def check(name: str, average) -> dict:
        """Error in units of the dtype's epsilon: of each entry (our one rounding costs at most a
        half of it), and of the mean of |w x| for the others.
        """
        if average is None:  # the plain copy
            return {"errors": {}, "correct": True}
        average_P = average[0] if isinstance(average, tuple) else average
        difference_P = (average_P.double() - exact_P).abs() / torch.finfo(dtype).eps
        worst, spread = (
            (difference_P / scale_P.clamp_min(torch.finfo(dtype).smallest_normal)).max().item()
            for scale_P in (exact_P.abs(), size_P)
        )
        return {
            "errors": {"epsilons of the entry": worst, "epsilons of the sizes": spread},
            "correct": worst <= 0.501 if name.startswith(OURS) else spread <= 2,
        }

    measure(
        record,
        bench,
        case,
        contenders(bench, rows_KP, weights_K, exact_P, moved, with_peers),
        check,
    )
    if with_peers:
        beside_flower(record, bench, case, rows_KP, weights_K)


def average_in_fp64(rows_KP: torch.Tensor, weights_K: torch.Tensor, of: Callable) -> torch.Tensor:
    """The average of `of(rows)`, in chunks that fit beside large rows."""
    return (
        torch.cat(
            [weights_K.double() @ of(part.double()) for part in rows_KP.split(1 << 20, dim=1)]
        )
        / weights_K.double().sum()
    )


def contenders(
    bench: Bench,
    rows_KP: torch.Tensor,
    weights_K: torch.Tensor,
    exact_P: torch.Tensor,
    moved: int,
    with_peers: bool,
) -> dict[str, Contender]:
    """Our forms, the matrix library, the eager fp64 expression where its copy of the rows is small,
    and a plain copy of the rows.
    """
    size, entries = rows_KP.element_size(), rows_KP.shape[1]
    rows, reference_P = list(rows_KP.unbind()), exact_P.to(rows_KP.dtype)
    some_KP = rows_KP[: max(1, COPY_LIMIT // (entries * size))]
    copy_KP = torch.empty_like(some_KP)
    weights = weights_K.tolist()

    def streaming() -> torch.Tensor:
        average = RunningAverage(entries, bench.device, impl=bench.impl)
        for params_P, weight in zip(rows, weights, strict=True):
            average.add(params_P, weight)
        return average.finish(rows_KP.dtype)

    def copy() -> None:
        copy_KP.copy_(some_KP)

    ours = {
        OURS: Contender(lambda: weighted_average(rows_KP, weights_K, impl=bench.impl)),
        "ours, a list of rows": Contender(
            lambda: weighted_average(rows, weights_K, impl=bench.impl)
        ),
        "ours, with diagnostics": Contender(
            lambda: weighted_average(
                rows_KP, weights_K, reference=reference_P, diagnostics=True, impl=bench.impl
            ),
            moved + entries * size,
        ),
        "ours, streaming": Contender(
            streaming, rows_KP.numel() * (size + 16) + entries * (8 + size)
        ),
    }
    peers = {
        "weights @ rows": Contender(lambda: one_product(rows_KP, weights_K)),
        "plain copy of the rows": Contender(copy, 2 * some_KP.numel() * size, 0),
    }
    if rows_KP.numel() <= 1_000_000_000:
        peers["eager, fp64"] = Contender(lambda: eager_average(rows_KP, weights_K))
    if with_peers:
        average = compiled(eager_average, bench.rehearse)
        peers["torch.compile of eager, fp64"] = Contender(lambda: average(rows_KP, weights_K))
    return ours | peers


def beside_flower(
    record: Record, bench: Bench, case: dict, rows_KP: torch.Tensor, weights_K: torch.Tensor
) -> None:
    """Flower aggregates on the host. Its arrays lie there already: what it takes to fetch them from
    a GPU is not counted.
    """
    name, aggregate = flower()
    entries = rows_KP.shape[1]
    sizes = [entries // 24] * 24 + [entries % 24]  # about a ResNet-10's number of arrays
    clients = [
        (as_layers(params_P, sizes), int(weight))
        for params_P, weight in zip(rows_KP.cpu(), weights_K.tolist(), strict=True)
    ]
    host = torch.device("cpu")
    times = interleaved(
        {name: lambda: aggregate(clients)},
        host,
        **({"least": 2, "seconds": 0.0} if bench.rehearse else {"most": 5}),
    )[name]
    average_P = torch.cat([torch.from_numpy(layer).flatten() for layer in aggregate(clients)])
    close = torch.allclose(
        average_P,
        weighted_average(rows_KP.cpu(), weights_K.cpu(), impl="torch"),
        rtol=1e-4,
        atol=1e-5,
    )
    record.add(
        "rows",
        case
        | {"contender": f"{name}, on the host", "correct": close, "errors": {}, "ceiling": None}
        | times,
    )


def millions(entries: int) -> str:
    """A count as a person writes it."""
    return f"{entries / 1e6:g} M" if entries >= 100_000 else str(entries)


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
