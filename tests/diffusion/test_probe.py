"""The probe's numbers against closed forms and against features that hold nothing."""

import pytest
import torch

from semanticfl_ref.diffusion.probe import (
    describe_layer,
    effective_rank,
    linear_probe,
    nearest_neighbours,
    standardised,
    text_alignment,
)

LABELS, TEST_LABELS = torch.arange(400) % 4, torch.arange(200) % 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def informed():
    """Features around one mean per class, at a scale that no number may depend on."""
    means = draw(4, 10, seed=4) * 3
    train, test = means[LABELS] + draw(400, 10), means[TEST_LABELS] + draw(200, 10, seed=5)
    return train * 1e4, test * 1e4


def test_readers_read_what_is_there_and_nothing_else(informed):
    blind = draw(400, 10), draw(200, 10, seed=5)
    for features, low, high in ((informed, 0.97, 1), (blind, 0.1, 0.4)):
        train, test = standardised(*features)
        assert low <= linear_probe(train, LABELS, test, TEST_LABELS) <= high
        assert low <= nearest_neighbours(train, LABELS, test, TEST_LABELS) <= high


def test_standardised_by_the_first_set_alone(informed):
    train, test = standardised(*informed)
    torch.testing.assert_close(train.mean(0), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std(0), torch.ones(10), atol=1e-4, rtol=0)
    assert test.mean(0).abs().max() > 1e-3
    assert standardised(torch.ones(5, 2), torch.ones(3, 2))[0].isfinite().all()


def test_nearest_by_majority_then_by_cosine():
    known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels, truth = torch.tensor([0, 0, 1]), torch.tensor([0, 0])
    asked = torch.tensor([[1.0, 0.2], [0.1, 1.0]])
    assert nearest_neighbours(known, labels, asked, truth) == 1.0, "two against one"
    labels, truth = torch.tensor([0, 1]), torch.tensor([0, 1])
    asked = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    assert nearest_neighbours(known[[0, 2]], labels, asked, truth) == 1.0, (
        "a tie goes to the nearer"
    )


@pytest.mark.parametrize("shape", [(200, 8), (8, 200)])
def test_effective_rank_closed_forms(shape):
    """r orthogonal directions of equal variance count r; a single one counts 1; scale and shift do
    not matter.
    """
    directions = torch.linalg.qr(draw(max(shape), min(shape)))[0]
    points = directions if shape[0] > shape[1] else directions.T
    points = torch.cat([points, -points])
    assert effective_rank(points * 100 + 7) == pytest.approx(8, rel=1e-3)
    assert effective_rank(torch.outer(draw(50), draw(9))) == pytest.approx(1, abs=1e-3)


def test_text_alignment_closed_forms():
    """Features that are a turned, scaled, shifted copy of the class texts align fully; mirrored
    cosines align negatively; unrelated ones hardly.
    """
    text = draw(10, 40, seed=1)
    labels = torch.arange(100) % 10
    turn = torch.linalg.qr(draw(40, 40, seed=2))[0]
    assert text_alignment((text @ turn * 3 + 5)[labels], labels, text) == pytest.approx(1, abs=1e-5)
    chance = [text_alignment(draw(10, 4000, seed=10 + i)[labels], labels, text) for i in range(20)]
    assert abs(sum(chance) / 20) < 0.15 and max(map(abs, chance)) < 0.6, (
        "wide features of few classes do not align by their width"
    )
    assert text_alignment(text[labels][:2], labels[:2], text) is None


def test_a_layers_numbers(informed):
    train, test = informed
    numbers = describe_layer(train, LABELS, test, TEST_LABELS, 4, draw(4, 6))
    assert numbers["fisher_ratio"] > 1 and numbers["linear_probe"] > 0.97
    assert set(numbers) == {
        "linear_probe",
        "nearest",
        "fisher_ratio",
        "effective_rank",
        "text_alignment",
    }
    without_text = describe_layer(train, LABELS, test, TEST_LABELS, 4, None)
    assert without_text["text_alignment"] is None
