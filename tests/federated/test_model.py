"""The clients' model and its flat vector."""

import os
import subprocess
import sys

import torch

from semanticfl_ref.federated.flat import flat_layout, flatten_params, load_params, with_parameters
from semanticfl_ref.federated.model import ResNet10


def test_a_flat_vector_round_trips_and_leaves_counters_out():
    model = ResNet10(2, 3, 8, 6)
    layout, params_P = flat_layout(model), flatten_params(model)
    assert layout.size == len(params_P)
    assert not any("num_batches_tracked" in name for name in layout.names)
    assert all(name.startswith(("visual_head", "text_head")) for name in layout.names[-4:])
    other = ResNet10(2, 3, 8, 6, seed=1)
    load_params(other, params_P)
    assert torch.equal(flatten_params(other), params_P)


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


def test_the_papers_network_has_its_size():
    model = ResNet10(64, 10)
    assert 4.8e6 < sum(p.numel() for p in model.parameters()) < 5.0e6
    assert model(torch.zeros(2, 3, 32, 32))[1].shape == (2, 512)


def test_levels_change_no_bit(small_context):
    model = small_context().model.eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, features = model(images)
    again, same, levels = model.forward_with_levels(images)
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
