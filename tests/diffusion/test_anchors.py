"""PCA against closed forms, levels side by side, and the controls' promises."""

from dataclasses import replace

import pytest
import torch
from cache_files import cache_of

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import AnchorsSettings
from semanticfl_ref.diffusion.anchors import fisher_ratio, layer_widths, make_anchors, pca
from semanticfl_ref.diffusion.controls import apply_control
from semanticfl_ref.errors import UserError

N, CLASSES = 120, 5
LABELS = torch.arange(N) % CLASSES


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache():
    means = draw(CLASSES, 30, seed=1) * 2
    features = {
        "mid": (means[LABELS] + draw(N, 30)).half(),
        "up.0": (draw(N, 20, seed=2) * 100 + 7).half(),
    }
    meta = {
        "source": "tiny",
        "condition": "null",
        "layers": list(features),
        "timestep": 50,
        "pool": 1,
        "prompt": "a {}",
        "dataset_sha256": "d",
        "images": N,
    }
    return cache_of(features, draw(CLASSES, 16, seed=3), LABELS, "cache-id", meta)


def make(cache, *, labels=LABELS, text_source=None, seed=0, **options):
    return make_anchors(
        replace(cache, labels=labels),
        AnchorsSettings(**{"width": 12, "aggregation": "equal", **options}),
        classes=CLASSES,
        seed=seed,
        text_source=text_source,
    )


def test_pca_closed_form():
    """Points on the axes (3, 4)/5 and (-4, 3)/5 with variances 4 and 1 have these components."""
    long, short = torch.tensor([3.0, 4.0]) / 5, torch.tensor([-4.0, 3.0]) / 5
    points = torch.stack([2 * long, -2 * long, short, -short]).double() + 10
    mean, directions, variances = pca(lambda: [points], 2)
    torch.testing.assert_close(mean, torch.tensor([10.0, 10.0]).double())
    torch.testing.assert_close(variances, torch.tensor([8.0, 2.0]).double() / 3)
    expected = torch.tensor([[0.6, 0.8], [0.8, -0.6]])  # the larger entry is positive in both
    torch.testing.assert_close(directions, expected.double())


def test_pca_sign_and_value_do_not_depend_on_the_images_order(cache):
    values = cache.read("mid").double()
    first, second = pca(lambda: [values], 8), pca(lambda: [values.flip(0)], 8)
    torch.testing.assert_close(first[1], second[1])
    assert (first[1].gather(0, first[1].abs().argmax(0, keepdim=True)) > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(pca(lambda: [values], 8), first, strict=True))


def test_pca_in_pieces_is_pca_of_the_whole(cache):
    """Also far from zero, where the sum of squares minus the squared mean would have nothing left
    in fp32.
    """
    values = cache.read("up.0").float() + 1e4
    whole, pieces = pca(lambda: [values], 6), pca(lambda: values.split(7), 6)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    expected = torch.linalg.eigvalsh(values.double().T.cov()).flip(0)
    torch.testing.assert_close(whole[2], expected, rtol=1e-9, atol=1e-9)


def test_fisher_ratio_closed_form():
    """Classes at 0 and 4, two points each at distance 1 from their mean: between 4 * 2^2, within 4
    * 1.
    """
    values = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
    assert fisher_ratio(values, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx(4.0)
    assert fisher_ratio(values, torch.tensor([0, 0, 2, 2]), 5) == pytest.approx(4.0), (
        "classes without images do not count"
    )
    assert fisher_ratio(values * 7 + 3, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx(4.0)


def test_separability_lengthens_the_level_that_tells_classes_apart(cache):
    """`mid` holds the classes, `up.0` is noise: their mean squared lengths stand as their Fisher
    ratios do, and sum to the width.
    """
    equal, weighted = make(cache), make(cache, aggregation="separability")
    strengths = weighted.provenance["layer_strengths"]
    mid, up = (fisher_ratio(part, LABELS, CLASSES) for part in equal.visual.split(6, dim=1))
    assert strengths["mid"] / strengths["up.0"] == pytest.approx(mid / up, rel=1e-3)
    assert mid > 5 * up
    assert sum(strengths.values()) == pytest.approx(2, abs=1e-5)
    assert equal.provenance["layer_strengths"] is None
    torch.testing.assert_close(
        weighted.visual[:, :6], equal.visual[:, :6] * strengths["mid"] ** 0.5
    )
    torch.testing.assert_close(
        weighted.visual[:, 6:], equal.visual[:, 6:] * strengths["up.0"] ** 0.5
    )


def own_class_source(cache, labels=LABELS[:25], **meta):
    """The first 25 images under their own class's caption, with other features."""
    features = {layer: cache.read(layer)[:25] * 2 + 1 for layer in cache.widths}
    meta = {**cache.meta, "condition": "own-class", **meta}
    return cache_of(features, cache.text, labels, "text-id", meta)


@pytest.mark.parametrize("aggregation", ["equal", "separability"])
def test_texts_from_the_unet_lie_in_the_visual_anchors_space(cache, aggregation):
    """A cache with the visual cache's features gives the class means of the visual anchors."""
    features = {layer: cache.read(layer) for layer in cache.widths}
    meta = {**cache.meta, "condition": "own-class"}
    copy = cache_of(features, cache.text, LABELS, "text-id", meta)
    anchors = make(cache, text_source=copy, text="unet", aggregation=aggregation)
    assert anchors.text.shape == (CLASSES, 12)
    assert anchors.provenance["text"] == "unet" and anchors.provenance["text_cache"] == "text-id"
    torch.testing.assert_close(
        anchors.text, make(cache, per="class", aggregation=aggregation).visual
    )
    other = make(cache, text_source=own_class_source(cache))
    assert torch.equal(other.visual, make(cache).visual)
    assert not torch.allclose(other.text, anchors.text)
    assert make(cache).provenance["text"] == "clip"


def every_class_source(cache):
    """Each image under every class's caption: its features plus what the caption adds."""
    features = {
        layer: (cache.read(layer)[:, None] + draw(CLASSES, width, seed=5)).flatten(0, 1).half()
        for layer, width in cache.widths.items()
    }
    meta = {**cache.meta, "condition": "every-class"}
    return cache_of(features, cache.text, LABELS, "text-id", meta)


def test_texts_per_image_are_mapped_like_the_visual_anchors(cache):
    """Row c of an image is the anchor of its features under class c's caption."""
    source = every_class_source(cache)
    anchors = make(cache, text_source=source, text="unet")
    assert anchors.text.shape == (N, CLASSES, 12)
    # Affine maps: what a caption adds moves all images' anchors alike.
    added = anchors.text - anchors.visual[:, None]
    torch.testing.assert_close(added, added[:1].expand_as(added), rtol=1e-2, atol=1e-2)
    indices = torch.tensor([11, 5, 119])
    assert torch.equal(anchors.text_for(indices), anchors.text[indices])
    assert torch.equal(make(cache).text_for(indices), cache.text)


@pytest.mark.parametrize("per", ["image", "class"])
@pytest.mark.parametrize("control", ["shuffled", "permuted", "random", "onehot"])
def test_controls_of_texts_per_image(cache, control, per):
    options = {"text_source": every_class_source(cache), "text": "unet", "per": per}
    true, other = make(cache, **options), make(cache, control=control, **options)
    assert other.text.shape == true.text.shape
    assert not torch.allclose(other.text, true.text)
    lengths = [anchors.text.norm(dim=2).flatten().sort().values for anchors in (true, other)]
    torch.testing.assert_close(*lengths)
    assert torch.equal(make(cache, control=control, **options).text, other.text)
    if control == "onehot":
        unit = torch.nn.functional.normalize(other.text, dim=2)
        expected = torch.eye(CLASSES).expand(N, CLASSES, CLASSES)
        torch.testing.assert_close(unit @ unit.mT, expected, rtol=1e-5, atol=1e-5)
    if control == "shuffled":
        taken = rows_of(other.text.flatten(1), true.text.flatten(1))
        assert (taken != torch.arange(N)).all()
        assert torch.equal(taken.sort().values, torch.arange(N))
    if control == "permuted":
        classes = rows_of(make(cache, control=control).text, cache.text)
        taken = rows_of(other.text.flatten(1), true.text[:, classes].flatten(1))
        assert torch.equal(LABELS[taken], classes[LABELS])
        assert torch.equal(other.text, true.text[taken][:, classes])
        if per == "image":
            assert torch.equal(other.visual, true.visual[taken])


def test_a_text_cache_must_fit(cache):
    with pytest.raises(UserError, match="own class's caption"):
        make(cache, text_source=own_class_source(cache, condition="null"))
    features, meta = {"mid": cache.read("mid")}, {"condition": "own-class"}
    fewer_layers = cache_of(features, cache.text, LABELS, "id", meta)
    with pytest.raises(UserError, match="same layers"):
        make(cache, text_source=fewer_layers)
    with pytest.raises(UserError, match="class 3 has no image"):
        make(cache, text_source=own_class_source(cache, LABELS[:25] % 3))


def test_anchors_are_whitened_levels_side_by_side(cache):
    anchors = make(cache, width=13)
    assert anchors.visual.shape == (N, 13) and anchors.visual.dtype == torch.float32
    covariance = anchors.visual.T.cov()
    torch.testing.assert_close(covariance[:7, :7], torch.eye(7), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance[7:, 7:], torch.eye(6), rtol=1e-4, atol=1e-4)
    provenance = anchors.provenance
    assert provenance["widths"] == [7, 6] and provenance["cache"] == "cache-id"
    assert provenance["images"] == "train" and provenance["source"] == "tiny"
    assert provenance["condition"] == "null"
    total = torch.linalg.eigvalsh(cache.read("mid").double().T.cov()).flip(0)
    explained = float(total[:7].sum() / total.sum())
    assert provenance["explained_variance"]["mid"] == pytest.approx(explained, abs=1e-5)
    assert torch.equal(anchors.text, cache.text)


def test_without_whitening_levels_keep_their_shape_but_not_their_scale(cache):
    visual = make(cache, whiten=False).visual
    variances = visual.var(0)
    assert variances[:6].mean() == pytest.approx(1, rel=1e-4)
    assert variances[6:].mean() == pytest.approx(1, rel=1e-4)
    assert variances[0] > 2 * variances[5]


def test_aggregation_by_widths(cache):
    assert make(cache, aggregation="8-4").provenance["widths"] == [8, 4]
    for wrong in ("8-5", "12", "8-4-0", "paper"):
        with pytest.raises(UserError, match="aggregation"):
            make(cache, aggregation=wrong)


def test_the_vae_alone_and_the_unet_alone_have_the_whole_width(cache):
    """One setting each; the widths that are left keep their proportions, and text anchors from the
    U-Net are mapped by the same layers.
    """
    features = {"vae": cache.read("up.0"), "up.1": cache.read("mid"), "up.2": cache.read("mid")}
    levels = cache_of(features, cache.text, LABELS, "id", {**cache.meta, "layers": list(features)})
    both = make(levels, aggregation="3-6-3")
    assert both.provenance["widths"] == [3, 6, 3]
    assert both.provenance["layers"] == ["vae", "up.1", "up.2"]
    vae = make(levels, aggregation="3-6-3", levels="vae")
    unet = make(levels, aggregation="3-6-3", levels="unet")
    assert (vae.provenance["widths"], unet.provenance["widths"]) == ([12], [8, 4])
    assert list(unet.provenance["explained_variance"]) == ["up.1", "up.2"]
    torch.testing.assert_close(vae.visual[:, :3], both.visual[:, :3])
    torch.testing.assert_close(unet.visual[:, :6], both.visual[:, 3:9])
    assert make(levels, levels="unet", width=11).provenance["widths"] == [6, 5]
    assert make(levels, aggregation="3-5-4", levels="unet").provenance["widths"] == [7, 5]
    texts = make(
        levels,
        levels="unet",
        text_source=replace(levels, meta={**levels.meta, "condition": "own-class"}),
    )
    assert texts.text.shape == (CLASSES, 12)
    with pytest.raises(UserError, match=r"levels = vae: none of diffusion\.layers = mid,up\.0"):
        make(cache, levels="vae")


def test_the_default_anchors_have_a_vae_level():
    """The widths of FedDifRC's up-blocks stand 2 to 1 to 1; the VAE has an eighth."""
    config = resolve({"data.name": "cifar10"})
    layers = list(config.diffusion.layer_names)
    assert layer_widths(config.anchors, layers) == {
        "vae": 64,
        "up.1": 224,
        "up.2": 112,
        "up.3": 112,
    }
    unet = resolve({"data.name": "cifar10", "anchors.levels": "unet"})
    assert layer_widths(unet.anchors, layers) == {"up.1": 256, "up.2": 128, "up.3": 128}
    vae = resolve({"data.name": "cifar10", "anchors.levels": "vae"})
    assert layer_widths(vae.anchors, layers) == {"vae": 512}
    assert 4 * config.diffusion.vae_pool**2 >= 512, "so many values a latent has"
    assert config.diffusion.input_size // 8 >= config.diffusion.vae_pool


def test_a_width_that_the_levels_cannot_give_is_refused(cache):
    message = (
        r"anchors.width = 60: layer up\.0 has 20 PCA components \(120 images\), 30 are requested"
    )
    message += r"; use at most --set anchors\.width=40, use more images"
    with pytest.raises(UserError, match=message):
        make(cache, width=60)
    ones = {"mid": torch.ones(N, 30).half()}
    constant = cache_of(ones, cache.text, LABELS, "id", {"images": N})
    with pytest.raises(UserError, match=r"mid has 0 PCA components.*leave it out"):
        make(constant)
    features = {layer: cache.read("mid") for layer in ("mid", "up.0", "up.1")}
    three_layers = cache_of(features, cache.text, LABELS, "id", {"images": N})
    with pytest.raises(UserError, match="width = 2 is too small for 3 layers"):
        make(three_layers, width=2)


def test_class_anchors_are_the_classes_means(cache):
    each, means = make(cache), make(cache, per="class")
    assert means.visual.shape == (CLASSES, 12)
    for label in range(CLASSES):
        torch.testing.assert_close(means.visual[label], each.visual[label == LABELS].mean(0))
    with pytest.raises(UserError, match="class 4 has no image"):
        make(cache, labels=LABELS % 4, per="class")


def test_visual_for(cache):
    labels, indices = torch.tensor([1, 0, 4]), torch.tensor([11, 5, 119])
    each, means = make(cache), make(cache, per="class")
    assert torch.equal(each.visual_for(labels, indices), each.visual[indices])
    assert torch.equal(means.visual_for(labels, indices), means.visual[labels])


@pytest.mark.parametrize("per", ["image", "class"])
@pytest.mark.parametrize("control", ["shuffled", "permuted", "random", "onehot"])
def test_controls_keep_shapes_and_lengths_and_are_seeded(cache, control, per):
    true, other = make(cache, per=per), make(cache, per=per, control=control)
    assert other.visual.shape == true.visual.shape and other.text.shape == true.text.shape
    assert other.visual.dtype == torch.float32
    lengths = [anchors.visual.norm(dim=1).sort().values for anchors in (true, other)]
    torch.testing.assert_close(*lengths)
    torch.testing.assert_close(
        true.text.norm(dim=1).sort().values, other.text.norm(dim=1).sort().values
    )
    assert not torch.allclose(true.visual, other.visual)
    again = make(cache, per=per, control=control)
    assert torch.equal(again.visual, other.visual) and torch.equal(again.text, other.text)
    assert not torch.equal(make(cache, per=per, control=control, seed=1).visual, other.visual)
    assert other.provenance["control"] == control


def rows_of(part, whole):
    """For every row of `part` the index of the equal row of `whole`."""
    return (part[:, None] == whole[None]).all(2).int().argmax(1)


def test_shuffled_gives_every_image_another_images_anchor_once(cache):
    true, shuffled = make(cache), make(cache, control="shuffled")
    taken = rows_of(shuffled.visual, true.visual)
    assert torch.equal(taken.sort().values, torch.arange(N)) and (taken != torch.arange(N)).all()
    assert torch.equal(shuffled.text, true.text)


def test_permuted_moves_whole_classes_and_their_text_together(cache):
    true, permuted = make(cache), make(cache, control="permuted")
    taken = rows_of(permuted.visual, true.visual)
    assert torch.equal(taken.sort().values, torch.arange(N))  # equal classes: each anchor once
    other = rows_of(permuted.text, true.text)
    assert (other != torch.arange(CLASSES)).all() and torch.equal(LABELS[taken], other[LABELS])
    by_class = make(cache, per="class", control="permuted")
    assert torch.equal(by_class.visual, make(cache, per="class").visual[other])


def test_permuted_with_unequal_and_absent_classes(cache):
    labels = torch.where(torch.arange(N) < 100, 0, torch.arange(N) % 2 + 1)
    true, permuted = make(cache, labels=labels), make(cache, labels=labels, control="permuted")
    taken = labels[rows_of(permuted.visual, true.visual)]
    assert (taken != labels).all()
    assert all(len(taken[labels == label].unique()) == 1 for label in range(3))
    with pytest.raises(UserError, match="two classes"):
        make(cache, labels=torch.zeros(N, dtype=torch.long), control="permuted")


def test_onehot_tells_the_label_and_nothing_else(cache):
    anchors = make(cache, control="onehot")
    unit = torch.nn.functional.normalize(anchors.visual, dim=1)
    expected = (LABELS[:, None] == LABELS[None]).float()
    torch.testing.assert_close(unit @ unit.T, expected, rtol=1e-5, atol=1e-5)


def test_unknown_names(cache):
    with pytest.raises(UserError, match=r"'shufled'.*'shuffled'"):
        make(cache, control="shufled")
    with pytest.raises(UserError, match=r"anchors\.per.*'img'"):
        make(cache, per="img")
    visual, text = draw(N, 4), draw(CLASSES, 4)
    with pytest.raises(UserError, match="unknown control 'shufled'; did you mean 'shuffled'"):
        apply_control("shufled", visual, text, LABELS, per="image", seed=0)
