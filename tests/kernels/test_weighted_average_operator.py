"""The average as a torch operator, and what the compiler makes of its kernels."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from semanticfl_ref.kernels import dispatch
from semanticfl_ref.kernels import weighted_average as module
from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("as_list", "groups", "diagnostics"), [(False, 1, True), (True, 1, False), (False, 3, False)]
)
def test_opcheck(impl, device, dtype, as_list, groups, diagnostics):
    rows = torch.randn(3, 40, device=device, dtype=dtype)
    weights = torch.ones(groups, 3, dtype=torch.float64, device=device)
    torch.library.opcheck(
        torch.ops.semanticfl_ref.weighted_average,
        (
            list(rows) if as_list else [rows],
            weights,
            rows[0] if diagnostics else None,
            diagnostics,
            False,
            impl,
        ),
    )


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with FakeTensorMode():
        rows, weights = torch.empty(3, 40, dtype=torch.bfloat16), torch.empty(3)
        average, seen = weighted_average(rows, weights, diagnostics=True)
        assert (average.shape, average.dtype) == ((40,), torch.bfloat16)
        assert [(t.shape, t.dtype) for t in seen] == [
            ((3,), torch.int64),
            ((3,), torch.float64),
            ((3,), torch.float64),
        ]
        assert weighted_average(list(rows), torch.empty(2, 3)).shape == (2, 40)
        with pytest.raises(ValueError, match="weights"):
            weighted_average(rows, torch.empty(2))


@pytest.mark.parametrize("as_list", [False, True])
def test_in_a_compiled_function(impl, device, as_list):
    """Without a break in the graph, for two lengths of row."""

    def update(rows, weights):
        average, seen = weighted_average(
            list(rows) if as_list else rows,
            weights,
            reference=rows[0] if as_list else None,
            diagnostics=True,
            impl=impl,
        )
        return 2 * average, seen.squared_update_norm.sqrt()

    torch.compiler.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for entries in (40, 65):
        rows, weights = torch.randn(3, entries, device=device), torch.arange(3.0, device=device)
        for got, expected in zip(compiled(rows, weights), update(rows, weights), strict=True):
            assert torch.equal(got, expected)


def test_autocast_changes_nothing(impl, device):
    rows, weights = torch.randn(3, 40, device=device), torch.arange(1.0, 4.0, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        average, seen = weighted_average(rows, weights, diagnostics=True, impl=impl)
    expected, seen_without = weighted_average(rows, weights, diagnostics=True, impl=impl)
    assert torch.equal(average, expected) and torch.equal(
        seen.dot_with_average, seen_without.dot_with_average
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_a_cuda_graph_without_waiting(device):
    rows, weights, reference = (
        torch.randn(5, 5001, device=device),
        torch.arange(1.0, 6.0, device=device),
        torch.randn(5001, device=device),
    )

    def work() -> list[torch.Tensor]:
        average = RunningAverage(5001, device)
        for row, weight in zip(rows, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True):
            seen = average.add(row, weight, reference)
        return [
            *weighted_average(rows, weights, reference=reference, diagnostics=True)[1],
            average.finish(),
            seen.squared_update_norm,
        ]

    work()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    with (
        pytest.raises(RuntimeError, match="list of rows"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        weighted_average(list(rows), weights)
    rows.copy_(torch.randn(5, 5001, device=device))
    graph.replay()
    assert all(torch.equal(got, expected) for got, expected in zip(results, work(), strict=True))


def test_a_kernel_that_cannot_be_compiled_is_replaced(device, monkeypatch):
    """The compiler refuses: the call and the running average go on in torch, after one warning."""
    errors = pytest.importorskip("triton.runtime.errors")
    from semanticfl_ref.kernels import weighted_average_triton

    def refuse(*arguments, **options):
        raise errors.OutOfResources(300, 227, "shared memory")

    rows, weights = torch.randn(3, 50, device=device), torch.arange(1.0, 4.0, device=device)
    expected = weighted_average(rows, weights, impl="torch")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in {"_unusable": None, "_examined": True}.items():
        monkeypatch.setattr(dispatch, name, value)
    monkeypatch.setattr(module, "implementation", lambda impl, *tensors: "triton")
    for name in ("launch_average", "launch_add"):
        monkeypatch.setattr(weighted_average_triton, name, refuse)
    average = RunningAverage(50, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(weighted_average(rows, weights), expected)
        for row, weight in zip(rows, weights.tolist(), strict=True):
            average.add(row, weight)
    assert torch.equal(average.finish(), expected)
    assert len(caught) == 1 and "shared memory" in str(caught[0].message)


def test_other_errors_of_a_launch_are_not_hidden(device, monkeypatch):
    pytest.importorskip("triton")
    from semanticfl_ref.kernels import weighted_average_triton

    def fail(*arguments, **options):
        raise IndexError("a bug")

    monkeypatch.setattr(module, "implementation", lambda impl, *tensors: "triton")
    monkeypatch.setattr(weighted_average_triton, "launch_average", fail)
    with pytest.raises(IndexError, match="a bug"):
        weighted_average(torch.zeros(2, 3, device=device), torch.ones(2, device=device))


COMPILE = """
import json, re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from semanticfl_ref.kernels.weighted_average_triton import variants

found = {}
for variant in variants():
    for alignment in (16, 8):
        if variant.name not in sys.argv[1:] or (alignment == 8 and "ALIGNMENT" not in variant.constants):
            continue
        constants = variant.constants | ({"ALIGNMENT": alignment} if "ALIGNMENT" in variant.constants else {})
        names = variant.kernel.arg_names
        signature = {name: "constexpr" if name in constants else variant.signature[name] for name in names}
        whole = [name for name in variant.divisible_by_16 if alignment == 16 or name != "rows"]
        source = ASTSource(variant.kernel, signature, constants, {(names.index(name),): [["tt.divisibility", 16]] for name in whole})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": variant.num_warps, "num_stages": variant.num_stages})
        found[f"{variant.name} {alignment}"] = sorted(set(re.findall(r"(?:ld|st)\\.global[\\w.:]*", compiled.asm["ptx"])))
print(json.dumps(found))
"""


def test_loads_take_128_bits():
    """Of an aligned row; 64 bits where the stride is a multiple of 8 bytes only. Compiled for an
    H100 that need not be here.
    """
    pytest.importorskip("triton")
    names = [
        "weighted_average/matrix-fp32",
        "weighted_average/table-bf16",
        "weighted_average/diagnostics-bf16",
        "weighted_average/add-fp32",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *names], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {name: " ".join(instructions) for name, instructions in json.loads(done.stdout).items()}
    assert len(found) == 7
    for name, instructions in found.items():
        wide, narrow = (
            "ld.global.v4.b32" in instructions,
            "ld.global.v2.b32" in instructions or "ld.global.b64" in instructions,
        )
        assert wide if name.endswith("16") else narrow, (name, instructions)
        if "matrix-fp32 8" in name:
            assert not wide, instructions  # otherwise this test could not tell
        assert "st.global.v4.b32" in instructions or "st.global.v2.b64" in instructions, (
            name,
            instructions,
        )
