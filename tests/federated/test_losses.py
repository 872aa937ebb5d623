"""Each term against a closed form or a slow reading of its equation."""

import math

import pytest
import torch

from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.losses import consistency, contrast


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["kl-unit", "kl-raw", "cosine"])
def test_zero_when_features_equal_anchors(kind):
    f = draw(4, 9)
    assert consistency(f, f.clone(), kind, 0.1).item() == pytest.approx(0, abs=1e-12)


def test_cosine_of_opposite_and_orthogonal_vectors():
    f = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert consistency(f, -f, "cosine").item() == pytest.approx(2)
    assert consistency(f, f.flip(1), "cosine").item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["kl-unit", "kl-raw"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_kl_by_its_sum(kind, temperature):
    f, a = draw(3, 5), draw(3, 5, seed=1)
    expected = 0.0
    for fb, ab in zip(f, a, strict=True):
        fb, ab = (fb / fb.norm(), ab / ab.norm()) if kind == "kl-unit" else (fb, ab)
        q, p = (
            [math.exp(v / temperature) for v in fb.tolist()],
            [math.exp(v / temperature) for v in ab.tolist()],
        )
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        expected += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / 3
    assert consistency(f, a, kind, temperature).item() == pytest.approx(expected, rel=1e-9)
    assert consistency(f, a, kind, temperature, squared=True).item() == pytest.approx(
        expected * temperature**2, rel=1e-9
    )


def test_the_literal_reading_is_inert():
    """Why the paper's KL needs a temperature: between random unit vectors of 512 entries it is
    0.002 nats.
    """
    assert consistency(
        draw(256, 512), draw(256, 512, seed=1), "kl-unit", 1.0
    ).item() == pytest.approx(0.002, rel=0.05)


def test_unknown_reading_is_refused():
    with pytest.raises(UserError, match="consistency"):
        consistency(draw(2, 2), draw(2, 2), "kl")


def test_contrast_prefers_the_own_class():
    text = torch.eye(3, dtype=torch.float64)
    right, wrong = (
        contrast(text, text, torch.arange(3), 0.05),
        contrast(text, text, torch.tensor([1, 2, 0]), 0.05),
    )
    assert right.item() < 1e-7 and wrong.item() == pytest.approx(20, rel=1e-6)
