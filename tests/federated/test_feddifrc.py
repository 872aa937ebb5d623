"""FedDifRC's two terms on numbers, and the keys per image from the U-Net to the loss."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quadratic import run_rounds

from semanticfl_ref import cli
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.methods import FedDifRCSettings
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.methods.feddifrc import diffusion_terms
from semanticfl_ref.federated.metrics import anchor_bytes
from semanticfl_ref.run.setup import (
    anchor_images,
    build_anchors,
    cache_plans,
    load_data,
    rebuild_command,
)
from semanticfl_ref.tools.trace.pictures import anchor_pictures

SMALL = {"data.name": "digits", "federation.method": "feddifrc", "anchors.width": 8}
PER_IMAGE = {"feddifrc.keys": "per-image"}


def terms(text, **settings):
    """Of two images with the features (3, 4) and (0, 2), and the noise-driven anchors (1, 0)."""
    batch = SimpleNamespace(
        settings=FedDifRCSettings(**settings),
        model=SimpleNamespace(visual_head=lambda f: f, text_head=lambda f: f),
        features_BD=torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        labels_B=torch.tensor([0, 1]),
        visual_BD=torch.tensor([[5.0, 0.0], [1.0, 0.0]]),
        text_CD=torch.tensor(text),
    )
    return {
        name: (weight, float(value)) for name, (weight, value) in diffusion_terms(batch).items()
    }


def test_both_terms_on_numbers():
    """Cosines with the anchors 3/5 and 0: squared distances 2 - 6/5 and 2. Cosines with the class
    keys (1, 0) and (0, 1): 3/5 and 4/5, the first own; 0 and 1, the second own."""
    keys = [[2.0, 0.0], [0.0, 1.0]]
    found = terms(keys, tau=0.5, lambda_noise=3.0)
    assert found["noise_consistency"] == (3.0, pytest.approx((0.8 + 2) / 2))
    expected = (math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(-2))) / 2
    assert found["text_contrast"] == (1.0, pytest.approx(expected))
    # The same keys, but the second image's in another length and its classes swapped.
    per_image = terms([keys, [[0.0, 3.0], [1.0, 0.0]]], tau=0.5)
    expected = (math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(2))) / 2
    assert per_image["text_contrast"] == (1.0, pytest.approx(expected))


def test_the_consistency_of_the_public_code_on_numbers():
    """softmax(1, 0) against softmax(3/5, 4/5) and softmax(0, 1)."""
    first, z = math.e / (1 + math.e), math.exp(-0.2)
    teacher, students = (first, 1 - first), ((z / (1 + z), 1 / (1 + z)), (1 - first, first))
    divergences = [
        sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))
        for student in students
    ]
    found = terms([[1.0, 0.0], [0.0, 1.0]], consistency="kl")
    assert found["noise_consistency"] == (1.0, pytest.approx(sum(divergences) / 2))


def test_defaults_are_published_ones_and_the_embedded_stand_ins():
    paper, embedded = (
        resolve({"data.name": name, "federation.method": "feddifrc"})
        for name in ("cifar10", "digit-scenes")
    )
    assert (paper.method.keys, paper.method.consistency) == ("per-image", "l2")
    assert (paper.diffusion.timestep, paper.anchors.text) == (300, "unet")
    assert (embedded.method.keys, embedded.method.consistency) == ("class-mean", "l2")
    assert embedded.diffusion.timestep == 20, "300 is not for the embedded model"
    stand_in = {"data.name": "cifar10", "federation.method": "feddifrc", "diffusion.source": "tiny"}
    assert resolve(stand_in).diffusion.timestep == 20
    assert resolve({"data.name": "cifar10"}).diffusion.timestep == 150


@pytest.mark.parametrize("setting", [{"anchors.text": "clip"}, {"anchors.images": "heldout:3"}])
def test_keys_per_image_need_the_clients_images_and_the_unet(setting):
    config = resolve(SMALL | PER_IMAGE | setting)
    data = load_data(config, offline=True)
    (name,) = setting
    with pytest.raises(UserError, match=rf"per-image needs {name}.*feddifrc\.keys=class-mean"):
        cache_plans(config, data.dataset, offline=True)
    without = resolve(SMALL | PER_IMAGE | setting | {"feddifrc.lambda_text": 0.0})
    assert "visual" in cache_plans(without, data.dataset, offline=True), "nothing for nothing"


def test_keys_per_image_from_end_to_end(tmp_path, monkeypatch):
    """The own class's key of an image is what its own class's caption alone gives; the cost is
    said before the first pass. Images that no client trains on have no keys."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    held_out = {"partition.held_out_share": 0.3}
    config = resolve(SMALL | PER_IMAGE | held_out)
    data, said = load_data(config, offline=True), []
    trained, labels = data.partition.trained, data.dataset.train_labels
    anchors = build_anchors(config, data, offline=True, say=said.append)
    assert anchors.text.shape == (len(labels), 10, 8)
    assert anchors.text[trained].isfinite().all()
    assert anchors.text.isnan().all(2).all(1).sum() == len(labels) - len(trained)
    cost = f"in all {10 * len(trained):,} passes"
    (line,) = (i for i, text in enumerate(said) if cost in text)
    assert "feature cache of" in said[line + 1] and "U-Net up to" in said[line + 2]
    assert len(said) == line + 3
    again = settings_of(cli.parse(rebuild_command(config).split()[3:]))
    plans = (cache_plans(c, anchor_images(config, data), offline=True) for c in (config, again))
    first, second = ({use: plan.id for use, plan in each.items()} for each in plans)
    assert first == second, "the command that rebuilds the caches"
    # One image per class and its class's mean: the mean of one.
    firsts = torch.stack([trained[labels[trained] == c][0] for c in range(10)])
    means = resolve(SMALL | held_out | {"anchors.text_images": 1})
    keys = build_anchors(means, data, offline=True).text
    torch.testing.assert_close(anchors.text[firsts, range(10)], keys, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(anchors.text[firsts, 0], keys, rtol=1e-2, atol=1e-2)


def test_keys_per_image_in_a_round(small_context):
    """A client receives the keys of its own images. With other keys the model differs."""
    settings = {"federation__method": "feddifrc", "feddifrc__keys": "per-image"}
    context = small_context(**settings)
    assert context.anchors.text.shape == (30, 3, 6)
    size = context.partition.sizes[0]
    assert anchor_bytes(context, 0) == 4 * size * (8 + 3 * 6)
    assert context.model.text_head.out_features == 6
    assert [name for name, _, _ in anchor_pictures(context)] == ["a", "b", "c"]
    state, lines = run_rounds(context, 1)
    assert lines[0]["bytes"]["down"]["anchors"] == 2 * 4 * size * (8 + 3 * 6)
    swapped = replace(context.anchors, text=context.anchors.text.flip(1))
    other, _ = run_rounds(replace(context, anchors=swapped), 1)
    assert not torch.equal(state.params, other.params)
