"""InfoNCE against closed forms, finite differences, float64 and itself, by both implementations."""

import itertools
import math

import numpy as np
import pytest
import torch
from info_nce_cases import derive, draw, eager, factors_of, inputs

from semanticfl_ref.kernels import info_nce as module
from semanticfl_ref.kernels.dispatch import IMPORT_ERROR
from semanticfl_ref.kernels.info_nce import info_nce

# NumPy's, where the interpreter meets a NaN that a test put there or what a mask leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(IMPORT_ERROR is not None, reason="no Triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # (clients, B, N, D), keys shared by the clients
    "training": ((None, 64, 10, 512), True),
    "ragged": ((2, 70, 37, 100), True),
    "one of each": ((None, 1, 1, 1), True),
    "own keys": ((3, 5, 200, 33), False),
    "257 keys": ((None, 50, 257, 64), True),
    "wide": ((2, 17, 130, 530), True),
    "1000 keys": ((None, 20, 1000, 48), True),
    "1024 keys": ((None, 9, 1024, 20), True),
}


@pytest.mark.parametrize("keys", [1, 2, 10, 200, 257, 1000, 1024, 1025])
def test_equal_keys_give_log_n(keys, preferred, device):
    queries = draw(7, 16, device=device)
    key = draw(1, 16, seed=1, device=device)
    labels = torch.full((7,), keys - 1, device=device)
    loss = info_nce(queries, key.repeat(keys, 1), labels, 0.05, impl=preferred)
    assert loss.item() == pytest.approx(math.log(keys), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.5])
def test_orthonormal_keys_and_aligned_queries(tau):
    unit = torch.eye(8, dtype=torch.float64)
    expected = math.log1p(7 * math.exp(-1 / tau))
    loss = info_nce(unit, unit, torch.arange(8), tau)
    # The logits reach 1 / tau, so their rounding is the floor.
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=2e-14)


def test_orthonormal_pairs_in_both_implementations(impl, device):
    pairs = torch.eye(40, device=device)
    loss = info_nce(pairs, 3 * pairs, torch.arange(40, device=device), 0.5, impl=impl)
    assert loss.item() == pytest.approx(math.log1p(39 * math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("keys_learn", [False, True])
def test_one_key_has_no_loss_and_no_gradient(keys_learn, preferred, device):
    q, k, y = inputs((None, 5, 1, 12), device=device)
    leaves = (q, k) if keys_learn else (q,)
    results = derive(lambda q, k=k: info_nce(q, k, y, 0.1, impl=preferred), *leaves)
    assert not any(result.any() for result in results)


def test_torch_in_float32_is_the_plain_expression_bit_for_bit():
    q, k, y = inputs((None, 64, 10, 512))
    ours = derive(lambda q, k: info_nce(q, k, y, 0.05, impl="torch"), q, k)
    plain = derive(lambda q, k: eager(q, k, y, 0.05), q, k)
    assert all(torch.equal(our, expected) for our, expected in zip(ours, plain, strict=True))


@pytest.mark.parametrize("form", ["one client", "clients", "clients with their own keys"])
def test_reference_by_finite_differences(form):
    G = None if form == "one client" else 2
    q, k, y = inputs((G, 4, 3, 5), torch.float64, shared=form != "clients with their own keys")
    tau = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def loss(q, k, tau):
        return info_nce(q, k, y, tau)

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), k.requires_grad_(), tau))
    torch.testing.assert_close(loss(q, k, tau), eager(q, k, y, 0.7))


def test_scale_of_queries_and_keys_does_not_matter(impl, device):
    q, k, y = inputs((None, 5, 4, 8), device=device)
    scaled = info_nce(1000 * q, 0.01 * k, y, 0.05, impl=impl)
    assert scaled.item() == pytest.approx(info_nce(q, k, y, 0.05, impl=impl).item(), rel=1e-5)


@pytest.mark.parametrize("keys_learn", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 4, 8)])
def test_nothing_in_nothing_out(shape, keys_learn, preferred, device):
    q = torch.zeros(shape, device=device, requires_grad=True)
    k = draw(5, 8, device=device).requires_grad_(keys_learn)
    y = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    loss = info_nce(q, k, y, 0.1, impl=preferred)
    assert loss.shape == shape[:-2] and loss.isnan().all()
    gradients = torch.autograd.grad(loss.sum(), (q, k) if keys_learn else (q,))
    assert all(g.shape == t.shape for g, t in zip(gradients, (q, k), strict=False))


@pytest.mark.parametrize(("keys", "shared"), [(9, True), (70, False)])
def test_a_client_alone_is_the_client_in_a_batch_of_clients(keys, shared, preferred, device):
    q, k, y = inputs((3, 35, keys, 20), device=device, shared=shared)
    k_1 = k if shared else k[1]
    loss, dq = derive(lambda q: info_nce(q, k, y, 0.05, impl=preferred)[1], q)
    alone, dq_alone = derive(lambda q: info_nce(q, k_1, y[1], 0.05, impl=preferred), q[1])
    assert torch.equal(loss, alone) and torch.equal(dq[1], dq_alone)
    assert not dq[[0, 2]].any()
    if not shared:
        *_, dk = derive(lambda q, k: info_nce(q, k, y, 0.05, impl=preferred)[1], q, k)
        *_, dk_alone = derive(lambda q, k: info_nce(q, k, y[1], 0.05, impl=preferred), q[1], k[1])
        assert torch.equal(dk[1], dk_alone)


BAD_SHAPES = [
    ("keys", {"keys": torch.zeros(2, 5)}),
    ("keys", {"keys": torch.zeros(2, 2, 3)}),
    ("keys", {"keys": torch.zeros(0, 3)}),
    ("keys.*int", {"keys": torch.zeros(2, 3, dtype=torch.int32)}),
    ("labels", {"labels": torch.zeros(5, dtype=torch.long)}),
    ("labels.*int32", {"labels": torch.zeros(4, dtype=torch.int32)}),
    ("labels on meta", {"labels": torch.zeros(4, dtype=torch.long, device="meta")}),
    ("temperature = 0.0", {"temperature": 0.0}),
    ("temperature = nan", {"temperature": float("nan")}),
    ("temperature = 1e-50.*1.2e-38 ... 3.4e.38, for torch.float32", {"temperature": 1e-50}),
    ("temperature = 1e.50", {"temperature": 1e50}),
    ("temperature.*2", {"temperature": torch.ones(2)}),
    ("temperature of torch.int64", {"temperature": torch.tensor(1)}),
    ("temperature.* on meta", {"temperature": torch.tensor(1.0, device="meta")}),
    # On a CPU a tensor's value is always checked.
    ("temperature = -1.0", {"temperature": torch.tensor(-1.0)}),
    ("temperature = 0.0", {"temperature": torch.tensor([0.0], requires_grad=True)}),
    ("temperature = nan", {"temperature": torch.tensor(float("nan"))}),
    ("impl = 'cuda'", {"impl": "cuda"}),
]
BAD_VALUES = [
    ("labels from 0 to 2", {"labels": torch.tensor([0, 1, 2, 0])}),
    ("labels from -100", {"labels": torch.tensor([0, 1, -100, 0])}),
    ("temperature = -1.0", {"temperature": torch.tensor(-1.0)}),
]
BAD_TYPES = [
    ("temperature of type str", {"temperature": "0.05"}),
    ("temperature of type NoneType", {"temperature": None}),
    ("temperature of type list", {"temperature": [0.05]}),
    ("queries of type list", {"queries": [[0.0, 0.0, 0.0]] * 4}),
    ("labels of type list", {"labels": [0, 1, 1, 0]}),
]


@pytest.mark.parametrize(("message", "change"), BAD_SHAPES + BAD_VALUES)
def test_bad_input_is_named(message, change):
    good = {"queries": draw(4, 3), "keys": draw(2, 3), "labels": torch.tensor([0, 1, 1, 0])}
    assert info_nce(**good, temperature=0.1).isfinite()
    validate = (message, change) in BAD_VALUES
    with pytest.raises(ValueError, match=message):
        info_nce(**good | change, validate=validate)


@pytest.mark.parametrize(("message", "change"), BAD_TYPES)
def test_an_argument_of_a_wrong_type_is_named(message, change):
    good = {"queries": draw(4, 3), "keys": draw(2, 3), "labels": torch.tensor([0, 1, 1, 0])}
    with pytest.raises(TypeError, match=message):
        info_nce(**good | change)


def test_a_temperature_is_checked_in_the_precision_that_computes():
    q, k, y = inputs((None, 4, 3, 5), torch.float64)
    assert info_nce(q, k, y, 1e-50).isfinite()
    smallest = torch.finfo(torch.float32).tiny
    for tau in (smallest, torch.tensor(smallest), np.float32(smallest), 1):
        assert info_nce(q.float(), k.float(), y, tau).isfinite()


@pytest.mark.parametrize("label", [2, -1, -100])
def test_torch_refuses_an_unchecked_bad_label_on_the_cpu(label):
    with pytest.raises(IndexError):
        info_nce(draw(1, 3), draw(2, 3), torch.tensor([label]))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape, dtype, device):
    size, shared = SHAPES[shape]
    assert_as_exact_as_eager(*inputs(size, dtype, device, shared), 0.05)


@needs_triton
@pytest.mark.parametrize("tau", [0.005, 0.01, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_eager_on_hard_inputs(dtype, tau, device):
    """A query that is its own key, near it, or opposite to it; another key dominates; equal queries
    and equal keys; each at lengths from 0.01 to 100. Many of each, so that no single one decides:
    in float32, where the kernel's error is nearest to eager's, the most.
    """
    clients = 6 if dtype == torch.float32 else 2
    q, k, y = inputs((clients, 96, 21, 48), dtype, device, shared=False)
    k[:, 7] = k[:, 3]
    own, other = (k.gather(1, label[..., None].expand_as(q)) for label in (y, (y + 1) % 21))
    q[:, 0::6], q[:, 1::6], q[:, 2::6] = own[:, 0::6], -own[:, 1::6], other[:, 2::6]
    q[:, 3::6], q[:, 4::6] = own[:, 3::6] + 0.1 * q[:, 3::6], q[:, 5::6]
    lengths = torch.logspace(-2, 2, 4, device=device).to(dtype).repeat_interleave(24)
    assert_as_exact_as_eager(q * lengths[:, None], k, y, tau)


@needs_triton
@pytest.mark.parametrize("keys", [1025, 9])
def test_what_the_kernel_does_not_take_is_left_to_torch(keys, device, monkeypatch):
    """More keys, wider keys, keys that learn, a temperature that is a tensor; and nothing else. By
    name it is an error: who asks for Triton must not get torch.
    """
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    launches, launch = [], module.launch
    monkeypatch.setattr(module, "launch", lambda *given: launches.append(given) or launch(*given))
    q, k, y = inputs((None, 4, keys, 8), device=device)
    tau = torch.tensor(0.1, device=device)

    def check(*leaves):
        ours = derive(lambda q, k=k, tau=0.1: info_nce(q, k, y, tau), *leaves)
        plain = derive(lambda q, k=k, tau=0.1: eager(q, k, y, tau), *leaves)
        for our, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(our, expected, rtol=1e-5, atol=1e-6)

    check(q, k)
    check(q, k, tau)
    wide_q, wide_k, _ = inputs((None, 4, keys, 1025), device=device)
    learning_k = k.clone().requires_grad_()
    for arguments, obstacle in [
        ((q, k, y, tau), "a temperature that is a tensor"),
        ((q, learning_k, y, 0.1), "keys that want a gradient"),
        ((wide_q, wide_k, y, 0.1), "more than 1024 (keys|features)"),
        ((q[:0], k, y[:0], 0.1), "no queries" if keys == 9 else "more than 1024 keys"),
        ((q.double(), k, y, 0.1), "float64 tensors"),
    ]:
        info_nce(*arguments)
        with pytest.raises(ValueError, match=f"impl = 'triton' with {obstacle}"):
            info_nce(*arguments, impl="triton")
    assert not launches
    check(q)
    with torch.no_grad():
        info_nce(q, learning_k, y, 0.1, impl="triton" if keys == 9 else "auto")
    assert len(launches) == (0 if keys == 1025 else 2)


@needs_triton
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_two_dtypes_are_taken_in_the_wider_one(dtypes, device):
    (q, k, y), wider = inputs((None, 9, 7, 20), device=device), torch.promote_types(*dtypes)
    q, k = q.to(dtypes[0]), k.to(dtypes[1])
    ours = kernel_results(q, k, y, 0.1)
    expected = kernel_results(q.to(wider), k.to(wider), y, 0.1)
    assert ours[1].dtype == dtypes[0]
    for our, other in zip(ours, expected, strict=True):
        assert torch.equal(our, other.to(our.dtype))


@needs_triton
def test_strides_do_not_matter(device):
    q, k, y = inputs((3, 11, 13, 24), device=device, shared=False)
    expected = kernel_results(q, k, y, 0.1)
    strided_k = torch.zeros(13, 3, 30, device=device).transpose(0, 1)
    strided_k[:, :, :24] = k
    strided = (q.repeat_interleave(2, 2)[:, :, ::2], strided_k[:, :, :24], y.T.contiguous().T)
    assert not any(tensor.is_contiguous() for tensor in strided)
    loss, dq = module.launch(*strided, 0.1, True)  # `derive` would copy its leaves
    assert torch.equal(loss, expected[0])
    assert torch.equal(dq * factors_of(loss)[:, None, None], expected[1])
    shared = info_nce(q, k[:1].expand(3, 13, 24), y, 0.1, impl="triton")
    assert torch.equal(shared, info_nce(q, k[0], y, 0.1, impl="triton"))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 35, 18, 21), (2, 5, 40, 16)])
def test_guards_stay_and_every_entry_is_written(shape, dtype, guarded, device, request):
    """What is read lies between NaN, what is written too and is NaN before: results without a NaN
    were read and written where they should be.
    """
    q, k, y = inputs(shape, dtype, device)
    expected = module.launch(q, k, y, 0.1, True)
    q, k, y = (guarded(tensor) for tensor in (q, k, y))
    outputs = request.getfixturevalue("guarded_outputs")
    results = module.launch(q, k, y, 0.1, True)
    assert len(outputs) == (3 if shape[1] > 8 else 2)
    for our, other in zip(results, expected, strict=True):
        assert torch.equal(our, other)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_call_on_a_fresh_shape_and_a_second_give_the_same_bits(dtype, device):
    q, k, y = inputs((2, 71, 34, 43), dtype, device)
    first, second = (kernel_results(q, k, y, 0.05) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("keys", [7, 50])
def test_an_unchecked_bad_label_gives_nan_in_its_row_alone(keys, device):
    q, k, y = inputs((None, 20, keys, 9), device=device)
    y[3], y[8], y[9] = keys, -1, 2**40
    loss, dq = module.launch(q, k, y, 0.1, True)
    bad = torch.zeros(20, dtype=torch.bool, device=device)
    bad[[3, 8, 9]] = True
    assert loss.isnan()
    assert torch.equal(dq.isnan().all(1), bad) and torch.equal(dq.isnan().any(1), bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_gives_nan_in_its_row_alone(value, impl, device):
    q, k, y = inputs((None, 20, 40, 9), device=device)
    q[3, 2] = value
    loss, dq = derive(lambda q: info_nce(q, k, y, 0.1, impl=impl), q)
    assert loss.isnan()
    assert dq.isnan().any(1).nonzero().tolist() == [[3]]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_vector_has_a_finite_gradient(dtype, device):
    q, k, y = inputs((None, 6, 5, 8), dtype, device)
    q[2], k[3] = 0, 0
    loss, dq = kernel_results(q, k, y, 0.1)
    exact = derive(lambda q: eager(q, k.double(), y, 0.1), q.double())[1]
    others = [0, 1, 3, 4, 5]
    assert loss.isfinite() and dq[others].isfinite().all()
    torch.testing.assert_close(dq[others].double(), exact[others], rtol=0.02, atol=1e-3)
    if dtype != torch.float16:  # divided by 1e-12, as F.normalize does: out of float16's range
        torch.testing.assert_close(dq[2].double(), exact[2], rtol=0.02, atol=1e9)


@needs_triton
def test_a_vector_shorter_than_the_smallest_norm_is_not_projected(device):
    q, k, y = inputs((None, 3, 5, 8), device=device)
    q[1] *= 1e-13
    exact = derive(lambda q: eager(q, k.double(), y, 0.1), q.double())[1]
    torch.testing.assert_close(
        kernel_results(q, k, y, 0.1)[1].double(), exact, rtol=1e-4, atol=1e-6
    )


def kernel_results(q, k, labels, tau):
    """The kernel's loss and d(query)."""
    return derive(lambda q: info_nce(q, k, labels, tau, impl="triton"), q)


def assert_as_exact_as_eager(q, k, labels, tau):
    """Against float64, the kernel's error is at most 1.5 times that of the eager expression in the
    same dtype in the root mean square, and 3 times at the maximum, or 2 units in the last place of
    the largest entry.
    """
    ours = kernel_results(q, k, labels, tau)
    eagers = derive(lambda q: eager(q, k, labels, tau), q)
    exacts = derive(lambda q: eager(q, k.double(), labels, tau), q.double())
    for name, our, plain, exact in zip(("loss", "d(query)"), ours, eagers, exacts, strict=True):
        assert our.shape == exact.shape and not our.isnan().any(), name
        error, allowed = (our.double() - exact).abs(), (plain.double() - exact).abs()
        floor = 2 * torch.finfo(our.dtype).eps * exact.abs().max()
        rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        said = f"{name}: error {rms:.2e}, at most {error.max():.2e}; eager's {allowed_rms:.2e}, "
        said += f"at most {allowed.max():.2e}; two units in the last place {floor:.2e}"
        assert rms <= max(1.5 * allowed_rms, floor), said
        assert error.max() <= max(3 * allowed.max(), floor), said
