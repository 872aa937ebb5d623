"""The streaming average: rows are examined before they are added, in memory that does not grow with
their number.
"""

import pytest
import torch

from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [1, 1024, 1500])
def test_what_add_says_of_a_row(impl, device, dtype, entries):
    average, row, reference = (
        RunningAverage(entries, device, impl),
        normal(entries, device=device, dtype=dtype),
        normal(entries, device=device, seed=1),
    )
    seen = average.add(row, 2.0, reference)
    assert (int(seen.non_finite), seen.dot_with_average) == (0, None)
    assert (seen.non_finite.dtype, seen.squared_update_norm.dtype) == (torch.int64, torch.float64)
    torch.testing.assert_close(
        seen.squared_update_norm,
        (row.double() - reference.double()).square().sum(),
        rtol=1e-12,
        atol=0,
    )
    assert average.add(row, 1.0).squared_update_norm is None


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_row_that_is_not_finite_is_not_added(impl, device, with_reference):
    rows, weights = normal(4, 1300, device=device), [3.0, 5.0, 2.0, 0.0]
    average = RunningAverage(1300, device, impl)
    reference = rows[3] if with_reference else None
    for hostile in (float("nan"), float("inf"), -float("inf")):
        bad = rows[1].clone()
        bad[[0, 1024, 1299]] = hostile
        assert int(average.add(bad, 5.0, reference).non_finite) == 3
    both = rows[1].clone()
    both[7], both[8] = float("inf"), -float("inf")  # their sum is NaN, not 0
    assert int(average.add(both, 5.0, reference).non_finite) == 2
    huge = torch.full_like(
        rows[0], torch.finfo(torch.float32).max
    )  # its fp32 sum overflows, and it is finite
    assert int(average.add(huge, 0.0, reference).non_finite) == 0
    for row, weight in zip(rows, weights, strict=True):
        seen = average.add(row, weight, reference)
        assert int(seen.non_finite) == 0
    assert torch.equal(
        average.finish(), weighted_average(rows, torch.tensor(weights, device=device), impl=impl)
    )
    if with_reference:
        assert seen.squared_update_norm == 0, "a weight of 0 is examined all the same"


def test_large_finite_rows_are_added(impl, device):
    average, huge = (
        RunningAverage(1100, device, impl),
        torch.full((1100,), torch.finfo(torch.float32).max, device=device),
    )
    for sign in (1, 1, -1):
        assert int(average.add(sign * huge, 1.0).non_finite) == 0
    assert torch.equal(average.finish(), (huge.double() / 3).float())


def test_rows_in_the_order_of_the_clients_give_one_result_whoever_finished_first(impl, device):
    """The caller sorts. The sum is ordered: in another order of the rows its last bits may differ,
    so sorting is what makes it repeatable.
    """
    rows, weights = (
        normal(6, 2000, device=device),
        torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).tolist(),
    )
    results = []
    for finished in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 4, 2], [2, 0, 1, 5, 4, 3]):
        arrived = {client: (rows[client], weights[client]) for client in finished}
        average = RunningAverage(2000, device, impl)
        for client in sorted(arrived):
            average.add(*arrived[client])
        results.append(average.finish(torch.float64))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_long_rows_on_the_cpu_are_the_whole_row_formula_bitwise():
    """Several chunks and a ragged end: the sum is `sum.add_(row, alpha=weight)` over the whole row,
    entry by entry.
    """
    rows, weights = normal(3, 400_003, device=torch.device("cpu")), [0.1, 0.77, 1 / 3]
    whole = torch.zeros(400_003, dtype=torch.float64)
    average = RunningAverage(400_003)
    for row, weight in zip(rows, weights, strict=True):
        whole.add_(row, alpha=weight)
        seen = average.add(row, weight, rows[0])
    expected = (whole / (0.1 + 0.77 + 1 / 3)).float()
    assert torch.equal(average.finish(), expected)
    matrix, matrix_seen = weighted_average(
        rows,
        torch.tensor(weights, dtype=torch.float64),
        reference=rows[0],
        diagnostics=True,
        impl="torch",
    )
    assert torch.equal(matrix, expected)
    torch.testing.assert_close(
        seen.squared_update_norm,
        (rows[2].double() - rows[0].double()).square().sum(),
        rtol=1e-12,
        atol=0,
    )
    assert matrix_seen.squared_update_norm[2] == seen.squared_update_norm
    rows[1, 399_999] = float("nan")
    assert int(average.add(rows[1], 1.0).non_finite) == 1


def test_the_number_of_threads_does_not_change_the_average():
    rows, weights = normal(3, 300_001, device=torch.device("cpu")), torch.tensor([0.3, 0.3, 0.5])
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 6):
            torch.set_num_threads(number)
            results.append(weighted_average(rows, weights, impl="torch"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_float64_rows_are_left_to_torch(device):
    average, row = RunningAverage(40, device), normal(40, device=device).double()
    average.add(row, 3.0)
    assert torch.equal(average.finish(torch.float64), 3.0 * row / 3.0)
    assert torch.equal(
        weighted_average(row[None], torch.tensor([3.0], device=device)),
        average.finish(torch.float64),
    )


def test_the_streaming_kernels_stay_inside_their_buffers(device, guarded):
    pytest.importorskip("triton")
    from semanticfl_ref.kernels.weighted_average_triton import launch_add

    row, reference = (
        guarded(normal(1029, device=device)),
        guarded(normal(1029, device=device, seed=1)),
    )
    sums, total = (
        guarded(torch.zeros(1029, dtype=torch.float64, device=device)),
        guarded(torch.zeros((), dtype=torch.float64, device=device)),
    )
    statistics, weight = (
        guarded(torch.full((2,), float("nan"), dtype=torch.float64, device=device)),
        guarded(torch.tensor(5.0, dtype=torch.float64, device=device)),
    )
    launch_add(sums, total, row, weight, reference, statistics)
    assert torch.equal(sums, 5 * row.double())
    assert total.item() == 5
    torch.testing.assert_close(
        statistics,
        torch.stack([torch.zeros_like(total), (row.double() - reference).square().sum()]),
        rtol=1e-12,
        atol=0,
    )


def test_wrong_input_is_named(impl, device):
    average = RunningAverage(3, device, impl)
    row = torch.zeros(3, device=device)
    for arguments, said in [
        ((row, -1.0), "weight = -1.0"),
        ((row, float("nan")), "weight = nan"),
        ((row, float("inf")), "weight = inf"),
        ((row[:2], 1.0), r"row \(2,\)"),
        ((row.int(), 1.0), "int32"),
        ((row.to("meta"), 1.0), "on meta"),
        ((row, 1.0, row[:1]), r"reference \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            average.add(*arguments)
    with pytest.raises(ValueError, match="unknown|impl"):
        RunningAverage(3, device, "cuda")


def test_nothing_added_is_an_error_on_the_cpu():
    average = RunningAverage(3)
    average.add(torch.ones(3), 0.0)
    average.add(torch.full((3,), float("nan")), 2.0)
    with pytest.raises(ValueError, match="sum to zero"):
        average.finish()


def test_rows_that_ask_for_a_gradient_leave_no_graph(impl, device):
    average = RunningAverage(3, device, impl)
    average.add(torch.ones(3, device=device, requires_grad=True), 1.0)
    assert not average.finish().requires_grad
