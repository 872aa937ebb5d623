"""The average against numbers a reader redoes on paper, against exact arithmetic, and against
itself in cohorts; by both implementations.
"""

from fractions import Fraction

import pytest
import torch

from semanticfl_ref.kernels import weighted_average as module
from semanticfl_ref.kernels.dispatch import IMPORT_ERROR
from semanticfl_ref.kernels.weighted_average import Average, weighted_average

# NumPy's, where the interpreter meets a NaN that a test put there.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_triton = pytest.mark.skipif(IMPORT_ERROR is not None, reason="no Triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (clients, entries): one entry, whole blocks of columns, one entry more, a ragged end and more rows
# than the loop unrolls.
SHAPES = [(1, 1), (2, 1024), (3, 1025), (9, 1500)]


def test_on_paper(impl, device):
    params = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], device=device)
    weights = torch.tensor([1.0, 1.0, 2.0], device=device)
    average = weighted_average(params, weights, impl=impl)
    assert (average.values_P.tolist(), average.weight.item()) == ([3.5, 6.0], 4.0)
    assert average.final
    assert average.non_finite_S is None and average.squared_norm_S is None


def test_cohorts_on_paper(impl, device):
    params = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], device=device)
    weights = torch.tensor([1.0, 1.0, 2.0], device=device)
    first = weighted_average(params[:2], weights[:2], final=False, impl=impl)
    assert (first.values_P.tolist(), first.weight.item()) == ([4.0, 6.0], 2.0)
    assert first.values_P.dtype == first.weight.dtype == torch.float64
    assert not first.final
    average = weighted_average(params[2:], weights[2:], None, first, impl=impl)
    assert (average.values_P.tolist(), average.weight.item()) == ([3.5, 6.0], 4.0)


def test_comparison_on_paper(impl, device):
    params = torch.tensor([[2.0, 1.0], [4.0, 1.0]], device=device)
    ones = torch.ones(2, device=device)
    average = weighted_average(params, ones, ones, impl=impl)
    assert average.values_P.tolist() == [3.0, 1.0]  # updates (1, 0) and (3, 0)
    assert average.non_finite_S.tolist() == [0, 0]
    assert average.squared_norm_S.tolist() == [1.0, 9.0]


def test_the_sum_is_in_fp64(impl, device):
    """In fp32 the 1 is lost beside 2**30, and the average is 0."""
    params = torch.tensor([[2.0**30], [1.0], [-(2.0**30)], [0.0]], device=device)
    average = weighted_average(params, torch.ones(4, device=device), impl=impl)
    assert average.values_P.item() == 0.25


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_of_the_exact_average(impl, device, dtype):
    """Exact fractions, rounded to fp32 and from there to the rows' dtype; no entry of these is near
    enough to a tie for fp64 to tell the difference.
    """
    params, weights = normal(7, 300, device=device, dtype=dtype), counts(7, device=device)
    total, exact = int(weights.sum()), []
    for column in params.T.tolist():
        products = zip(weights.tolist(), column, strict=True)
        exact.append(float(sum(Fraction(w) * Fraction(x) for w, x in products) / total))
    expected = torch.tensor(exact, dtype=torch.float64).float().to(dtype)
    assert torch.equal(weighted_average(params, weights, impl=impl).values_P.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_lose_nothing_against_averaging_in_fp32_and_rounding_once(impl, device, dtype):
    params, weights = normal(5, 1500, device=device, dtype=dtype), counts(5, device=device)
    expected = weighted_average(params.float(), weights, impl=impl).values_P.to(dtype)
    assert torch.equal(weighted_average(params, weights, impl=impl).values_P, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("clients", "entries"), SHAPES)
def test_cohorts_of_any_size_give_the_bits_of_all_at_once(impl, device, dtype, clients, entries):
    params = normal(clients, entries, device=device, dtype=dtype)
    start = normal(entries, device=device, dtype=dtype, seed=1)
    weights = counts(clients, device=device)
    whole = weighted_average(params, weights, start, impl=impl)
    assert whole.values_P.dtype == dtype
    plain = weighted_average(params, weights, start, impl="torch")
    assert torch.equal(whole.values_P, plain.values_P), "the two implementations agree"
    alone = weighted_average(params, weights, impl=impl)
    assert torch.equal(alone.values_P, whole.values_P), "a comparison does not change the average"
    for size in {1, 2, 4, clients}:
        average, parts = in_cohorts(size, params, weights, start, impl)
        assert torch.equal(average.values_P, whole.values_P)
        assert torch.equal(average.weight, whole.weight)
        assert torch.equal(torch.cat([p.non_finite_S for p in parts]), whole.non_finite_S)
        assert torch.equal(torch.cat([p.squared_norm_S for p in parts]), whole.squared_norm_S)


def test_weights_that_are_not_integers_agree_between_the_forms(impl, device):
    params = normal(5, 1300, device=device)
    weights = uniform(5).to(device)
    expected = weighted_average(params, weights, impl=impl).values_P
    assert torch.equal(in_cohorts(2, params, weights, None, impl)[0].values_P, expected)
    exact = weights @ params.double() / weights.sum()
    torch.testing.assert_close(expected.double(), exact, rtol=2**-24, atol=1e-15)


def test_uniform_weights_are_the_mean_and_one_client_is_its_row(impl, device):
    params = normal(4, 1100, device=device)
    uniform = weighted_average(params, torch.full((4,), 3, device=device), impl=impl)
    assert torch.equal(uniform.values_P, params.double().mean(0).float())
    alone = weighted_average(params[:1], torch.tensor([7.0], device=device), impl=impl)
    assert torch.equal(alone.values_P, params[0])
    weights = torch.tensor([0.1, 0.2, 0.7], device=device)
    equal = weighted_average(params[:1].expand(3, -1), weights, impl=impl)
    assert torch.equal(equal.values_P, params[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_call_on_a_fresh_shape_and_a_second_give_the_same_bits(impl, device, dtype):
    params, weights = normal(6, 3011, device=device, dtype=dtype), counts(6, device=device)
    first, again = (weighted_average(params, weights, params[0], impl=impl) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first[:4], again[:4], strict=True))


def test_clients_in_ascending_number_give_one_result_whoever_finished_first(impl, device):
    """The caller sorts. In another order of the rows the last bits may differ, so sorting is what
    makes the average repeatable.
    """
    params, weights, results = normal(6, 2000, device=device), uniform(6).to(device), []
    for finished in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 4, 2], [2, 0, 1, 5, 4, 3]):
        arrived = {client: (params[client], weights[client]) for client in finished}
        rows, of_rows = zip(*(arrived[client] for client in sorted(arrived)), strict=True)
        rows, of_rows = torch.stack(rows), torch.stack(of_rows)
        results.append(weighted_average(rows, of_rows, final=False, impl=impl).values_P)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_zero_weight_is_absence_even_of_nan(impl, device):
    params = normal(3, 1030, device=device)
    weights = torch.tensor([1.0, 0.0, 3.0], device=device)
    present = weighted_average(params[[0, 2]], 4 * weights[[0, 2]], impl=impl)
    params[1] = float("nan")
    average = weighted_average(params, weights, params[0], impl=impl)
    assert torch.equal(average.values_P, present.values_P)
    assert average.non_finite_S.tolist() == [0, 1030, 0], "but its entries are counted"


def test_weights_that_sum_to_zero_give_nan(impl, device):
    params, zeros = normal(2, 1030, device=device), torch.zeros(2, device=device)
    average = weighted_average(params, zeros, params[0], impl=impl)
    assert average.values_P.isnan().all() and average.weight == 0
    assert average.squared_norm_S.isfinite().all()
    nothing = weighted_average(params, zeros, final=False, impl=impl)
    ones = torch.ones(2, device=device)
    average = weighted_average(params, ones, None, nothing, impl=impl)
    assert torch.equal(average.values_P, weighted_average(params, ones, impl=impl).values_P)


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparison_against_plain_torch(impl, device, dtype):
    params, weights = normal(5, 2700, device=device, dtype=dtype), counts(5, device=device)
    start = normal(2700, device=device, dtype=dtype, seed=9)
    average = weighted_average(params, weights, start, impl=impl)
    exact = (params.double() - start.double()).square().sum(1)
    torch.testing.assert_close(average.squared_norm_S, exact, rtol=1e-12, atol=0)
    assert average.non_finite_S.dtype == torch.int64 and not average.non_finite_S.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_clients_are_named_and_dropped(impl, device, dtype):
    params, weights = normal(4, 2500, device=device, dtype=dtype), counts(4, device=device)
    params[1, 3], params[1, 1024], params[3, 2499] = float("nan"), float("inf"), -float("inf")
    params[1, 4], params[1, 5] = float("inf"), -float("inf")  # their sum is NaN, not 0
    params[2] = torch.finfo(dtype).max  # large, its fp32 sum overflows, and finite
    average = weighted_average(params, weights, params[0], impl=impl)
    assert average.non_finite_S.tolist() == [0, 4, 0, 1]
    assert average.squared_norm_S.isfinite().tolist() == [True, False, True, False]
    kept = weighted_average(params, weights * (average.non_finite_S == 0), impl=impl)
    expected = weighted_average(params[[0, 2]], weights[[0, 2]], impl=impl)
    assert torch.equal(kept.values_P, expected.values_P)


def test_large_finite_rows_are_averaged(impl, device):
    huge = torch.full((1100,), torch.finfo(torch.float32).max, device=device)
    params, ones = torch.stack([huge, huge, -huge]), torch.ones(3, device=device)
    average = weighted_average(params, ones, torch.zeros_like(huge), impl=impl)
    assert torch.equal(average.values_P, (huge.double() / 3).float())
    assert not average.non_finite_S.any()


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_rows_of_any_alignment_and_stride(impl, device, offset):
    wide, weights = normal(3, 1050, device=device, dtype=torch.bfloat16), counts(3, device=device)
    view = wide[:, offset : offset + 1033]
    expected = weighted_average(view.clone(), weights, impl=impl).values_P
    assert torch.equal(weighted_average(view, weights, impl=impl).values_P, expected)


@needs_triton
@pytest.mark.parametrize(
    ("width", "offset", "expected"),
    [(1048, 0, 16), (1048, 8, 16), (1048, 4, 8), (1048, 1, 2), (1052, 0, 8), (1050, 2, 4)],
)
def test_the_alignment_that_a_launch_promises(device, monkeypatch, width, offset, expected):
    """The interpreter takes any address: on a GPU a promise too large is a fault, one too small is
    slow.
    """

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: promises.append(arguments["ALIGNMENT"])

    promises = []
    monkeypatch.setattr(module, "weighted_average_kernel", Recorder())
    buffer = torch.zeros(3 * width + 8, device=device, dtype=torch.bfloat16)
    start = -buffer.data_ptr() // 2 % 8
    params = buffer[start : start + 3 * width].view(3, width)[:, offset:]
    module.launch(params, torch.ones(3, device=device), None, None, None, True)
    assert promises == [expected]


def test_inputs_that_are_not_contiguous(impl, device):
    params, weights = normal(3, 1200, device=device), counts(3, device=device)
    start = normal(1200, device=device, seed=1)
    first = weighted_average(params, weights, final=False, impl=impl)
    expected = weighted_average(params, weights, start, first, impl=impl)
    strided = [
        tensor.repeat_interleave(2, dim=-1)[..., ::2]
        for tensor in (params, weights, start, first.values_P)
    ]
    earlier = first._replace(values_P=strided[3])
    for matrix in (params.T.contiguous().T, strided[0]):
        average = weighted_average(matrix, strided[1], strided[2], earlier, impl=impl)
        assert torch.equal(average.values_P, expected.values_P)
        norms = (average.squared_norm_S, expected.squared_norm_S)
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)


def test_no_entries(preferred, device):
    params, ones = torch.empty(2, 0, device=device), torch.ones(2, device=device)
    average = weighted_average(params, ones, params[0], impl=preferred)
    assert average.values_P.shape == (0,) and average.weight == 2
    assert average.squared_norm_S.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="impl = 'triton' with no parameters"):
        weighted_average(params, ones, impl="triton")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize(("continued", "final"), [(False, True), (True, True), (True, False)])
def test_the_kernel_stays_inside_its_buffers(
    device, guarded, request, dtype, compared, continued, final
):
    """Inputs lie between NaN, outputs are NaN before the launch: nothing of either is left in the
    results.
    """
    params, weights = normal(3, 1029, device=device, dtype=dtype), counts(3, device=device)
    start = normal(1029, device=device, dtype=dtype, seed=1) if compared else None
    sums = normal(1029, device=device, dtype=torch.float64, seed=2) if continued else None
    weight = torch.tensor(5.0, dtype=torch.float64, device=device) if continued else None
    given = (params, weights.double(), start, sums, weight)
    expected = module.weighted_average_reference(*given, final)
    given = [None if tensor is None else guarded(tensor) for tensor in given]
    outputs = request.getfixturevalue("guarded_outputs")
    values_P, total, non_finite_S, squared_norm_S = module.launch(*given, final)
    assert len(outputs) == 6
    assert torch.equal(values_P, expected[0]) and torch.equal(total, expected[1])
    assert torch.equal(non_finite_S, expected[2])
    torch.testing.assert_close(squared_norm_S, expected[3], rtol=1e-12, atol=0)


def test_float64_rows_are_left_to_torch(device):
    row = normal(40, device=device).double()
    average = weighted_average(row[None], torch.tensor([3.0], device=device))
    assert torch.equal(average.values_P, 3.0 * row / 3.0)


def test_long_rows_on_the_cpu_are_the_whole_row_formula_bitwise():
    """Several chunks and a ragged end: the sum is `sum.add_(row, alpha=weight)` over the whole row,
    entry by entry.
    """
    params, weights = normal(3, 400_003, device="cpu"), [0.1, 0.77, 1 / 3]
    whole = torch.zeros(400_003, dtype=torch.float64)
    for params_P, weight in zip(params, weights, strict=True):
        whole.add_(params_P, alpha=weight)
    weights = torch.tensor(weights, dtype=torch.float64)
    average = weighted_average(params, weights, params[0], impl="torch")
    assert torch.equal(average.values_P, (whole / (0.1 + 0.77 + 1 / 3)).float())
    exact = (params.double() - params[0].double()).square().sum(1)
    torch.testing.assert_close(average.squared_norm_S, exact, rtol=1e-12, atol=0)
    params[1, 399_999] = float("nan")
    average = weighted_average(params, weights, params[0], impl="torch")
    assert average.non_finite_S.tolist() == [0, 1, 0]


def test_the_number_of_threads_does_not_change_the_average():
    params, weights = normal(3, 300_001, device="cpu"), torch.tensor([0.3, 0.3, 0.5])
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 6):
            torch.set_num_threads(number)
            results.append(weighted_average(params, weights, impl="torch").values_P)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def normal(*shape: int, device, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source).to(dtype).to(device)


def uniform(count: int) -> torch.Tensor:
    """Weights that are not integers."""
    source = torch.Generator().manual_seed(4)
    return torch.rand(count, dtype=torch.float64, generator=source)


def counts(*shape: int, device) -> torch.Tensor:
    """Weights as numbers of samples: their products with float32 entries are exact in fp64."""
    source = torch.Generator().manual_seed(1)
    return torch.randint(1, 1000, shape, generator=source).to(device)


def in_cohorts(size, params, weights, start, impl) -> tuple[Average, list[Average]]:
    """The average, `size` clients at a time, and the results of the passes."""
    average, parts = None, []
    for first in range(0, len(params), size):
        cohort, last = slice(first, first + size), first + size >= len(params)
        given = (params[cohort], weights[cohort], start, average)
        average = weighted_average(*given, final=last, impl=impl)
        parts.append(average)
    return average, parts
