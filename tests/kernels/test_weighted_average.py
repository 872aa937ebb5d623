"""The average against numbers a reader redoes on paper, against exact arithmetic, and against its
own other forms; in torch, and by the kernels.
"""

from fractions import Fraction

import pytest
import torch

from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (clients, entries): one entry, one whole block of columns, one entry more, a ragged end and more
# rows than the loop unrolls.
SHAPES = [(1, 1), (2, 1024), (3, 1025), (9, 1500)]


def rows_of(
    clients: int, entries: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    return (
        torch.randn(clients, entries, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .to(device)
    )


def counts(*shape: int, device: torch.device) -> torch.Tensor:
    """Weights as counts of samples: their products with float32 entries are exact in fp64."""
    return torch.randint(1, 1000, shape, generator=torch.Generator().manual_seed(1)).to(device)


def streamed(rows: torch.Tensor, weights: list[float], impl: str) -> torch.Tensor:
    average = RunningAverage(rows.shape[1], rows.device, impl)
    for row, weight in zip(rows, weights, strict=True):
        average.add(row, weight)
    return average.finish(rows.dtype)


def test_on_paper(impl, device):
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], device=device)
    weights = torch.tensor([1.0, 1.0, 2.0], device=device)
    assert weighted_average(rows, weights, impl=impl).tolist() == [3.5, 6.0]
    assert weighted_average(
        rows, torch.stack([weights, torch.tensor([1.0, 0.0, 0.0], device=device)]), impl=impl
    ).tolist() == [[3.5, 6.0], [1.0, 2.0]]
    assert streamed(rows, weights.tolist(), impl).tolist() == [3.5, 6.0]


def test_diagnostics_on_paper(impl, device):
    rows, weights, reference = (
        torch.tensor([[2.0, 1.0], [4.0, 1.0]], device=device),
        torch.tensor([1.0, 1.0], device=device),
        torch.tensor([1.0, 1.0], device=device),
    )
    average, seen = weighted_average(
        rows, weights, reference=reference, diagnostics=True, impl=impl
    )
    assert average.tolist() == [3.0, 1.0]  # updates (1, 0) and (3, 0); their average (2, 0)
    assert (
        seen.non_finite.tolist(),
        seen.squared_update_norm.tolist(),
        seen.dot_with_average.tolist(),
    ) == ([0, 0], [1.0, 9.0], [2.0, 6.0])


def test_the_sum_is_in_fp64(impl, device):
    """In fp32 the 1 is lost beside 2**30, and the average is 0."""
    rows = torch.tensor([[2.0**30], [1.0], [-(2.0**30)], [0.0]], device=device)
    assert weighted_average(rows, torch.ones(4, device=device), impl=impl).item() == 0.25


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_of_the_exact_average(impl, device, dtype):
    """Exact fractions, rounded to fp32 and from there to the rows' dtype; no entry of these is near
    enough to a tie for fp64 to tell the difference.
    """
    rows, weights = rows_of(7, 300, dtype, device), counts(7, device=device)
    exact = [
        sum(Fraction(w) * Fraction(x) for w, x in zip(weights.tolist(), column, strict=True))
        / int(weights.sum())
        for column in rows.T.tolist()
    ]
    expected = (
        torch.tensor([float(value) for value in exact], dtype=torch.float64).float().to(dtype)
    )
    assert torch.equal(weighted_average(rows, weights, impl=impl).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_lose_nothing_against_averaging_in_fp32_and_rounding_once(impl, device, dtype):
    rows, weights = rows_of(5, 1500, dtype, device), counts(5, device=device)
    assert torch.equal(
        weighted_average(rows, weights, impl=impl),
        weighted_average(rows.float(), weights, impl=impl).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("clients", "entries"), SHAPES)
def test_every_form_is_the_matrix_form_bitwise(impl, device, dtype, clients, entries):
    rows, weights = rows_of(clients, entries, dtype, device), counts(clients, device=device)
    expected = weighted_average(rows, weights, impl=impl)
    assert torch.equal(expected, weighted_average(rows, weights, impl="torch")), (
        "and the two implementations agree"
    )
    assert torch.equal(weighted_average(list(rows), weights, impl=impl), expected)
    assert torch.equal(weighted_average(rows, weights, diagnostics=True, impl=impl)[0], expected)
    assert torch.equal(streamed(rows, weights.tolist(), impl), expected)
    groups = torch.cat([counts(4, clients, device=device), weights[None]])
    grouped = weighted_average(rows, groups, impl=impl)
    assert torch.equal(grouped[4], expected)
    assert torch.equal(grouped[1], weighted_average(rows, groups[1], impl=impl))
    assert torch.equal(weighted_average(list(rows), groups, impl=impl), grouped)


def test_weights_that_are_not_integers_agree_between_the_forms(impl, device):
    rows = rows_of(5, 1300, torch.float32, device)
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(
        device
    )
    expected = weighted_average(rows, weights, impl=impl)
    assert torch.equal(streamed(rows, weights.tolist(), impl), expected)
    assert torch.equal(weighted_average(list(rows), weights, impl=impl), expected)
    torch.testing.assert_close(
        expected.double(), weights @ rows.double() / weights.sum(), rtol=2**-24, atol=1e-15
    )


def test_uniform_weights_are_the_mean_and_one_client_is_its_row(impl, device):
    rows = rows_of(4, 1100, torch.float32, device)
    assert torch.equal(
        weighted_average(rows, torch.full((4,), 3, device=device), impl=impl),
        rows.double().mean(0).float(),
    )
    assert torch.equal(
        weighted_average(rows[:1], torch.tensor([7.0], device=device), impl=impl), rows[0]
    )
    assert torch.equal(
        weighted_average(
            rows[:1].expand(3, -1), torch.tensor([0.1, 0.2, 0.7], device=device), impl=impl
        ),
        rows[0],
    )


def test_twice_the_same_bits(impl, device):
    rows, weights = rows_of(6, 3000, torch.float32, device), counts(6, device=device)
    first, again = (
        weighted_average(rows, weights, reference=rows[0], diagnostics=True, impl=impl)
        for _ in range(2)
    )
    assert torch.equal(first[0], again[0]) and all(
        torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True)
    )


def test_zero_weight_is_absence_even_of_nan(impl, device):
    rows, weights = (
        rows_of(3, 1030, torch.float32, device),
        torch.tensor([1.0, 0.0, 3.0], device=device),
    )
    expected = weighted_average(rows[[0, 2]], 4 * weights[[0, 2]], impl=impl)
    rows[1] = float("nan")
    assert torch.equal(weighted_average(rows, weights, impl=impl), expected)
    assert torch.equal(
        weighted_average(list(rows), weights.repeat(2, 1), impl=impl), expected.repeat(2, 1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_list", [False, True])
def test_diagnostics_against_plain_torch(impl, device, dtype, as_list):
    rows, weights, reference = (
        rows_of(5, 2700, dtype, device),
        counts(5, device=device),
        rows_of(1, 2700, torch.float32, device, seed=9)[0],
    )
    average, seen = weighted_average(
        list(rows) if as_list else rows, weights, reference=reference, diagnostics=True, impl=impl
    )
    update, drift = (
        rows.double() - reference.double(),
        weights.double() @ rows.double() / weights.sum() - reference.double(),
    )
    torch.testing.assert_close(seen.squared_update_norm, update.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(seen.dot_with_average, update @ drift, rtol=1e-11, atol=1e-9)
    assert torch.equal(seen.non_finite, torch.zeros(5, dtype=torch.int64, device=device))
    without = weighted_average(rows, weights, diagnostics=True, impl=impl)[1]
    torch.testing.assert_close(
        without.squared_update_norm, rows.double().square().sum(1), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_clients_are_named_and_dropped(impl, device, dtype):
    rows, weights = rows_of(4, 2500, dtype, device), counts(4, device=device)
    rows[1, 3], rows[1, 1024], rows[3, 2499] = float("nan"), float("inf"), -float("inf")
    rows[2] = torch.finfo(dtype).max  # large, its fp32 sum overflows, and finite
    seen = weighted_average(rows, weights, reference=rows[0], diagnostics=True, impl=impl)[1]
    assert seen.non_finite.tolist() == [0, 2, 0, 1]
    assert torch.isfinite(seen.squared_update_norm).tolist() == [True, False, True, False]
    kept = weighted_average(rows, weights * (seen.non_finite == 0), impl=impl)
    assert torch.equal(kept, weighted_average(rows[[0, 2]], weights[[0, 2]], impl=impl))


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_rows_of_any_alignment_and_stride(impl, device, offset):
    wide, weights = rows_of(3, 1050, torch.bfloat16, device), counts(3, device=device)
    expected = weighted_average(wide[:, offset : offset + 1033].clone(), weights, impl=impl)
    assert torch.equal(
        weighted_average(wide[:, offset : offset + 1033], weights, impl=impl), expected
    )
    assert torch.equal(
        weighted_average([row[offset : offset + 1033] for row in wide], weights, impl=impl),
        expected,
    )


def test_the_alignment_that_a_launch_promises():
    """The interpreter takes any address: on a GPU a promise too large is a fault, one too small is
    slow.
    """
    pytest.importorskip("triton")
    from semanticfl_ref.kernels.weighted_average_triton import _alignment

    for addresses, expected in [
        ([4096, 16], 16),
        ([4096, 24], 8),
        ([4096, 2066], 2),
        ([4100, 16], 4),
        ([7], 1),
        ([4096, 0], 16),
    ]:
        assert _alignment(addresses) == expected


def test_inputs_that_are_not_contiguous(impl, device):
    rows, weights, reference = (
        rows_of(3, 1200, torch.float32, device),
        counts(3, device=device),
        rows_of(1, 1200, torch.float32, device)[0],
    )
    expected = weighted_average(rows, weights, reference=reference, diagnostics=True, impl=impl)
    spread = [
        tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in (rows, weights, reference)
    ]
    for matrix in (rows.T.contiguous().T, spread[0], list(spread[0])):
        average, seen = weighted_average(
            matrix, spread[1], reference=spread[2], diagnostics=True, impl=impl
        )
        assert torch.equal(average, expected[0])
        torch.testing.assert_close(
            seen.squared_update_norm, expected[1].squared_update_norm, rtol=1e-12, atol=0
        )
    groups = counts(3, 2, device=device)
    assert torch.equal(
        weighted_average(rows, groups.T, impl=impl),
        weighted_average(rows, groups.T.contiguous(), impl=impl),
    )
    average = RunningAverage(1200, device, impl)
    for row, weight in zip(spread[0], weights.tolist(), strict=True):
        seen = average.add(row, weight, spread[2])
    assert torch.equal(average.finish(), expected[0])
    torch.testing.assert_close(
        seen.squared_update_norm, expected[1].squared_update_norm[2], rtol=1e-12, atol=0
    )


def test_no_entries(impl, device):
    average, seen = weighted_average(
        torch.empty(2, 0, device=device), torch.ones(2, device=device), diagnostics=True, impl=impl
    )
    assert average.shape == (0,) and seen.squared_update_norm.tolist() == [0.0, 0.0]
    assert weighted_average(
        [torch.empty(0, device=device)], torch.ones(3, 1, device=device), impl=impl
    ).shape == (3, 0)
    running = RunningAverage(0, device, impl)
    assert running.add(torch.empty(0, device=device), 1.0).non_finite == 0
    assert running.finish().shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("table", "groups", "diagnostics"),
    [(False, 1, True), (True, 1, True), (False, 3, False), (True, 5, False)],
)
def test_kernels_stay_inside_their_buffers(device, guarded, dtype, table, groups, diagnostics):
    """Inputs lie between NaN, outputs are NaN before the launch: nothing of either is left in the
    results.
    """
    pytest.importorskip("triton")
    from semanticfl_ref.kernels.weighted_average_triton import launch_average

    rows, weights, reference = (
        guarded(rows_of(3, 1029, dtype, device)),
        guarded(counts(groups, 3, device=device).double()),
        guarded(rows_of(1, 1029, dtype, device)[0]),
    )
    average = guarded(torch.full((groups, 1029), float("nan"), dtype=dtype, device=device))
    statistics = guarded(
        torch.full(
            (3, 3) if diagnostics else (0,), float("nan"), dtype=torch.float64, device=device
        )
    )
    launch_average(
        [guarded(row) for row in rows] if table else [rows],
        weights,
        reference if diagnostics else None,
        average,
        statistics,
    )
    assert torch.equal(average, weighted_average(rows, weights, impl="torch"))
    assert not statistics.isnan().any()


def test_wrong_shapes_dtypes_and_scalars_are_named(impl, device):
    rows, ones = torch.zeros(2, 3, device=device), torch.ones(2, device=device)
    for arguments, options, said in [
        ((rows, ones[:1]), {}, r"weights \(1,\) and 2 rows"),
        ((rows, torch.ones(2, 3, device=device)), {}, r"weights \(2, 3\) and 2 rows"),
        ((rows, torch.ones(0, 2, device=device)), {}, "G at least 1"),
        ((rows[0], ones), {}, r"rows \(3,\)"),
        (([rows[0], rows[0, :2]], ones), {}, r"\(2,\) and \(3,\)"),
        (([rows, rows], ones), {}, r"K tensors \[P\]"),
        (([], ones), {}, "at least one row"),
        ((rows, [1.0, 2.0]), {}, "weights: list"),
        ((rows.int(), ones), {}, "int32"),
        (([rows[0], rows[0].half()], ones), {}, "float16, first row of torch.float32"),
        ((rows, ones.to(torch.complex64)), {}, "complex64"),
        ((rows, ones), {"reference": rows}, r"reference \(2, 3\)"),
        ((rows, ones), {"reference": rows[0].long()}, "reference of torch.int64"),
        ((rows, torch.ones(2, 2, device=device)), {"diagnostics": True}, "diagnostics"),
        ((rows.clone().requires_grad_(), ones), {}, "requires_grad"),
        ((rows, ones.to("meta")), {}, "weights on meta"),
        ((rows, ones), {"impl": "cuda"}, "impl = 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=said):
            weighted_average(*arguments, **({"impl": impl} | options))
    with torch.no_grad():
        assert weighted_average(rows.clone().requires_grad_(), ones, impl=impl).tolist() == [
            0.0,
            0.0,
            0.0,
        ]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([-1.0, 2.0], r"weights\[0\] = -1.0"),
        ([1.0, float("nan")], r"weights\[1\] = nan"),
        ([0.0, float("inf")], "inf"),
        ([0.0, 0.0], "zero"),
    ],
)
def test_wrong_values_are_named(impl, device, weights, said):
    """On the CPU always; on a GPU on request."""
    with pytest.raises(ValueError, match=said):
        weighted_average(
            torch.zeros(2, 3, device=device),
            torch.tensor(weights, device=device),
            validate=True,
            impl=impl,
        )
    with pytest.raises(
        ValueError, match=said.replace("weights", r"weights\[1\]") if "[" in said else said
    ):
        weighted_average(
            torch.zeros(2, 3, device=device),
            torch.tensor([[1.0, 1.0], weights], device=device),
            validate=True,
            impl=impl,
        )
    if device.type == "cpu":
        with pytest.raises(ValueError, match=said):
            weighted_average(torch.zeros(2, 3), torch.tensor(weights), impl=impl)
