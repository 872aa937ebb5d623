"""GroupNorm and SiLU against numbers a reader redoes on paper, against float64, and against itself
in other batches; by both implementations.
"""

import pytest
import torch
import torch.nn.functional as F

from semanticfl_ref.kernels import group_norm_silu as module
from semanticfl_ref.kernels.dispatch import IMPORT_ERROR
from semanticfl_ref.kernels.group_norm_silu import group_norm_silu, is_channels_last

# NumPy's, where the interpreter meets a NaN that a test put there, or exp(-y) overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(IMPORT_ERROR is not None, reason="no Triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # (B, C, positions), groups
    "one entry": ((1, 1, 1, 1), 1),
    "the VAE's first level": ((1, 128, 13, 20), 32),
    "the U-Net's first level": ((1, 320, 5, 5), 32),
    "60 channels a group": ((1, 240, 2, 3), 4),
    "several chunks, ragged": ((2, 24, 13, 23), 4),
    "a position more than a chunk": ((1, 12, 257), 3),
    "channels are groups": ((2, 5, 9, 3), 5),
    "one group": ((2, 33, 6, 5), 1),
    "wide groups": ((1, 1300, 3, 2), 2),
    "no positions' dimension": ((3, 40), 8),
    "three dimensions of positions": ((2, 6, 3, 2, 5), 3),
}


def test_on_paper(impl, device):
    """Mean 4, variance 5; with eps = 4 the standard deviation is 3."""
    x = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]], device=device)  # [1, 2 channels, 2 positions]
    x = channels_last(x)
    weight, bias = torch.tensor([3.0, 6.0], device=device), torch.tensor([0.0, 1.0], device=device)
    y = group_norm_silu(x, 1, weight, bias, eps=4.0, silu=False, impl=impl)
    torch.testing.assert_close(y.tolist(), [[[-3.0, -1.0], [3.0, 7.0]]], rtol=1e-6, atol=1e-6)
    y = group_norm_silu(x, 2, eps=8.0, silu=False, impl=impl)  # variances 1
    third = 1 / 3
    torch.testing.assert_close(y.tolist(), [[[-third, third]] * 2], rtol=1e-6, atol=1e-6)
    y = group_norm_silu(x, 2, eps=8.0, impl=impl)
    expected = [[[-0.139142, 0.194191]] * 2]  # 1/3 / (1 + exp(-1/3))
    torch.testing.assert_close(y.tolist(), expected, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("value", [0.0, 12345.678])
def test_a_constant_map_gives_the_bias(value, device):
    x = torch.full((2, 18, 24, 12), value, device=device).movedim(-1, 1)
    bias = torch.linspace(-2, 2, 12, device=device)
    y = group_norm_silu(x, 3, None, bias, silu=False, impl="triton")
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape, dtype, device):
    size, groups = SHAPES[shape]
    weight, bias, shift = (normal(size[1], device=device, dtype=dtype, seed=s) for s in (1, 2, 3))
    x = channels_last(normal(*size, device=device, dtype=dtype))
    assert_as_exact_as_eager(x, groups, weight, bias, None, True)
    assert_as_exact_as_eager(x, groups, None, None, shift, False)


@needs_triton
@pytest.mark.parametrize("case", ["mean 1000", "mean -1e5", "outliers", "tiny", "large"])
@pytest.mark.parametrize("positions", [(11, 13), (14, 19)], ids=["one chunk", "chunks"])
def test_as_exact_as_eager_on_hard_inputs(case, positions, device):
    x = normal(2, 24, *positions, device=device)
    if case == "outliers":  # also where a sum would begin
        x[:, ::5, 0, 0], x[:, 1::7, 5, 6] = 1e4, -3e3
    shifts = {"mean 1000": 1e3, "mean -1e5": -1e5}
    x = {"tiny": 1e-3, "large": 1e15}.get(case, 1.0) * x + shifts.get(case, 0.0)
    assert_as_exact_as_eager(channels_last(x), 4, None, None, None, False)


def test_the_textbook_formula_fails_where_the_kernel_does_not(impl, device):
    """E[x^2] - E[x]^2 in float32, at a mean of 4096 and a deviation of 1."""
    x = normal(1, 8, 20, 20, device=device) + 4096
    exact = in_float64(x, 2, silu=False)
    of_groups = x.view(1, 2, -1)
    variance = of_groups.square().mean(2) - of_groups.mean(2).square()
    textbook = (of_groups - of_groups.mean(2, keepdim=True)) / (variance[..., None] + 1e-5).sqrt()
    y = group_norm_silu(channels_last(x), 2, silu=False, impl=impl)
    assert (y - exact).abs().max() < 2e-3
    assert not (textbook.view_as(x) - exact).abs().max() < 0.1  # NaN, if a variance is negative


@needs_triton
@pytest.mark.parametrize("positions", [(5, 6), (13, 20)], ids=["one chunk", "chunks"])
def test_an_image_alone_has_the_bits_that_it_has_in_any_batch(positions, device):
    """Which torch does not promise: on a CPU its SiLU rounds an entry by its place in memory."""
    x = channels_last(normal(3, 132, *positions, device=device, dtype=torch.float16))
    weight, bias = normal(2, 132, device=device, dtype=torch.float16)
    whole = group_norm_silu(x, 4, weight, bias, impl="triton")
    for images in ([2], [1, 0]):
        some = group_norm_silu(channels_last(x[images]), 4, weight, bias, impl="triton")
        assert torch.equal(some, whole[images])


def test_blocks_and_chunks_depend_on_the_shape_of_one_image():
    """Whole groups, and no more chunks than are combined at once."""
    for C, groups in [(128, 32), (320, 32), (2560, 32), (7, 1), (4096, 1), (30, 10)]:
        for dtype, entries in {torch.float32: 1024, torch.float16: 2048}.items():
            sizes = module.block_sizes(C, groups, dtype)
            assert sizes["BLOCK_W"] >= C // groups
            tile = sizes["BLOCK_S"] * sizes["BLOCK_G"] * sizes["BLOCK_W"]
            assert tile == (4096 if C == 4096 and groups == 1 else entries)
    for S in (1, 256, 257, 784, 50_176, 10**6, 2**30):
        assert module.chunk_positions(S) * module.MOST_CHUNKS >= S
    assert module.chunk_positions(256) == 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_call_on_a_fresh_shape_and_a_second_give_the_same_bits(dtype, impl, device):
    x = channels_last(normal(2, 36, 15, 21, device=device, dtype=dtype))
    first, again = (group_norm_silu(x, 6, impl=impl) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("positions", [(3, 5), (13, 20)], ids=["one chunk", "chunks"])
def test_what_is_not_finite_stays_in_its_group_of_its_image(positions, value, impl, device):
    x = normal(3, 15, *positions, device=device)
    clean = group_norm_silu(channels_last(x), 3, impl=impl)
    x[1, 7, 2, 4] = value
    y = group_norm_silu(channels_last(x), 3, impl=impl)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, 5:10] = True
    assert y[bad].isnan().all()
    assert torch.equal(y[~bad], clean[~bad])


def test_far_below_zero_silu_is_zero(impl, device):
    """exp(-y) overflows there."""
    bias = torch.tensor([-60.0, -1e4, 0.0, 60.0], device=device)
    y = group_norm_silu(torch.zeros(1, 4, device=device), 4, None, bias, impl=impl)
    assert y[0, 0].abs() < 1e-20 and y[0, 1:].tolist() == [0.0, 0.0, 60.0]


@pytest.mark.parametrize("positions", [(6, 7), (13, 20)], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "groups"), [(24, 6), (25, 5)])
@needs_triton
def test_guards_stay_and_every_entry_is_written(
    C, groups, dtype, positions, guarded, device, request
):
    """What is read lies between NaN, what is written too and is NaN before."""
    x = normal(2, *positions, C, device=device, dtype=dtype)
    vectors = [normal(C, device=device, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    given = [guarded(tensor) for tensor in (x, *vectors)]
    outputs = request.getfixturevalue("guarded_outputs")
    y = module.launch(given[0].movedim(-1, 1), groups, *given[1:3], 1e-5, given[3], True)
    assert len(outputs) == (2 if positions == (13, 20) else 1)
    assert not any(output.isnan().any() for output in outputs)
    expected = in_float64(x.movedim(-1, 1), groups, *vectors)
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("positions", [(), (6,), (3, 4), (1, 1), (2, 3, 2)])
def test_the_result_has_the_layout_of_the_maps(positions, preferred, device):
    x = normal(2, 8, *positions, device=device)
    y, plain = (group_norm_silu(given, 2, impl=preferred) for given in (channels_last(x), x))
    assert is_channels_last(y) and y.shape == x.shape and plain.is_contiguous()
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)
    sliced = channels_last(normal(2, 16, *positions, device=device))[:, ::2]
    y = group_norm_silu(sliced, 2, impl=preferred)
    torch.testing.assert_close(y, group_norm_silu(channels_last(sliced), 2, impl=preferred))


@pytest.mark.parametrize("step", [1, 2])
def test_weights_of_any_stride(step, impl, device):
    x = channels_last(normal(2, 12, 5, 4, device=device))
    vectors = [normal(12, device=device, seed=seed) for seed in (1, 2, 3)]
    expected = group_norm_silu(x, 3, *vectors[:2], shift_C=vectors[2], impl=impl)
    strided = [vector.repeat_interleave(step)[::step] for vector in vectors]
    y = group_norm_silu(x, 3, *strided[:2], shift_C=strided[2], impl=impl)
    assert torch.equal(y, expected)


@needs_triton
def test_what_the_kernel_does_not_take_is_left_to_torch(device, monkeypatch):
    """And is an error by name: who asks for Triton must not get torch."""
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    launches, launch = [], module.launch
    monkeypatch.setattr(module, "launch", lambda *given: launches.append(given) or launch(*given))
    x = normal(2, 8, 3, 4, device=device)
    wide = normal(1, module.MOST_WIDTH + 1, device=device)
    for given, groups, obstacle in [
        (x, 4, "maps that are not channels-last"),
        (channels_last(x.double()), 4, "float64 tensors"),
        (channels_last(x)[:0], 4, "no entries"),
        (channels_last(x[:, :, :0]), 4, "no entries"),
        (wide, 1, "more than 4096 channels a group"),
    ]:
        y = group_norm_silu(given, groups)
        assert y.shape == given.shape and y.dtype == given.dtype
        torch.testing.assert_close(y.double(), in_float64(given, groups), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=f"impl = 'triton' with {obstacle}"):
            group_norm_silu(given, groups, impl="triton")
    assert not launches
    group_norm_silu(channels_last(x), 4)
    group_norm_silu(wide[:, 1:], 1, impl="triton")
    assert len(launches) == 2


def test_one_value_a_group(impl, device):
    """No variance: the bias is left. torch.nn.functional.group_norm refuses a single image."""
    x, bias = normal(1, 6, device=device), normal(6, device=device, seed=1)
    y = group_norm_silu(x, 6, None, bias, silu=False, impl=impl)
    torch.testing.assert_close(y, bias[None], rtol=1e-3, atol=1e-4)


def test_wrong_arguments_are_named(impl, device):
    x, ones = normal(2, 6, 3, 3, device=device), torch.ones(6, device=device)
    for change, message in [
        ({"x": x[:, 0, 0, 0]}, r"x \(2,\), 3 groups: expected \[B, C, ...\]"),
        ({"groups": 4}, r"x \(2, 6, 3, 3\), 4 groups: .*a multiple"),
        ({"groups": 0}, "0 groups"),
        ({"x": x.int()}, "x of torch.int32"),
        ({"weight_C": ones[:5]}, r"weight \(5,\) torch.float32, x \(2, 6, 3, 3\)"),
        ({"bias_C": ones.double()}, r"bias \(6,\) torch.float64, x .*of x's dtype"),
        ({"shift_C": ones[None]}, r"shift \(1, 6\)"),
        ({"shift_C": ones.to("meta")}, "shift on meta"),
        ({"eps": 0.0}, "eps = 0.0"),
        ({"eps": float("nan")}, "eps = nan"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
        ({"x": x.clone().requires_grad_()}, "x with requires_grad = True"),
        ({"weight_C": ones.clone().requires_grad_()}, "weight with requires_grad = True"),
        ({"shift_C": ones.clone().requires_grad_()}, "shift with requires_grad = True"),
    ]:
        with pytest.raises(ValueError, match=message):
            group_norm_silu(**({"x": channels_last(x), "groups": 3, "impl": impl} | change))
    for change, message in [
        ({"x": [[0.0]]}, "x of type list"),
        ({"bias_C": [0.0] * 6}, "bias of type list"),
        ({"eps": "small"}, "eps of type str"),
    ]:
        with pytest.raises(TypeError, match=message):
            group_norm_silu(**({"x": x, "groups": 3} | change))


def test_what_wants_a_gradient_leaves_no_graph(impl, device):
    x = channels_last(normal(2, 6, 3, 3, device=device)).requires_grad_()
    with torch.no_grad():
        y = group_norm_silu(x, 3, impl=impl)
    assert not y.requires_grad and y.grad_fn is None


def normal(*shape: int, device, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source).to(dtype).to(device)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same maps, a position's channels side by side."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def eager(x, groups, weight=None, bias=None, shift=None, silu=True) -> torch.Tensor:
    """The expression that group_norm_silu equals, in the maps' dtype."""
    if shift is not None:
        x = x + shift.view(-1, *(1 for _ in x.shape[2:]))
    y = torch.group_norm(x.contiguous(), groups, weight, bias)
    return F.silu(y) if silu else y


def in_float64(x, groups, *vectors, silu=True) -> torch.Tensor:
    vectors = [None if vector is None else vector.double() for vector in vectors]
    return eager(x.double(), groups, *vectors, silu=silu)


def assert_as_exact_as_eager(x, groups, weight, bias, shift, silu) -> None:
    """Against float64, the kernel's error is at most 1.5 times that of the eager expression in the
    same dtype in the root mean square, and 3 times at the maximum, or 2 units in the last place of
    the largest entry.
    """
    y = group_norm_silu(x, groups, weight, bias, shift_C=shift, silu=silu, impl="triton")
    assert y.dtype == x.dtype and y.shape == x.shape and is_channels_last(y)
    exact = in_float64(x, groups, weight, bias, shift, silu=silu)
    error = (y.double() - exact).abs()
    allowed = (eager(x, groups, weight, bias, shift, silu).double() - exact).abs()
    floor = 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    said = f"error {rms:.2e}, at most {error.max():.2e}; eager's {allowed_rms:.2e}, at most "
    said += f"{allowed.max():.2e}; two units in the last place {floor:.2e}"
    assert rms <= max(1.5 * allowed_rms, floor), said
    assert error.max() <= max(3 * allowed.max(), floor), said
