"""What the weighted average refuses, and the message that says so."""

import pytest
import torch

from semanticfl_ref.kernels.weighted_average import Average, weighted_average


def test_wrong_shapes_dtypes_and_options_are_named(impl, device):
    params, ones = torch.zeros(2, 3, device=device), torch.ones(2, device=device)
    weight = torch.ones((), dtype=torch.float64, device=device)

    def earlier(values_P, final=False) -> Average:
        return Average(values_P, weight, None, None, final)

    for arguments, options, message in [
        ((params, ones[:1]), {}, r"weights \(1,\).*params \(2, 3\)"),
        ((params, torch.ones(2, 2, device=device)), {}, r"weights \(2, 2\)"),
        ((params[0], ones), {}, r"params \(3,\)"),
        ((params[:0], ones[:0]), {}, "at least one client"),
        ((params.int(), ones), {}, "int32"),
        ((params, ones.to(torch.complex64)), {}, "complex64"),
        ((params, ones, params), {}, r"start \(2, 3\)"),
        ((params, ones, params[0].long()), {}, "start of torch.int64"),
        (
            (params, ones, params[0].half()),
            {},
            "start of torch.float16: expected params' torch.float32",
        ),
        ((params, ones, None, earlier(params[0])), {}, "earlier of .*float32"),
        ((params, ones, None, earlier(params[0].double(), True)), {}, "final = True: a final av"),
        ((params, ones, None, earlier(ones.double())), {}, r"earlier \(2,\)"),
        ((params.clone().requires_grad_(), ones), {}, "params with requires_grad"),
        ((params, ones.clone().requires_grad_()), {}, "weights with requires_grad"),
        ((params, ones, params[0].clone().requires_grad_()), {}, "start with requires_grad"),
        ((params, ones.to("meta")), {}, "weights on meta"),
        ((params, ones, params[0].to("meta")), {}, "start on meta"),
        ((params, ones), {"impl": "cuda"}, "impl = 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            weighted_average(*arguments, **({"impl": impl} | options))


def test_parameters_that_want_a_gradient_leave_no_graph(impl, device):
    params = torch.zeros(2, 3, device=device, requires_grad=True)
    ones = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
    with torch.no_grad():
        average = weighted_average(params, ones, impl=impl)
    assert average.values_P.tolist() == [0.0, 0.0, 0.0]
    assert not average.values_P.requires_grad and not average.weight.requires_grad


def test_a_final_float64_average_is_not_continued(device):
    """Its dtype is that of a running sum."""
    params, ones = torch.full((2, 4), 2.0, dtype=torch.float64, device=device), torch.ones(2)
    average = weighted_average(params, ones.to(device))
    with pytest.raises(ValueError, match="a final average cannot be continued"):
        weighted_average(params, ones.to(device), None, average)


def test_an_argument_that_is_no_tensor_is_named():
    params, ones = torch.zeros(2, 3), torch.ones(2)
    for arguments, message in [
        ((params, [1.0, 1.0]), "weights of type list: expected a tensor"),
        (([[0.0]], ones), "params of type list"),
        ((params, ones, [0.0, 0.0, 0.0]), "start of type list"),
    ]:
        with pytest.raises(TypeError, match=message):
            weighted_average(*arguments)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([-1.0, 2.0], r"weights\[0\] = -1.0"),
        ([1.0, float("nan")], r"weights\[1\] = nan"),
        ([0.0, float("inf")], "inf"),
        ([0.0, 0.0], "weights sum to 0"),
    ],
)
def test_wrong_values_are_named_on_request(impl, device, weights, message):
    params, weights = torch.zeros(2, 3, device=device), torch.tensor(weights, device=device)
    with pytest.raises(ValueError, match=message):
        weighted_average(params, weights, validate=True, impl=impl)
    ones = torch.ones(2, device=device)
    earlier = weighted_average(params, ones, final=False, validate=True, impl=impl)
    zeros = torch.zeros(2, device=device)
    weighted_average(params, zeros, None, earlier, validate=True, impl=impl)
