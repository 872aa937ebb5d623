"""The average as a torch operator, and what the compiler makes of its kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from semanticfl_ref.kernels import dispatch
from semanticfl_ref.kernels import weighted_average as module
from semanticfl_ref.kernels.weighted_average import weighted_average, weighted_average_operator

needs_triton = pytest.mark.skipif(dispatch.IMPORT_ERROR is not None, reason="no Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("compared", "continued"), [(False, True), (True, False)])
def test_opcheck(impl, device, dtype, compared, continued):
    params = torch.randn(3, 40, device=device, dtype=dtype)
    sums = torch.randn(40, device=device, dtype=torch.float64) if continued else None
    weight = torch.ones((), device=device, dtype=torch.float64) if continued else None
    weights = torch.ones(3, dtype=torch.float64, device=device)
    start = params[0].clone() if compared else None
    for final in (True, False):
        given = (params, weights, start, sums, weight, final, impl)
        torch.library.opcheck(weighted_average_operator, given)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with FakeTensorMode():
        params, weights = torch.empty(3, 40, dtype=torch.bfloat16), torch.empty(3)
        average = weighted_average(params, weights, params[0])
        assert [(tensor.shape, tensor.dtype) for tensor in average[:4]] == [
            ((40,), torch.bfloat16),
            ((), torch.float64),
            ((3,), torch.int64),
            ((3,), torch.float64),
        ]
        assert weighted_average(params, weights, final=False).values_P.dtype == torch.float64
        with pytest.raises(ValueError, match="weights"):
            weighted_average(params, torch.empty(2))


@pytest.mark.parametrize("compared", [False, True])
def test_in_a_compiled_function(impl, device, compared):
    """Without a break in the graph, for two lengths of row."""

    def update(params, weights):
        start = params[0] if compared else None
        first = weighted_average(params[:1], weights[:1], final=False, impl=impl)
        average = weighted_average(params[1:], weights[1:], start, first, impl=impl)
        norms = average.squared_norm_S if compared else average.weight
        return 2 * average.values_P, norms.sqrt()

    torch.compiler.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for entries in (40, 65):
        params, weights = torch.randn(3, entries, device=device), torch.arange(3.0, device=device)
        results = zip(compiled(params, weights), update(params, weights), strict=True)
        assert all(torch.equal(got, expected) for got, expected in results)


def test_autocast_changes_nothing(impl, device):
    params, weights = torch.randn(3, 40, device=device), torch.arange(1.0, 4.0, device=device)
    expected = weighted_average(params, weights, params[0], impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        average = weighted_average(params, weights, params[0], impl=impl)
    assert all(
        torch.equal(got, other) for got, other in zip(average[:4], expected[:4], strict=True)
    )


@needs_cuda
def test_in_a_cuda_graph_without_waiting(device, check_capture):
    params, weights = torch.randn(5, 5001, device=device), torch.arange(1.0, 6.0, device=device)
    start = torch.randn(5001, device=device)

    def work() -> tuple[torch.Tensor, ...]:
        first = weighted_average(params[:2], weights[:2], start, final=False)
        average = weighted_average(params[2:], weights[2:], start, first)
        return *first[:4], *average[:4]

    check_capture(work, lambda: params.copy_(torch.randn(5, 5001, device=device)))


@needs_triton
def test_a_kernel_that_cannot_be_compiled_is_replaced(device, refused_by_the_compiler):
    """The compiler refuses: calls go on in torch, after one warning."""
    params, weights = torch.randn(3, 50, device=device), torch.arange(1.0, 4.0, device=device)
    expected = weighted_average(params, weights, impl="torch").values_P
    with refused_by_the_compiler(module):
        for _ in range(2):
            assert torch.equal(weighted_average(params, weights).values_P, expected)


@needs_triton
def test_other_errors_of_a_launch_are_not_hidden(device, monkeypatch):
    def fail(*arguments):
        raise IndexError("a bug")

    monkeypatch.setattr(module, "implementation", lambda *given, **_: "triton")
    monkeypatch.setattr(module, "launch", fail)
    with pytest.raises(IndexError, match="a bug"):
        weighted_average(torch.zeros(2, 3, device=device), torch.ones(2, device=device))


@needs_triton
def test_what_is_compiled():
    """Loads take 128 bits of aligned rows, 64 bits where the stride is a multiple of 8 bytes only;
    a comparison adds its entries in one order, whatever the form. Compiled for an H100 that need
    not be here.
    """
    printed = json.loads(output_of("compiled_accesses.py"))
    orders, found = printed["orders"], printed["accesses"]
    assert len(orders["fp32"]) == len(orders["bf16"]) == 1
    assert len(orders["bf16, start in fp32"]) == 2, "which is why that is refused"
    assert len(found) == 8
    for name, accesses in found.items():
        narrow = "ld.global.v2.b32" in accesses or "ld.global.b64" in accesses
        assert narrow if name.endswith(" 8") else "ld.global.v4.b32" in accesses, (name, accesses)
        if name == "fp32 plain 8":
            assert "ld.global.v4.b32" not in accesses, "otherwise this test could not tell"
        assert "st.global.v4.b32" in accesses or "st.global.v2.b64" in accesses, (name, accesses)


@needs_triton
def test_every_launch_is_bound_and_compiled():
    """As on an H100 that need not be here, by Triton's own launch: it refuses a kernel that has an
    argument `params`, which the compiler alone and the interpreter take.
    """
    launched = output_of("launched_elsewhere.py").split()
    assert launched == [
        "add_blocks_kernel",
        "add_tiles_kernel",
        "group_norm_kernel",
        "info_nce_kernel",
        "statistics_kernel",
        "weighted_average_kernel",
    ]


def output_of(script: str) -> str:
    """What a script beside this file prints, run without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / script)],
        cwd=Path(__file__).parents[2],
        env=environment | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
