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
from semanticfl_ref.federated.context import new_state
from semanticfl_ref.federated.flat import flat_layout, load_params, flatten_params
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import load_checkpoint, save_checkpoint
from semanticfl_ref.randomness import generator


def test_a_round_by_hand(small_context):
    """One client, one step, plain SGD without momentum: w - lr * (gradient + decay * w), redone
    without the loop's code.
    """
    context = small_context(
        federation__method="fedavg",
        partition__clients=1,
        federation__clients_per_round=1,
        federation__batch_size=64,
        federation__momentum=0.0,
    )
    state = new_state(context)
    model = ResNet10(2, 3)
    load_params(model, state.params)
    (batch,) = epoch_batches(
        context.partition.indices[0], batch_size=64, generator=generator(0, "batches", 1, 0, 0)
    )
    logits, _ = model(
        network_input(context.dataset.train_images[batch], augment=False, generator=None)
    )
    torch.nn.functional.cross_entropy(logits, context.dataset.train_labels[batch]).backward()
    options = context.config.federation
    with torch.no_grad():
        for p in model.parameters():
            p -= options.learning_rate * (p.grad + options.weight_decay * p)
    after, line = run_round(state, context)
    torch.testing.assert_close(after.row, flatten_params(model), rtol=1e-5, atol=1e-7)
    assert (
        line["steps"] == 1
        and line["clients"] == [0]
        and line["bytes_up"] == 4 * context.layout.entries
    )


def test_bitwise_repeatable_and_no_global_randomness(small_context):
    first, lines = play(small_context())
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    second, again = play(small_context())
    assert torch.equal(first.row, second.row) and lines == again
    assert torch.equal(before, torch.random.get_rng_state())


def test_zero_strength_is_fedavg_bit_for_bit(small_context):
    """Over the entries both have: the heads come last in a row. Weight decay still moves the unused
    heads, and nothing else.
    """
    plain, _ = play(small_context(federation__method="fedavg"))
    idle, _ = play(small_context(semantic__lambda_kd=0.0, semantic__lambda_con=0.0))
    assert len(idle.row) > len(plain.row)
    assert torch.equal(idle.row[: len(plain.row)], plain.row)


@pytest.mark.parametrize("term", ["lambda_kd", "lambda_con"])
def test_each_term_alone_changes_the_result_and_is_reported(small_context, term):
    other = {"lambda_kd": "semantic__lambda_con", "lambda_con": "semantic__lambda_kd"}[term]
    state, lines = play(small_context(**{other: 0.0}), rounds=1)
    plain, _ = play(small_context(federation__method="fedavg"), rounds=1)
    assert not torch.equal(state.params[: len(plain.row)], plain.row)
    name = {"lambda_kd": "consistency", "lambda_con": "contrast"}[term]
    assert set(lines[0]["terms"]) == {"cross_entropy", name} == set(lines[0]["gradient_share"])
    assert sum(lines[0]["gradient_share"].values()) == pytest.approx(1)


def test_anchors_are_sent_once(small_context):
    context = small_context(federation__clients_per_round=3)
    _, lines = play(context)
    row, anchors = 4 * context.layout.entries * 3, 4 * (30 * 8 + 3 * (3 * 6))
    assert [line["bytes_down"] for line in lines] == [row + anchors, row]


def test_a_client_does_not_depend_on_who_trained_before_it(small_context):
    """Neither momentum nor BatchNorm's running averages nor a gradient crosses from client to
    client, nor from round to round.
    """
    context = small_context(federation__momentum=0.9, federation__local_epochs=2)
    start, rows = new_state(context).row, []
    for clients in ((1,), (0, 1), (2, 0, 1)):
        for client in clients:
            load_params(context.model, start)
            story.train_client(
                LocalUpdate(context=context, client=client, round=1, start_P=start, memory={})
            )
        rows.append(flatten_params(context.model))
    assert (
        torch.equal(rows[0], rows[1])
        and torch.equal(rows[0], rows[2])
        and not torch.equal(rows[0], start)
    )


def test_nothing_of_the_test_parts_reaches_the_weights(small_context):
    """Other pixels and labels in the test and validation parts, the same model."""
    first, contexts = play(small_context())[0], [small_context(), small_context()]
    blank = replace(
        contexts[0].dataset,
        test_images=contexts[0].dataset.test_images * 0,
        test_labels=contexts[0].dataset.test_labels * 0,
    )
    validated = replace(
        blank, validation_images=blank.test_images, validation_labels=blank.test_labels
    )
    assert all(
        torch.equal(play(replace(context, dataset=other))[0].row, first.row)
        for context, other in zip(contexts, (blank, validated), strict=True)
    )


def test_running_averages_are_averaged_like_any_weight(small_context):
    """By image counts over those who took part: neither the first client's, nor left out."""
    context = small_context(federation__method="fedavg", federation__clients_per_round=2)
    start = new_state(context)
    after, line = run_round(start, context)
    rows, counts = [], [context.partition.sizes[k] for k in line["clients"]]
    for client in line["clients"]:
        load_params(context.model, start.row)
        story.train_client(
            LocalUpdate(context=context, client=client, round=1, start_P=start.row, memory={})
        )
        rows.append(flatten_params(context.model).double()[context.layout.buffers])
    assert any("running_mean" in name for name in context.layout.names) and any(
        "running_var" in name for name in context.layout.names
    )
    torch.testing.assert_close(
        after.row[context.layout.buffers].double(),
        (counts[0] * rows[0] + counts[1] * rows[1]) / sum(counts),
        rtol=1e-6,
        atol=1e-7,
    )
    assert not torch.equal(after.row[context.layout.buffers].double(), rows[0])


def broken(monkeypatch, client_to_break):
    honest = story.train_client

    def train(update):
        report = honest(update)
        if update.client == client_to_break:
            with torch.no_grad():
                next(update.context.model.parameters())[0] = float("nan")
        return report

    monkeypatch.setattr(story, "train_client", train)


def test_a_broken_client_stops_the_run_by_name(small_context, monkeypatch):
    broken(monkeypatch, 1)
    with pytest.raises(NonFiniteError, match="round 1, client 1: the weights"):
        play(small_context(federation__clients_per_round=3), rounds=1)


def test_a_broken_client_is_dropped_and_leaves_the_others_intact(small_context, monkeypatch):
    broken(monkeypatch, 2)
    context = small_context(
        federation__clients_per_round=3, federation__non_finite="drop", federation__method="fedavg"
    )
    state, lines = play(context, rounds=1)
    assert lines[0]["dropped"] == [2] and torch.isfinite(state.params).all()
    start, rows, losses = new_state(small_context(federation__method="fedavg")).row, [], []
    for client in (0, 1):
        load_params(context.model, start)
        report = story.train_client(
            LocalUpdate(context=context, client=client, round=1, start_P=start, memory={})
        )
        rows.append(flatten_params(context.model).double())
        losses.append(float(report.loss) / report.steps)
    assert lines[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6), (
        "a dropped client's loss is no part of the round's, even when it is finite"
    )
    counts = [len(context.partition.indices[k]) for k in (0, 1)]
    torch.testing.assert_close(
        state.params.double(),
        (counts[0] * rows[0] + counts[1] * rows[1]) / sum(counts),
        rtol=1e-6,
        atol=1e-7,
    )


def test_local_batch_norm_keeps_each_clients_own(small_context):
    context = small_context(
        model__batch_norm="local", federation__method="fedavg", federation__clients_per_round=2
    )
    state, lines = play(context, rounds=1)
    absent = ({0, 1, 2} - set(lines[0]["clients"])).pop()
    start = new_state(small_context(federation__method="fedavg")).row[context.layout.batch_norm]
    assert torch.equal(state.batch_norm[absent], start)
    assert all(not torch.equal(state.batch_norm[k], start) for k in lines[0]["clients"])


def test_a_row_round_trips_and_leaves_counters_out():
    model = ResNet10(2, 3, 8, 6)
    layout, row = flat_layout(model), flatten_params(model)
    assert layout.entries == len(row) and not any(
        "num_batches_tracked" in name for name in layout.names
    )
    assert [name.startswith(("visual_head", "text_head")) for name in layout.names[-4:]] == [
        True
    ] * 4
    other = ResNet10(2, 3, 8, 6, seed=1)
    load_params(other, row)
    assert torch.equal(flatten_params(other), row)


def test_the_papers_network_has_its_size():
    model = ResNet10(64, 10)
    assert 4.8e6 < sum(p.numel() for p in model.parameters()) < 5.0e6
    assert model(torch.zeros(2, 3, 32, 32))[1].shape == (2, 512)


NARROW = """
import torch
from semanticfl_ref.federated.methods.method import LocalUpdate
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


def test_checkpoint_is_the_same_bytes_and_every_damage_is_found(small_context, tmp_path):
    state, _ = play(small_context(), rounds=1)
    path, identity = tmp_path / "checkpoint.safetensors", {"seed": 0, "data": "abc"}
    save_checkpoint(path, state, identity)
    content = path.read_bytes()
    save_checkpoint(path, state, identity)
    assert path.read_bytes() == content
    assert torch.equal(load_checkpoint(path, identity).row, state.params)
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
            torch.equal(loaded.row, state.params) and loaded.round == state.round
        )  # a flip in the header's padding is harmless
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(MismatchError, match="damaged"):
            load_checkpoint(path, identity)


def test_checkpoint_of_another_run_lists_what_differs(small_context, tmp_path):
    save_checkpoint(tmp_path / "c", new_state(small_context()), {"seed": 0, "alpha": 0.3})
    with pytest.raises(MismatchError, match="alpha: 0.3 there, 0.5 here"):
        load_checkpoint(tmp_path / "c", {"seed": 0, "alpha": 0.5})


def test_disk_full_keeps_the_last_checkpoint(small_context, tmp_path, monkeypatch):
    state = new_state(small_context())
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state, {})
    content = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="checkpoint.safetensors: No space left"):
        save_checkpoint(path, replace(state, round=7), {})
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [path.name]
