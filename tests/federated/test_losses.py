"""Each term against a closed form or a slow reading of its equation."""

import math

import pytest
import torch

from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.losses import consistency, contrast


def gaussian(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["kl-unit", "kl-raw", "cosine"])
def test_zero_if_features_equal_anchors(kind):
    f = gaussian(4, 9)
    assert consistency(f, f.clone(), kind, 0.1).item() == pytest.approx(0, abs=1e-12)


def test_cosine_of_opposite_and_orthogonal_vectors():
    f = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert consistency(f, -f, "cosine").item() == pytest.approx(2)
    assert consistency(f, f.flip(1), "cosine").item() == pytest.approx(1)


def softmax(values, temperature):
    exponentials = [math.exp(v / temperature) for v in values.tolist()]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("kind", ["kl-unit", "kl-raw"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_kl_by_its_sum(kind, temperature):
    f, a = gaussian(3, 5), gaussian(3, 5, seed=1)
    expected = 0.0
    for f_b, a_b in zip(f, a, strict=True):
        if kind == "kl-unit":
            f_b, a_b = f_b / f_b.norm(), a_b / a_b.norm()
        q, p = softmax(f_b, temperature), softmax(a_b, temperature)
        expected += sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q, strict=True)) / 3
    plain = consistency(f, a, kind, temperature).item()
    squared = consistency(f, a, kind, temperature, squared=True).item()
    assert plain == pytest.approx(expected, rel=1e-9)
    assert squared == pytest.approx(expected * temperature**2, rel=1e-9)


def test_the_literal_form_is_negligible():
    """Why the paper's KL needs a temperature: between random unit vectors of 512 entries it is
    0.002 nats."""
    value = consistency(gaussian(256, 512), gaussian(256, 512, seed=1), "kl-unit", 1.0)
    assert value.item() == pytest.approx(0.002, rel=0.05)


def test_an_unknown_form_is_refused():
    with pytest.raises(UserError, match="consistency"):
        consistency(gaussian(2, 2), gaussian(2, 2), "kl")


def test_contrast_with_keys_per_image_by_its_sum():
    """With the same keys for every image it is that with class keys, and so is its gradient."""
    f, keys, labels = gaussian(4, 6).requires_grad_(), gaussian(4, 3, 6), torch.tensor([0, 2, 1, 1])
    expected = 0.0
    for f_b, keys_b, label in zip(f.detach(), keys, labels.tolist(), strict=True):
        cosines = [float(f_b @ k / (f_b.norm() * k.norm())) for k in keys_b]
        expected -= math.log(softmax(torch.tensor(cosines, dtype=torch.float64), 0.3)[label]) / 4
    assert contrast(f, keys, labels, 0.3).item() == pytest.approx(expected, rel=1e-9)
    gradients = []
    for text in (keys[0], keys[:1].expand(4, 3, 6)):
        value = contrast(f, text, labels, 0.3)
        gradients.append(torch.autograd.grad(value, f)[0])
    torch.testing.assert_close(*gradients)


def test_contrast_prefers_the_own_class():
    text = torch.eye(3, dtype=torch.float64)
    right = contrast(text, text, torch.arange(3), 0.05)
    wrong = contrast(text, text, torch.tensor([1, 2, 0]), 0.05)
    assert right.item() < 1e-7
    assert wrong.item() == pytest.approx(20, rel=1e-6)
