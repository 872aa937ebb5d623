"""InfoNCE against class anchors beside its peers.

    pytest --benchmark-only bench/bench_info_nce.py

K1 (GPU): batch 64, D 512, 10 to 200 class anchors, 1 to 50 clients in one grid: forward and
d(queries) at least 4x the eager expression, client by client. Off the GPU the same function is the
eager torch expression after checks of its arguments: its time over that of the bare expression is
measured and printed (target 1.0; docs/kernels.md says what was found). Each result is compared with
fp64 in the same run. `bench/gpu.sh` also measures memory and CUDA graphs.

Letters: G clients, B queries, N keys, D feature width.
"""

import pytest
import torch

from bench.claims import claims
from bench.gpu.info_nce import TAU, errors, in_fp64, info_nce_case, random_inputs
from bench.gpu.run import is_wrong
from bench.harness import Bench, fastest
from bench.peers import eager_info_nce
from bench.record import Record
from semanticfl_ref.kernels.info_nce import info_nce

CPU = torch.device("cpu")
pytestmark = pytest.mark.benchmark(group="InfoNCE")


@pytest.mark.parametrize("keys", [10, 200])
def test_one_client_on_the_cpu(benchmark, keys):
    """A client's step as the loop takes it: one batch, forward and backward."""
    inputs = random_inputs(1, 64, keys, 512, CPU, torch.float32)
    queries_BD, labels_B = inputs.queries_GBD[0].detach().requires_grad_(), inputs.labels_GB[0]

    def step(loss_of) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(queries_BD, inputs.keys_ND, labels_B, TAU)
        return loss, torch.autograd.grad(loss, queries_BD)[0]

    found = errors([part[None] for part in step(info_nce)], in_fp64(inputs), "fp32")
    assert found["correct"], found
    ours, eager = fastest(lambda: step(info_nce), lambda: step(eager_info_nce), repeats=30)
    benchmark.extra_info |= {"ours / eager": round(ours / eager, 3), **found["errors"]}
    print(
        f"\nInfoNCE, 64 x {keys} x 512, CPU, forward and backward: {ours / eager:.3f}x the eager "
        f"expression's time, {1e6 * (ours - eager):+.0f} microseconds (target 1.0)"
    )
    benchmark(step, info_nce)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("clients", "keys"), [(1, 10), (5, 100), (10, 10), (50, 200)])
def test_training_shape_on_a_gpu(benchmark, tmp_path, clients, keys, dtype):
    record, bench = Record(tmp_path / "results.json"), Bench(torch.device("cuda"))
    case = record, bench, (clients, 64, keys, 512), dtype
    benchmark.pedantic(info_nce_case, case, rounds=1)
    assert not any(map(is_wrong, record.content["rows"]))
    print("", *claims(record.content), sep="\n")
