"""The weighted average beside its peers.

    pytest --benchmark-only bench/bench_weighted_average.py

A3: at least 1.5x Flower's NumPy aggregation on a CPU, at 10 clients x ResNet-10.
A1 (GPU): at least 85 % of the device's copy bandwidth in the same run.

`weights @ params` stays beside it: one matrix product in the parameters' precision, in no fixed
order of summation. Each result is compared with fp64 in the same run. `bench/gpu.sh` measures more
shapes, dtypes and forms.

Letters: S clients, P size of a flat vector.
"""

import pytest
import torch

from bench.claims import claims
from bench.gpu.average import RESNET10, average_case, average_in_fp64
from bench.gpu.run import is_wrong
from bench.harness import Bench, fastest
from bench.peers import PRODUCT, as_layers, eager_average, flower, one_product
from bench.record import Record
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.kernels.weighted_average import weighted_average

CLIENTS = 10
pytestmark = pytest.mark.benchmark(group="weighted average")


def inputs() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The parameters of ten ResNet-10s [S, P], weights [S], and the sizes of a model's tensors."""
    sizes = [parameter.numel() for parameter in ResNet10(64, 10).parameters()]
    source = torch.Generator().manual_seed(0)
    params_SP = torch.randn(CLIENTS, sum(sizes), generator=source)
    return params_SP, torch.arange(1.0, CLIENTS + 1), sizes


def assert_rounded_once(average_P: torch.Tensor, exact_P: torch.Tensor) -> None:
    """At most half an epsilon of each entry."""
    worst = ((average_P.double() - exact_P).abs() / exact_P.abs().clamp_min(1e-30)).max().item()
    assert worst <= 0.501 * torch.finfo(average_P.dtype).eps, worst


def test_against_flower_on_the_cpu(benchmark):
    params_SP, weights_S, sizes = inputs()
    start_P = params_SP[0].clone()
    name, aggregate = flower()
    clients = [
        (as_layers(params_P, sizes), int(weight))
        for params_P, weight in zip(params_SP, weights_S.tolist(), strict=True)
    ]

    exact_P = average_in_fp64(params_SP, weights_S)
    assert_rounded_once(weighted_average(params_SP, weights_S).values_P, exact_P)
    theirs_P = torch.cat([torch.from_numpy(layer).flatten() for layer in aggregate(clients)])
    torch.testing.assert_close(theirs_P.double(), exact_P, rtol=0, atol=1e-5)
    peers = {
        name: lambda: aggregate(clients),
        PRODUCT: lambda: one_product(params_SP, weights_S),
        "eager, fp64": lambda: eager_average(params_SP, weights_S),
        "ours, with diagnostics": lambda: weighted_average(params_SP, weights_S, start_P),
    }
    ours, *others = fastest(lambda: weighted_average(params_SP, weights_S), *peers.values())
    found = {peer: round(taken / ours, 2) for peer, taken in zip(peers, others, strict=True)}
    benchmark.extra_info |= found
    print(
        f"\nA3: {found[name]}x {name} ({CLIENTS} clients x {params_SP.shape[1]}, CPU, fp32; target "
        f"1.5); times over ours: {found}; parameters read at {params_SP.nbytes / ours / 1e9:.1f} "
        f"GB/s"
    )
    benchmark.pedantic(weighted_average, (params_SP, weights_S), rounds=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_against_a_copy_on_a_gpu(benchmark, tmp_path):
    record, bench = Record(tmp_path / "results.json"), Bench(torch.device("cuda"))
    case = record, bench, (CLIENTS, RESNET10), torch.float32
    benchmark.pedantic(average_case, case, rounds=1)
    assert not any(map(is_wrong, record.content["rows"]))
    print("", *claims(record.content), sep="\n")
