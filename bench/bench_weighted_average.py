"""The average of clients' rows beside its peers.  `pytest --benchmark-only
bench/bench_weighted_average.py -s`

A3: at least 1.5x Flower's NumPy aggregation on the CPU (5x on a GPU), at 10 clients x ResNet-10.
A1 (GPU): at least 85 % of the device's copy bandwidth, measured in the same run.
`weights @ rows` stays beside it: one call of the matrix library, in the rows' precision and without
a fixed order of summation. Each result is compared with fp64 in the same run. `bench/gpu.sh`
measures more cases, dtypes and forms."""

import pytest
import torch

from bench.gpu_average import average_in_fp64
from bench.peers import as_layers, eager_average, flower, one_product
from bench.timing import fastest, interleaved
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLIENTS = 10


def inputs(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows [K, P] of ten ResNet-10s, weights [K], and the number of entries of each of its tensors."""
    sizes = [parameter.numel() for parameter in ResNet10(64, 10).parameters()]
    rows_KP = torch.randn(CLIENTS, sum(sizes), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    return rows_KP, torch.arange(1.0, CLIENTS + 1, device=device), sizes


def assert_rounded_once(average_P: torch.Tensor, exact_P: torch.Tensor) -> None:
    """Half an epsilon of each entry, no more."""
    worst = ((average_P.double() - exact_P).abs() / exact_P.abs().clamp_min(1e-30)).max().item()
    assert worst <= 0.501 * torch.finfo(average_P.dtype).eps, worst


def test_against_flower_on_the_cpu(benchmark):
    rows_KP, weights_K, sizes = inputs()
    weights = weights_K.tolist()
    name, aggregate = flower()
    clients = [
        (as_layers(params_P, sizes), int(weight))
        for params_P, weight in zip(rows_KP, weights, strict=True)
    ]

    def streaming() -> torch.Tensor:
        average = RunningAverage(rows_KP.shape[1])
        for params_P, weight in zip(rows_KP, weights, strict=True):
            average.add(params_P, weight)
        return average.finish()

    exact_P = average_in_fp64(rows_KP, weights_K, torch.positive)
    assert_rounded_once(weighted_average(rows_KP, weights_K), exact_P)
    assert torch.equal(streaming(), weighted_average(rows_KP, weights_K))
    theirs_P = torch.cat([torch.from_numpy(layer).flatten() for layer in aggregate(clients)])
    torch.testing.assert_close(theirs_P.double(), exact_P, rtol=0, atol=1e-5)
    peers = {
        name: lambda: aggregate(clients),
        "weights @ rows": lambda: one_product(rows_KP, weights_K),
        "eager, fp64": lambda: eager_average(rows_KP, weights_K),
    }
    ours, stream, *others = fastest(
        lambda: weighted_average(rows_KP, weights_K), streaming, *peers.values()
    )
    found = {peer: round(taken / ours, 2) for peer, taken in zip(peers, others, strict=True)} | {
        "our streaming form": round(stream / ours, 2)
    }
    benchmark.extra_info |= found
    read = rows_KP.numel() * 4 / ours / 1e9
    print(
        f"\nA3: {found[name]}x {name} ({CLIENTS} clients x {rows_KP.shape[1]}, CPU, fp32; target 1.5); others' time over ours: {found}; rows read at {read:.1f} GB/s"
    )
    benchmark.pedantic(weighted_average, (rows_KP, weights_K), rounds=3)


@needs_cuda
def test_against_a_copy_on_a_gpu(benchmark):
    rows_KP, weights_K, _ = inputs("cuda")
    assert_rounded_once(
        weighted_average(rows_KP, weights_K), average_in_fp64(rows_KP, weights_K, torch.positive)
    )
    target_KP = torch.empty_like(rows_KP)
    contenders = {
        "ours": lambda: weighted_average(rows_KP, weights_K),
        "copy": lambda: target_KP.copy_(rows_KP),
        "weights @ rows": lambda: one_product(rows_KP, weights_K),
    }
    times = {
        name: taken["median_ms"] for name, taken in interleaved(contenders, rows_KP.device).items()
    }
    share = (
        (rows_KP.numel() + rows_KP.shape[1]) / times["ours"] / (2 * rows_KP.numel() / times["copy"])
    )
    benchmark.extra_info |= {
        "A1": round(share, 3),
        "weights @ rows / ours": round(times["weights @ rows"] / times["ours"], 2),
    }
    print(
        f"\nA1: {share:.0%} of the copy's bandwidth (target 85 %); {benchmark.extra_info['weights @ rows / ours']}x as fast as weights @ rows"
    )
    benchmark.pedantic(
        lambda: (weighted_average(rows_KP, weights_K), torch.cuda.synchronize()), rounds=3
    )
