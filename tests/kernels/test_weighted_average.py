"""The average against numbers a reader redoes on paper, against fp64, and against its own streaming form."""

import pytest
import torch

from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average


def test_on_paper():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    assert weighted_average(rows, torch.tensor([1.0, 1.0, 2.0])).tolist() == [3.5, 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_only(dtype):
    rows = torch.randn(7, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    exact = (weights.double() / weights.sum().double()) @ rows.double()
    assert (weighted_average(rows, weights).double() - exact).abs().max() <= (torch.finfo(dtype).eps / 2 * 1.001) * exact.abs().max()


def test_equal_rows_stay_as_they_are():
    row = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(weighted_average(row.repeat(3, 1), torch.tensor([0.1, 0.2, 0.7])), row)


def test_scale_of_weights_does_not_matter_and_zero_weight_is_absence():
    rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([1.0, 0.0, 3.0])
    assert torch.equal(weighted_average(rows, weights), weighted_average(rows[[0, 2]], 4 * weights[[0, 2]]))


def test_streaming_is_the_matrix_form():
    rows, weights = torch.randn(5, 33, generator=torch.Generator().manual_seed(3)), torch.arange(1.0, 6.0)
    average = RunningAverage(33)
    for row, weight in zip(rows, weights.tolist(), strict=True):
        average.add(row, weight)
    assert torch.equal(average.finish(), weighted_average(rows, weights))


@pytest.mark.parametrize(
    ("rows", "weights", "said"),
    [((2, 3), [1.0], "weights"), ((2, 3), [-1.0, 2.0], "-1.0"), ((2, 3), [float("nan"), 1.0], "nan"), ((2, 3), [0.0, 0.0], "zero")],
)
def test_bad_input_is_named(rows, weights, said):
    with pytest.raises(ValueError, match=said):
        weighted_average(torch.zeros(rows), torch.tensor(weights))
