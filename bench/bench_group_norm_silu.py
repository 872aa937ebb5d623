"""GroupNorm and SiLU of channels-last maps beside their peers, on a GPU: on a CPU torch serves.

    pytest --benchmark-only bench/bench_group_norm_silu.py

N1: at least 70 % of the device's copy bandwidth in the same run, counted as two reads and one
write. Each result is compared with fp64 in the same run. N2, the whole VAE encoder, is in
bench_diffusion.py.
"""

import pytest
import torch

from bench.claims import claims
from bench.gpu.norm import stage
from bench.gpu.run import is_wrong
from bench.harness import Bench
from bench.record import Record


@pytest.mark.benchmark(group="GroupNorm and SiLU")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_against_a_copy_on_a_gpu(benchmark, tmp_path):
    record = Record(tmp_path / "results.json")
    benchmark.pedantic(stage, (record, Bench(torch.device("cuda"))), rounds=1)
    assert "failures" not in record.content
    assert not any(map(is_wrong, record.content["rows"]))
    print("", *claims(record.content), sep="\n")
