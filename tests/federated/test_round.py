"""Properties of a round: repeatable, equal to FedAvg at zero strength, robust against a client that
breaks.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from quadratic import play

from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.errors import DataError, MismatchError, NonFiniteError
from semanticfl_ref.federated import round as story
from semanticfl_ref.federated.flat import layout_of, load_row, to_row
from semanticfl_ref.federated.methods.method import Visit
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.federated.round import play_round
from semanticfl_ref.federated.state import load_checkpoint, save_checkpoint
from semanticfl_ref.federated.world import new_state
from semanticfl_ref.randomness import generator


def test_a_round_by_hand(small_world):
    """One client, one step, plain SGD without momentum: w - lr * (gradient + decay * w), redone
    without the loop's code.
    """
    world = small_world(
        federation__method="fedavg",
        partition__clients=1,
        federation__clients_per_round=1,
        federation__batch_size=64,
        federation__momentum=0.0,
    )
    state = new_state(world)
    model = ResNet10(2, 3)
    load_row(model, state.row)
    (batch,) = epoch_batches(
        world.partition.indices[0], batch_size=64, generator=generator(0, "batches", 1, 0, 0)
    )
    logits, _ = model(
        network_input(world.dataset.train_images[batch], augment=False, generator=None)
    )
    torch.nn.functional.cross_entropy(logits, world.dataset.train_labels[batch]).backward()
    options = world.config.federation
    with torch.no_grad():
        for p in model.parameters():
            p -= options.learning_rate * (p.grad + options.weight_decay * p)
    after, line = play_round(state, world)
    torch.testing.assert_close(after.row, to_row(model), rtol=1e-5, atol=1e-7)
    assert (
        line["steps"] == 1
        and line["clients"] == [0]
        and line["bytes_up"] == 4 * world.layout.entries
    )


def test_bitwise_repeatable_and_no_global_randomness(small_world):
    first, lines = play(small_world())
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    second, again = play(small_world())
    assert torch.equal(first.row, second.row) and lines == again
    assert torch.equal(before, torch.random.get_rng_state())


def test_zero_strength_is_fedavg_bit_for_bit(small_world):
    """Over the entries both have: the heads come last in a row. Weight decay still moves the unused
    heads, and nothing else.
    """
    plain, _ = play(small_world(federation__method="fedavg"))
    idle, _ = play(small_world(semantic__lambda_kd=0.0, semantic__lambda_con=0.0))
    assert len(idle.row) > len(plain.row)
    assert torch.equal(idle.row[: len(plain.row)], plain.row)


@pytest.mark.parametrize("term", ["lambda_kd", "lambda_con"])
def test_each_term_alone_changes_the_result_and_is_reported(small_world, term):
    other = {"lambda_kd": "semantic__lambda_con", "lambda_con": "semantic__lambda_kd"}[term]
    state, lines = play(small_world(**{other: 0.0}), rounds=1)
    plain, _ = play(small_world(federation__method="fedavg"), rounds=1)
    assert not torch.equal(state.row[: len(plain.row)], plain.row)
    name = {"lambda_kd": "consistency", "lambda_con": "contrast"}[term]
    assert set(lines[0]["terms"]) == {"cross_entropy", name} == set(lines[0]["gradient_share"])
    assert sum(lines[0]["gradient_share"].values()) == pytest.approx(1)


def test_anchors_are_sent_once(small_world):
    world = small_world(federation__clients_per_round=3)
    _, lines = play(world)
    row, anchors = 4 * world.layout.entries * 3, 4 * (30 * 8 + 3 * (3 * 6))
    assert [line["bytes_down"] for line in lines] == [row + anchors, row]


def test_a_client_does_not_depend_on_who_trained_before_it(small_world):
    """Neither momentum nor BatchNorm's running averages nor a gradient crosses from client to
    client, nor from round to round.
    """
    world = small_world(federation__momentum=0.9, federation__local_epochs=2)
    start, rows = new_state(world).row, []
    for clients in ((1,), (0, 1), (2, 0, 1)):
        for client in clients:
            load_row(world.model, start)
            story.train_client(Visit(world=world, client=client, round=1, start_P=start, memory={}))
        rows.append(to_row(world.model))
    assert (
        torch.equal(rows[0], rows[1])
        and torch.equal(rows[0], rows[2])
        and not torch.equal(rows[0], start)
    )


def test_nothing_of_the_test_parts_reaches_the_weights(small_world):
    """Other pixels and labels in the test and validation parts, the same model."""
    first, worlds = play(small_world())[0], [small_world(), small_world()]
    blank = replace(
        worlds[0].dataset,
        test_images=worlds[0].dataset.test_images * 0,
        test_labels=worlds[0].dataset.test_labels * 0,
    )
    validated = replace(
        blank, validation_images=blank.test_images, validation_labels=blank.test_labels
    )
    assert all(
        torch.equal(play(replace(world, dataset=other))[0].row, first.row)
        for world, other in zip(worlds, (blank, validated), strict=True)
    )


def test_running_averages_are_averaged_like_any_weight(small_world):
    """By image counts over those who took part: neither the first client's, nor left out."""
    world = small_world(federation__method="fedavg", federation__clients_per_round=2)
    start = new_state(world)
    after, line = play_round(start, world)
    rows, counts = [], [world.partition.sizes[k] for k in line["clients"]]
    for client in line["clients"]:
        load_row(world.model, start.row)
        story.train_client(Visit(world=world, client=client, round=1, start_P=start.row, memory={}))
        rows.append(to_row(world.model).double()[world.layout.buffers])
    assert any("running_mean" in name for name in world.layout.names) and any(
        "running_var" in name for name in world.layout.names
    )
    torch.testing.assert_close(
        after.row[world.layout.buffers].double(),
        (counts[0] * rows[0] + counts[1] * rows[1]) / sum(counts),
        rtol=1e-6,
        atol=1e-7,
    )
    assert not torch.equal(after.row[world.layout.buffers].double(), rows[0])


def broken(monkeypatch, client_to_break):
    honest = story.train_client

    def train(visit):
        report = honest(visit)
        if visit.client == client_to_break:
            with torch.no_grad():
                next(visit.world.model.parameters())[0] = float("nan")
        return report

    monkeypatch.setattr(story, "train_client", train)


def test_a_broken_client_stops_the_run_by_name(small_world, monkeypatch):
    broken(monkeypatch, 1)
    with pytest.raises(NonFiniteError, match="round 1, client 1: the weights"):
        play(small_world(federation__clients_per_round=3), rounds=1)


def test_a_broken_client_is_dropped_and_leaves_the_others_intact(small_world, monkeypatch):
    broken(monkeypatch, 2)
    world = small_world(
        federation__clients_per_round=3, federation__non_finite="drop", federation__method="fedavg"
    )
    state, lines = play(world, rounds=1)
    assert lines[0]["dropped"] == [2] and torch.isfinite(state.row).all()
    start, rows, losses = new_state(small_world(federation__method="fedavg")).row, [], []
    for client in (0, 1):
        load_row(world.model, start)
        report = story.train_client(
            Visit(world=world, client=client, round=1, start_P=start, memory={})
        )
        rows.append(to_row(world.model).double())
        losses.append(float(report.loss) / report.steps)
    assert lines[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6), (
        "a dropped client's loss is no part of the round's, even when it is finite"
    )
    counts = [len(world.partition.indices[k]) for k in (0, 1)]
    torch.testing.assert_close(
        state.row.double(),
        (counts[0] * rows[0] + counts[1] * rows[1]) / sum(counts),
        rtol=1e-6,
        atol=1e-7,
    )


def test_local_batch_norm_keeps_each_clients_own(small_world):
    world = small_world(
        model__batch_norm="local", federation__method="fedavg", federation__clients_per_round=2
    )
    state, lines = play(world, rounds=1)
    absent = ({0, 1, 2} - set(lines[0]["clients"])).pop()
    start = new_state(small_world(federation__method="fedavg")).row[world.layout.batch_norm]
    assert torch.equal(state.batch_norm[absent], start)
    assert all(not torch.equal(state.batch_norm[k], start) for k in lines[0]["clients"])


def test_a_row_round_trips_and_leaves_counters_out():
    model = ResNet10(2, 3, 8, 6)
    layout, row = layout_of(model), to_row(model)
    assert layout.entries == len(row) and not any(
        "num_batches_tracked" in name for name in layout.names
    )
    assert [name.startswith(("visual_head", "text_head")) for name in layout.names[-4:]] == [
        True
    ] * 4
    other = ResNet10(2, 3, 8, 6, seed=1)
    load_row(other, row)
    assert torch.equal(to_row(other), row)


def test_the_papers_network_has_its_size():
    model = ResNet10(64, 10)
    assert 4.8e6 < sum(p.numel() for p in model.parameters()) < 5.0e6
    assert model(torch.zeros(2, 3, 32, 32))[1].shape == (2, 512)


NARROW = """
import torch
from semanticfl_ref.federated.methods.method import Visit
from semanticfl_ref.federated.model import ResNet10
torch.set_num_threads(2)
model = ResNet10(2, 3).to(memory_format=torch.channels_last)
for batch in (9, 33) * 4:
    model(torch.ones(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last))[0].sum().backward()
"""


def test_narrow_models_train_on_two_threads_with_odd_batches():
    """A strided 1x1 convolution on the shortcut corrupted the heap here; checked by the C library,
    in a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        env={**os.environ, "MALLOC_CHECK_": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_checkpoint_is_the_same_bytes_and_every_damage_is_found(small_world, tmp_path):
    state, _ = play(small_world(), rounds=1)
    path, identity = tmp_path / "checkpoint.safetensors", {"seed": 0, "data": "abc"}
    save_checkpoint(path, state, identity)
    content = path.read_bytes()
    save_checkpoint(path, state, identity)
    assert path.read_bytes() == content
    assert torch.equal(load_checkpoint(path, identity).row, state.row)
    source = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(content), (60,), generator=source).tolist() + list(
        range(0, 600, 7)
    ):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, identity)
        except MismatchError:
            continue
        assert (
            torch.equal(loaded.row, state.row) and loaded.round == state.round
        )  # a flip in the header's padding is harmless
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(MismatchError, match="damaged"):
            load_checkpoint(path, identity)


def test_checkpoint_of_another_run_lists_what_differs(small_world, tmp_path):
    save_checkpoint(tmp_path / "c", new_state(small_world()), {"seed": 0, "alpha": 0.3})
    with pytest.raises(MismatchError, match="alpha: 0.3 there, 0.5 here"):
        load_checkpoint(tmp_path / "c", {"seed": 0, "alpha": 0.5})


def test_disk_full_keeps_the_last_checkpoint(small_world, tmp_path, monkeypatch):
    state = new_state(small_world())
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state, {})
    content = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="checkpoint.safetensors: No space left"):
        save_checkpoint(path, replace(state, round=7), {})
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [path.name]
