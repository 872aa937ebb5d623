"""InfoNCE against closed forms, fp64 and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from semanticfl_ref.kernels.info_nce import info_nce


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("keys", [2, 10, 200])
def test_equal_keys_give_log_n(keys):
    loss = info_nce(draw(7, 16), draw(1, 16, seed=1).repeat(keys, 1), torch.zeros(7, dtype=torch.long), 0.05)
    assert loss.item() == pytest.approx(math.log(keys), rel=1e-6)


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.5])
def test_orthonormal_keys_and_aligned_queries(tau):
    n = 8
    loss = info_nce(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64), torch.arange(n), tau)
    assert loss.item() == pytest.approx(math.log1p((n - 1) * math.exp(-1 / tau)), rel=1e-9, abs=2e-14)  # the logits reach 1 / tau, so their rounding is the floor


@pytest.mark.parametrize("tau", [0.005, 0.05, 1.0])
@pytest.mark.parametrize("shape", [(64, 10, 512), (3, 7, 5), (1, 1, 1)])
def test_fp32_against_fp64(shape, tau):
    b, n, d = shape
    q, k, y = draw(b, d), draw(n, d, seed=1), torch.arange(b) % n
    exact = F.cross_entropy(F.normalize(q.double()) @ F.normalize(k.double()).T / tau, y)
    assert info_nce(q, k, y, tau).item() == pytest.approx(exact.item(), rel=2e-5, abs=2e-5)


def test_gradient_by_finite_differences():
    q, k = draw(4, 6, dtype=torch.float64).requires_grad_(), draw(3, 6, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, torch.tensor([0, 2, 1, 0]), 0.2), (q, k))


def test_scale_of_queries_and_keys_does_not_matter():
    q, k, y = draw(5, 8), draw(4, 8, seed=1), torch.tensor([0, 1, 2, 3, 0])
    assert info_nce(1000 * q, 0.01 * k, y, 0.05).item() == pytest.approx(info_nce(q, k, y, 0.05).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("queries", "keys", "labels", "tau", "said"),
    [((4, 3), (2, 5), 4, 0.1, "keys"), ((4, 3), (2, 3), 5, 0.1, "labels"), ((4, 3), (2, 3), 4, 0.0, "temperature"), ((4, 3), (2, 3), 4, -1.0, "temperature")],
)
def test_bad_input_is_named(queries, keys, labels, tau, said):
    with pytest.raises(ValueError, match=said):
        info_nce(draw(*queries), draw(*keys), torch.zeros(labels, dtype=torch.long), tau)
