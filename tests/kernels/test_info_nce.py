"""InfoNCE against closed forms, finite differences and itself: what it says, for both
implementations.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import derive, draw, eager, inputs

from semanticfl_ref.kernels.info_nce import InfoNCE, info_nce

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # NumPy's, where the interpreter meets a NaN that a test put there


@pytest.mark.parametrize("keys", [1, 2, 10, 200, 300])
def test_equal_keys_give_log_n(keys, impl, device):
    loss = info_nce(
        draw(7, 16, device=device),
        draw(1, 16, seed=1, device=device).repeat(keys, 1),
        torch.zeros(7, dtype=torch.long, device=device),
        0.05,
        impl=impl,
    )
    assert loss.item() == pytest.approx(math.log(keys), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.5])
def test_orthonormal_keys_and_aligned_queries(tau):
    n = 8
    loss = info_nce(
        torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64), torch.arange(n), tau
    )
    assert loss.item() == pytest.approx(
        math.log1p((n - 1) * math.exp(-1 / tau)), rel=1e-9, abs=2e-14
    )  # the logits reach 1 / tau, so their rounding is the floor


@pytest.mark.parametrize("symmetric", [False, True])
def test_orthonormal_pairs_in_both_implementations(symmetric, impl, device):
    pairs = torch.eye(40, device=device)
    assert info_nce(
        pairs, 3 * pairs, temperature=0.5, symmetric=symmetric, impl=impl
    ).item() == pytest.approx(math.log1p(39 * math.exp(-2)), rel=1e-6)


def test_one_key_has_no_loss_and_no_gradient(impl, device):
    query, key, label = inputs((None, 5, 1, 12), device=device)
    assert all(
        not result.any()
        for result in derive(lambda q, k: info_nce(q, k, label, 0.1, impl=impl), query, key)
    )


def test_torch_in_float32_is_the_plain_expression_bit_for_bit():
    q, k, y = inputs((None, 64, 10, 512))
    ours = derive(lambda q, k: info_nce(q, k, y, 0.05, impl="torch"), q, k)
    plain = derive(
        lambda q, k: F.cross_entropy(F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.05, y),
        q,
        k,
    )
    assert all(torch.equal(our, expected) for our, expected in zip(ours, plain, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("form", ["labels", "diagonal", "symmetric", "clients", "clients-own-keys"])
def test_reference_by_finite_differences(form, weighted, normalize, reduction):
    G, N = (2 if "clients" in form else None), (4 if form in ("diagonal", "symmetric") else 3)
    q, k, y = inputs((G, 4, N, 5), torch.float64, shared=form != "clients-own-keys")
    labels = y if form in ("labels", "clients", "clients-own-keys") else None
    weights = (
        torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64).expand(q.shape[:-1])
        if weighted
        else None
    )

    def loss(q, k, tau):
        return info_nce(
            q,
            k,
            labels,
            tau,
            normalize,
            weights=weights,
            reduction=reduction,
            symmetric=form == "symmetric",
        )

    tau = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), k.requires_grad_(), tau))
    if not weighted:
        torch.testing.assert_close(
            loss(q, k, tau),
            eager(q, k, labels, tau, normalize, None, reduction, form == "symmetric"),
        )


def test_scale_of_queries_keys_and_weights_does_not_matter(impl, device):
    q, k, y = inputs((None, 5, 4, 8), device=device)
    w = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.5], device=device)
    scaled = info_nce(1000 * q, 0.01 * k, y, 0.05, weights=8 * w, impl=impl)
    assert scaled.item() == pytest.approx(
        info_nce(q, k, y, 0.05, weights=w, impl=impl).item(), rel=1e-5
    )


def test_reductions_are_sums_of_the_rows(impl, device):
    q, k, y = inputs((2, 70, 9, 20), device=device)
    w = draw(2, 70, seed=3, device=device).abs()
    rows, total, mean = (
        info_nce(q, k, y, 0.1, weights=w, reduction=reduction, impl=impl).double()
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(rows.sum(1), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.sum(1) / w.double().sum(1), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        rows / w, info_nce(q, k, y, 0.1, reduction="none", impl=impl).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("keys_learn", [False, True])
def test_a_row_of_weight_zero_is_absent_whatever_it_holds(keys_learn, impl, device):
    q, k, y = inputs((2, 6, 5, 9), device=device)
    w = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0, 1.0], device=device).expand(2, 6)
    kept = w[0] != 0
    spoiled, wrong = q.clone(), y.clone()
    spoiled[:, ~kept], wrong[:, ~kept] = float("nan"), -5
    given = (spoiled, k) if keys_learn else (spoiled,)

    def loss(q, keys=k):
        return info_nce(q, keys, wrong, 0.1, weights=w, impl=impl)

    total, dq, *dk = derive(loss, *given)
    expected, expected_dq, *expected_dk = derive(
        lambda q, keys=k: info_nce(q, keys, y[:, kept], 0.1, weights=w[:, kept], impl=impl),
        q[:, kept],
        *given[1:],
    )
    assert not dq[:, ~kept].any()
    for our, other in zip(
        (total, dq[:, kept], *dk), (expected, expected_dq, *expected_dk), strict=True
    ):
        torch.testing.assert_close(our, other, rtol=1e-5, atol=1e-7)


def test_a_pair_of_weight_zero_is_no_candidate_of_the_symmetric_loss(impl, device):
    q, k, _ = inputs((None, 6, 6, 9), device=device)
    w = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0, 1.0], device=device)
    kept = w != 0
    spoiled_q, spoiled_k = q.clone(), k.clone()
    spoiled_q[~kept], spoiled_k[~kept] = float("nan"), float("nan")
    ours = derive(
        lambda q, k: info_nce(q, k, temperature=0.1, weights=w, symmetric=True, impl=impl),
        spoiled_q,
        spoiled_k,
    )
    expected = derive(
        lambda q, k: info_nce(q, k, temperature=0.1, weights=w[kept], symmetric=True, impl=impl),
        q[kept],
        k[kept],
    )
    for our, other in zip(ours, expected, strict=True):
        assert our.ndim == 0 or not our[~kept].any()
        torch.testing.assert_close(our if our.ndim == 0 else our[kept], other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keys_learn", [False, True])
def test_nothing_in_nothing_out(keys_learn, impl, device):
    for q, leads in (
        (torch.zeros(0, 8, device=device), ()),
        (torch.zeros(3, 0, 8, device=device), (3,)),
        (torch.zeros(0, 4, 8, device=device), (0,)),
    ):
        k, y = (
            draw(5, 8, device=device).requires_grad_(keys_learn),
            torch.zeros(q.shape[:-1], dtype=torch.long, device=device),
        )
        mean, total = (
            info_nce(q.requires_grad_(), k, y, 0.1, reduction=reduction, impl=impl)
            for reduction in ("mean", "sum")
        )
        assert mean.shape == total.shape == leads and mean.isnan().all() and not total.any()
        assert info_nce(q, k, y, 0.1, reduction="none", impl=impl).shape == q.shape[:-1]
        grads = torch.autograd.grad(total.sum(), (q, k) if keys_learn else (q,))
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, (q, k), strict=False))


def test_a_client_alone_is_the_client_in_a_batch_of_clients(impl, device):
    for N, shared in ((9, True), (300, False)):
        q, k, y = inputs((3, 70, N, 20), device=device, shared=shared)
        loss, dq, *dk = derive(
            lambda q, *keys: info_nce(q, *(keys or (k,)), y, 0.05, impl=impl).unbind()[1],
            q,
            *(() if shared else (k,)),
        )
        alone, dq_alone, *dk_alone = derive(
            lambda q, *keys: info_nce(q, *(keys or (k,)), y[1], 0.05, impl=impl),
            q[1],
            *(() if shared else (k[1],)),
        )
        assert torch.equal(loss, alone) and torch.equal(dq[1], dq_alone) and not dq[[0, 2]].any()
        assert shared or torch.equal(dk[0][1], dk_alone[0])


def test_the_module_passes_its_options_on():
    q, k, _ = inputs((None, 6, 6, 9))
    module = InfoNCE(0.2, learnable=True, symmetric=True, reduction="sum")
    assert torch.equal(
        module(q, k), info_nce(q, k, temperature=torch.tensor(0.2), symmetric=True, reduction="sum")
    )
    assert torch.autograd.grad(module(q, k), module.temperature)[0].item() != 0
    assert [name for name, _ in module.named_parameters()] == ["temperature"] and not list(
        InfoNCE(0.2).parameters()
    )


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("keys", {"keys": torch.zeros(2, 5)}),
        ("keys", {"keys": torch.zeros(2, 2, 3)}),
        ("keys", {"keys": torch.zeros(0, 3)}),
        ("keys", {"labels": None}),
        ("keys.*int", {"keys": torch.zeros(2, 3, dtype=torch.int32)}),
        ("labels", {"labels": torch.zeros(5, dtype=torch.long)}),
        ("labels.*int32", {"labels": torch.zeros(4, dtype=torch.int32)}),
        ("labels from 0 to 2", {"labels": torch.tensor([0, 1, 2, 0])}),
        ("labels from -100", {"labels": torch.tensor([0, 1, -100, 0])}),
        ("temperature = 0.0", {"temperature": 0.0}),
        ("temperature = nan", {"temperature": float("nan")}),
        ("temperature = -1.0", {"temperature": torch.tensor(-1.0)}),
        ("temperature.*2", {"temperature": torch.ones(2)}),
        ("weights", {"weights": torch.ones(3)}),
        ("weights from -1.0", {"weights": torch.tensor([1.0, -1.0, 1.0, 1.0])}),
        ("weights.*finite", {"weights": torch.tensor([1.0, float("inf"), 1.0, 1.0])}),
        ("weights are zero", {"weights": torch.zeros(4)}),
        ("symmetric", {"symmetric": True}),
        ("reduction = 'avg'", {"reduction": "avg"}),
        ("precision = 'fp8'", {"precision": "fp8"}),
        ("impl = 'cuda'", {"impl": "cuda"}),
    ],
)
def test_bad_input_is_named(said, change):
    good = {
        "queries": draw(4, 3),
        "keys": draw(2, 3),
        "labels": torch.tensor([0, 1, 1, 0]),
        "temperature": 0.1,
    }
    assert info_nce(**good).isfinite()
    with pytest.raises(ValueError, match=said):
        info_nce(**good | change)
