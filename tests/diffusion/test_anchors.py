"""PCA against closed forms, the controls' promises, and the probe."""

import pytest
import torch

from semanticfl_ref.diffusion.anchors import linear_probe, make_anchors, pca
from semanticfl_ref.diffusion.bank import FeatureBank
from semanticfl_ref.errors import UserError

N, CLASSES = 120, 5
LABELS = torch.arange(N) % CLASSES


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank():
    means = draw(CLASSES, 30, seed=1) * 2
    features = {"mid": (means[LABELS] + draw(N, 30)).half(), "up.0": (draw(N, 20, seed=2) * 100 + 7).half()}
    meta = {"source": "tiny", "condition": "null", "taps": list(features), "timestep": 50, "pool": 1, "prompt": "a {}", "dataset_sha256": "d"}
    return FeatureBank(features, draw(CLASSES, 16, seed=3), "bank-id", meta)


def make(bank, **options):
    return make_anchors(bank, LABELS, **({"width": 12, "classes": CLASSES} | options))


def test_pca_closed_form():
    """Points on the axes (3, 4)/5 and (-4, 3)/5 with variances 4 and 1: these are the components."""
    long, short = torch.tensor([3.0, 4.0]) / 5, torch.tensor([-4.0, 3.0]) / 5
    points = torch.stack([2 * long, -2 * long, short, -short]).double() + 10
    mean, directions, variances = pca(points, 2)
    torch.testing.assert_close(mean, torch.tensor([10.0, 10.0]).double())
    torch.testing.assert_close(variances, torch.tensor([8.0, 2.0]).double() / 3)
    torch.testing.assert_close(directions, torch.tensor([[0.6, 0.8], [0.8, -0.6]]).double())  # the larger entry is positive in both


def test_pca_sign_and_value_do_not_depend_on_the_images_order(bank):
    values = bank.features["mid"].double()
    first, second = pca(values, 8), pca(values.flip(0), 8)
    torch.testing.assert_close(first[1], second[1])
    assert (first[1].gather(0, first[1].abs().argmax(0, keepdim=True)) > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(pca(values, 8), first, strict=True))


def test_anchors_are_whitened_levels_side_by_side(bank):
    anchors = make(bank, width=13)
    assert anchors.visual.shape == (N, 13) and anchors.visual.dtype == torch.float32
    covariance = anchors.visual.T.cov()
    torch.testing.assert_close(covariance[:7, :7], torch.eye(7), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance[7:, 7:], torch.eye(6), rtol=1e-4, atol=1e-4)
    assert anchors.provenance["widths"] == [7, 6] and anchors.provenance["bank"] == "bank-id"
    assert anchors.provenance["images"] == "train" and anchors.provenance["source"] == "tiny" and anchors.provenance["condition"] == "null"
    total = torch.linalg.eigvalsh(bank.features["mid"].double().T.cov()).flip(0)
    assert anchors.provenance["explained_variance"]["mid"] == pytest.approx(float(total[:7].sum() / total.sum()), abs=1e-5)
    assert torch.equal(anchors.text, bank.text)


def test_without_whitening_levels_keep_their_shape_but_not_their_scale(bank):
    visual = make(bank, whiten=False).visual
    variances = visual.var(0)
    assert variances[:6].mean() == pytest.approx(1, rel=1e-4) and variances[6:].mean() == pytest.approx(1, rel=1e-4)
    assert variances[0] > 2 * variances[5]


def test_aggregation_by_widths(bank):
    assert make(bank, aggregation="8-4").provenance["widths"] == [8, 4]
    for wrong in ("8-5", "12", "8-4-0", "paper"):
        with pytest.raises(UserError, match="aggregation"):
            make(bank, aggregation=wrong)


def test_a_width_that_the_levels_cannot_give_is_refused(bank):
    with pytest.raises(UserError, match=r"tap up\.0 gives 20 components of 120 images, 30 were asked"):
        make(bank, width=60)
    with pytest.raises(UserError, match="below one component"):
        make(bank, width=1)
    constant = FeatureBank({"mid": torch.ones(N, 30).half()}, bank.text, "id", {})
    with pytest.raises(UserError, match="gives 0 components"):
        make(constant)


def test_class_anchors_are_the_classes_means(bank):
    each, means = make(bank), make(bank, per="class")
    assert means.visual.shape == (CLASSES, 12)
    for label in range(CLASSES):
        torch.testing.assert_close(means.visual[label], each.visual[LABELS == label].mean(0))
    with pytest.raises(UserError, match="class 5 has no image"):
        make(bank, per="class", classes=6)


def test_visual_for(bank):
    labels, indices = torch.tensor([1, 0, 4]), torch.tensor([11, 5, 119])
    assert torch.equal(make(bank).visual_for(labels, indices), make(bank).visual[indices])
    assert torch.equal(make(bank, per="class").visual_for(labels, indices), make(bank, per="class").visual[labels])


@pytest.mark.parametrize("per", ["image", "class"])
@pytest.mark.parametrize("control", ["shuffled", "permuted", "random", "onehot"])
def test_controls_keep_shapes_and_lengths_and_are_seeded(bank, control, per):
    true, other = make(bank, per=per), make(bank, per=per, control=control)
    assert other.visual.shape == true.visual.shape and other.text.shape == true.text.shape and other.visual.dtype == torch.float32
    lengths = [anchors.visual.norm(dim=1).sort().values for anchors in (true, other)]
    torch.testing.assert_close(*lengths)
    torch.testing.assert_close(true.text.norm(dim=1).sort().values, other.text.norm(dim=1).sort().values)
    assert not torch.allclose(true.visual, other.visual)
    again = make(bank, per=per, control=control)
    assert torch.equal(again.visual, other.visual) and torch.equal(again.text, other.text)
    assert not torch.equal(make(bank, per=per, control=control, seed=1).visual, other.visual)
    assert other.provenance["control"] == control


def rows_of(part, whole):
    """For every row of `part` the number of the equal row of `whole`."""
    return (part[:, None] == whole[None]).all(2).int().argmax(1)


def test_shuffled_gives_every_image_another_images_anchor_once(bank):
    true, shuffled = make(bank), make(bank, control="shuffled")
    taken = rows_of(shuffled.visual, true.visual)
    assert torch.equal(taken.sort().values, torch.arange(N)) and (taken != torch.arange(N)).all()
    assert torch.equal(shuffled.text, true.text)


def test_permuted_moves_whole_classes_and_their_text_together(bank):
    true, permuted = make(bank), make(bank, control="permuted")
    taken = rows_of(permuted.visual, true.visual)
    assert torch.equal(taken.sort().values, torch.arange(N))  # equal classes: each anchor once
    other = rows_of(permuted.text, true.text)
    assert (other != torch.arange(CLASSES)).all() and torch.equal(LABELS[taken], other[LABELS])
    by_class = make(bank, per="class", control="permuted")
    assert torch.equal(by_class.visual, make(bank, per="class").visual[other])


def test_permuted_with_unequal_and_absent_classes(bank):
    labels = torch.where(torch.arange(N) < 100, 0, torch.arange(N) % 2 + 1)
    true = make_anchors(bank, labels, width=12, classes=CLASSES)
    permuted = make_anchors(bank, labels, width=12, classes=CLASSES, control="permuted")
    taken = labels[rows_of(permuted.visual, true.visual)]
    assert (taken != labels).all() and all(len(taken[labels == label].unique()) == 1 for label in range(3))
    with pytest.raises(UserError, match="two classes"):
        make_anchors(bank, torch.zeros(N, dtype=torch.long), width=12, classes=CLASSES, control="permuted")


def test_onehot_tells_the_label_and_nothing_else(bank):
    anchors = make(bank, control="onehot")
    unit = torch.nn.functional.normalize(anchors.visual, dim=1)
    expected = (LABELS[:, None] == LABELS[None]).float()
    torch.testing.assert_close(unit @ unit.T, expected, rtol=1e-5, atol=1e-5)


def test_unknown_names(bank):
    with pytest.raises(UserError, match="unknown control 'shufled'; did you mean 'shuffled'"):
        make(bank, control="shufled")
    with pytest.raises(UserError, match="unknown granularity of anchors 'img'"):
        make(bank, per="img")


def test_probe_reads_what_is_there_and_nothing_else():
    labels, test_labels = torch.arange(400) % 4, torch.arange(200) % 4
    means = draw(4, 10, seed=4) * 3
    there = linear_probe((means[labels] + draw(400, 10)) * 1e4, labels, (means[test_labels] + draw(200, 10, seed=5)) * 1e4, test_labels)
    absent = linear_probe(draw(400, 10), labels, draw(200, 10, seed=5), test_labels)
    assert there > 0.97 and absent < 0.4
