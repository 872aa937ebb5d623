"""The clients' model and its flat vector."""

import os
import subprocess
import sys

import pytest
import torch

from semanticfl_ref.config.registry import MODELS, register_model
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.flat import flat_layout, flatten_params, load_params, with_parameters
from semanticfl_ref.federated.model import ResNet10, group_norm


def test_a_flat_vector_round_trips_and_leaves_counters_out():
    model = ResNet10(2, 3, 8, 6)
    layout, params_P = flat_layout(model), flatten_params(model)
    assert layout.size == len(params_P)
    counters = [t for t in model.state_dict().values() if not t.is_floating_point()]
    assert len(counters) == 12, "one for each BatchNorm layer"
    assert layout.size == sum(t.numel() for t in model.state_dict().values()) - len(counters)
    other = ResNet10(2, 3, 8, 6, seed=1)
    load_params(other, params_P)
    assert torch.equal(flatten_params(other), params_P)


class Longer(ResNet10):
    """A layer more, after the heads."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self.more = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.more.weight)
        torch.nn.init.ones_(self.more.bias)


@pytest.mark.parametrize("build", [ResNet10, Longer])
def test_heads_come_last(build):
    """So models with and without them share the beginning."""
    model, without_P = build(2, 3, 8, 6), flatten_params(build(2, 3))
    heads = [
        p.detach().flatten() for m in (model.visual_head, model.text_head) for p in m.parameters()
    ]
    assert len(heads) == 4
    assert torch.equal(flatten_params(model), torch.cat([without_P, *heads]))


def test_without_heads_features_stay_as_they_are():
    model, features = ResNet10(2, 3), torch.ones(4, 16)
    for head in (model.visual_head, model.text_head, model.projection_head):
        assert head(features) is features


def test_buffers_and_optimised_entries_are_all_there_is():
    model = ResNet10(2, 3, 8, 6)
    layout = flat_layout(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert len(layout.optimised) == parameters
    assert sorted([*layout.optimised.tolist(), *layout.buffers.tolist()]) == list(
        range(layout.size)
    )


def test_parts_of_a_flat_vector_stand_beside_their_parameters():
    model = ResNet10(2, 3, 8, 6)
    for parameter, part in with_parameters(model, flatten_params(model)):
        assert torch.equal(parameter.detach(), part)


def test_group_norm_has_no_buffers_and_the_same_parameters():
    """Two groups of channels, each normalised within an image: no image sees another."""
    model, layout = ResNet10(2, 3, 8, 6, norm="group"), flat_layout(ResNet10(2, 3, norm="group"))
    batch = ResNet10(2, 3, 8, 6)
    assert not list(model.buffers())
    assert len(layout.buffers) == len(layout.batch_norm) == 0
    assert [p.shape for p in model.parameters()] == [p.shape for p in batch.parameters()]
    for one, other in zip(model.parameters(), batch.parameters(), strict=True):
        assert torch.equal(one, other), "the same initial weights"
    params_P = flatten_params(model)
    other = ResNet10(2, 3, 8, 6, norm="group", seed=1)
    load_params(other, params_P)
    assert torch.equal(flatten_params(other), params_P)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images)[0][:1], model(images[:1])[0])
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 12 and {m.num_groups for m in norms} == {2}
    assert group_norm(3).num_groups == 1


def test_a_model_without_the_argument_refuses_group_norm(small_context, monkeypatch):
    monkeypatch.setattr(MODELS, "entries", dict(MODELS.entries))
    register_model("own", lambda width, classes, seed: ResNet10(width, classes, seed=seed))
    own = {"model__name": "own", "federation__method": "fedavg"}
    small_context(**own)
    with pytest.raises(UserError, match="model 'own' takes no argument norm"):
        small_context(**own, model__norm="group")


def test_the_papers_network_has_its_size():
    model = ResNet10(64, 10)
    assert 4.8e6 < sum(p.numel() for p in model.parameters()) < 5.0e6
    assert model(torch.zeros(2, 3, 32, 32))[1].shape == (2, 512)


def test_levels_change_no_bit(small_context):
    model = small_context().model.eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, features = model(images)
    again, same, *levels = model.forward_with_levels(images)
    assert torch.equal(logits, again)
    assert torch.equal(features, same)
    assert [level.shape[1] for level in levels] == [2, 2, 4, 8, 16]
    before_relu = levels[-1]
    assert (before_relu < features).any()
    assert (before_relu <= features + 1e-6).all(), "the ReLU only adds"


NARROW = """
import torch
from semanticfl_ref.federated.model import ResNet10
torch.set_num_threads(2)
layout = torch.channels_last
model = ResNet10(2, 3).to(memory_format=layout)
for batch in (9, 33) * 4:
    images = torch.ones(batch, 3, 32, 32).contiguous(memory_format=layout)
    model(images)[0].sum().backward()
"""


def test_narrow_models_train_on_two_threads_with_odd_batches():
    """A strided 1x1 convolution on the shortcut corrupted the heap; the C library checks."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        env={**os.environ, "MALLOC_CHECK_": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
