"""The books of a round on numbers that can be redone on paper: bytes of every method, gradients at
the features, drift.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from quadratic import MEAN, TARGETS, play

from semanticfl_ref.federated import round as story
from semanticfl_ref.federated.client import ClientReport, feature_gradients
from semanticfl_ref.federated.context import new_state
from semanticfl_ref.federated.methods import METHODS
from semanticfl_ref.federated.metrics import RoundLedger
from semanticfl_ref.federated.round import run_round

VISUAL, TEXT = (
    4 * 30 * 8,
    4 * 3 * (3 * 6),
)  # bytes: each of 30 images' 8 entries once; three classes' 6 entries to each of three clients


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_bytes(small_context, name):
    """Three clients, two rounds: the row both ways, SCAFFOLD's controls both ways, the anchors in
    the first round, and nothing else.
    """
    context = small_context(
        federation__method=name, federation__clients_per_round=3, fedcda__warm_up=0
    )
    model, parameters = (
        3 * 4 * context.layout.entries,
        3 * 4 * sum(p.numel() for p in context.model.parameters()),
    )
    controls, anchors = (
        parameters if name == "scaffold" else 0,
        VISUAL + TEXT if name in ("semanticfl", "feddifrc") else 0,
    )
    for line, handed_out in zip(play(context)[1], (anchors, 0), strict=True):
        assert line["bytes"] == {
            "down": {"model": model, "anchors": handed_out, "controls": controls},
            "up": {"model": model, "anchors": 0, "controls": controls},
        }
        assert (line["bytes_down"], line["bytes_up"]) == (
            model + handed_out + controls,
            model + controls,
        )


@pytest.mark.parametrize(
    ("settings", "anchors"),
    [
        ({"semantic__lambda_kd": 0.0}, TEXT),
        ({"semantic__lambda_con": 0.0}, VISUAL),
        ({"semantic__lambda_kd": 0.0, "semantic__lambda_con": 0.0}, 0),
        ({"federation__method": "feddifrc", "feddifrc__lambda_noise": 0.0}, TEXT),
        ({"federation__method": "feddifrc", "feddifrc__lambda_text": 0.0}, VISUAL),
    ],
)
def test_anchors_that_no_term_reads_are_not_sent(small_context, settings, anchors):
    (line,) = play(small_context(federation__clients_per_round=3, **settings), 1)[1]
    assert line["bytes"]["down"]["anchors"] == anchors


def test_no_control_is_sent_at_scale_zero(small_context):
    (line,) = play(small_context(federation__method="scaffold", scaffold__control_scale=0.0), 1)[1]
    assert line["bytes"]["down"]["controls"] == line["bytes"]["up"]["controls"] == 0


def test_a_clients_own_batch_norm_does_not_come_down(small_context):
    """Width 2: BatchNorm of 2, 2 + 2, 4 + 4 + 4, 8 + 8 + 8, 16 + 16 + 16 channels, four entries
    each.
    """
    context = small_context(
        federation__method="fedavg", model__batch_norm="local", federation__clients_per_round=3
    )
    (line,) = play(context, 1)[1]
    own = 4 * (2 + 2 * 2 + 3 * 4 + 3 * 8 + 3 * 16)
    assert (line["bytes_down"], line["bytes_up"]) == (
        3 * 4 * (context.layout.entries - own),
        3 * 4 * context.layout.entries,
    )


def test_gradients_at_the_features_on_numbers():
    """Features f: cross-entropy f_0 pulls by (1, 0); 2 * 2 f_1 by (0, 4); -3 f_0 by (-3, 0); f_0 +
    f_1 by (1, 1); norms 1, 4, 3, sqrt 2.
    """
    features, weights = (
        torch.tensor([[3.0, 4.0]], requires_grad=True),
        torch.ones(2, requires_grad=True),
    )
    f_0, f_1 = features[0]
    terms = {
        "cross_entropy": (1.0, f_0),
        "across": (2.0, 2 * f_1),
        "against": (3.0, -f_0),
        "between": (1.0, f_0 + f_1),
        "still": (1.0, 0 * f_0),
        "aside": (1.0, weights.sum()),
    }
    found, total = feature_gradients(terms, features), 8 + math.sqrt(2)
    expected = {
        "cross_entropy": (1, 1 / total, 1),
        "across": (4, 4 / total, 0),
        "against": (3, 3 / total, -1),
        "between": (2**0.5, 2**0.5 / total, 0.5**0.5),
    }
    assert set(found) == {*expected, "still"}, (
        "a distance between weights does not pass through the features"
    )
    assert {name: found[name] for name in expected} == {
        name: pytest.approx(values, abs=1e-6) for name, values in expected.items()
    }
    assert found["still"][:2] == (0, 0) and math.isnan(found["still"].cosine), "no direction"


def test_the_line_means_over_clients_and_holds_no_nan():
    """Cosines 1/2 and, of a client whose term vanished, none; a third client's loss is NaN."""
    context = SimpleNamespace(
        anchors=None,
        layout=SimpleNamespace(entries=5, buffers=[0], batch_norm=[0]),
        config=SimpleNamespace(
            federation=SimpleNamespace(method="fedavg"), model=SimpleNamespace(batch_norm="average")
        ),
    )
    ledger, x, flat = (
        RoundLedger(context, SimpleNamespace(served=[False] * 3)),
        torch.tensor([[1.0, 0.0]], requires_grad=True),
        torch.tensor([0.0, 1.0]),
    )
    for client, (loss, pull) in enumerate(
        [(6.0, torch.tensor([0.5, 0.75**0.5])), (2.0, torch.zeros(2)), (math.nan, flat * math.nan)]
    ):
        gradients = feature_gradients(
            {"cross_entropy": (1.0, x[0, 0]), "other": (2.0, (x[0] * pull).sum())}, x
        )
        ledger.count(
            client,
            ClientReport(
                steps=2, loss=loss, terms={"cross_entropy": torch.tensor(loss)}, gradients=gradients
            ),
        )
    line = ledger.line()
    assert (line["loss"], line["terms"], line["steps"], line["bytes_up"]) == (
        2.0,
        {"cross_entropy": 2.0},
        6,
        3 * 4 * 5,
    )
    assert line["gradient_norm"] == pytest.approx({"cross_entropy": 1, "other": 1}) and line[
        "gradient_cosine"
    ] == pytest.approx({"other": 0.5})
    assert line["gradient_share"] == pytest.approx({"cross_entropy": 2 / 3, "other": 1 / 3})
    json.dumps(line, allow_nan=False)


def test_drift_on_numbers(quadratic_world):
    """From w clients end at w + 3/4 (t_k - w), so the average moves by 3/4 of the way to the
    weighted mean of the targets.
    """
    context, weights = (
        quadratic_world(images=(2, 4, 10), federation__method="fedavg"),
        torch.tensor([2.0, 4.0, 10.0]) / 16,
    )
    state, start = new_state(context), torch.zeros(3)
    for _ in range(2):
        norms, mean = (
            0.75 * (TARGETS - start).norm(dim=1),
            0.75 * (weights @ TARGETS - start).norm(),
        )
        state, line = run_round(state, context)
        assert line["drift"]["update_norm"] == pytest.approx(norms.tolist(), rel=1e-5)
        assert (
            line["drift"]["mean_update_norm"],
            line["drift"]["update_alignment"],
        ) == pytest.approx((mean.item(), (mean / (weights @ norms)).item()), rel=1e-5)
        start = state.params


def test_clients_that_do_not_move_have_no_agreement(quadratic_world):
    (line,) = play(
        quadratic_world(federation__method="fedavg", federation__learning_rate=1e-60), 1
    )[1]
    assert line["drift"] == {
        "update_norm": [0, 0, 0],
        "mean_update_norm": 0,
        "update_alignment": None,
    }
    _, lines = play(
        quadratic_world(federation__method="fedavg", federation__clients_per_round=1), 1
    )
    assert lines[0]["drift"]["update_alignment"] == pytest.approx(1), "a client agrees with itself"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"federation__aggregation": "median"},
        {"federation__method": "fedcda", "fedcda__warm_up": 0},
        {"model__batch_norm": "local"},
    ],
)
def test_drift_is_over_what_descends_from_the_global_row(small_context, settings):
    """Whatever rows are averaged by whatever rule; running averages are left out, and under "local"
    all of BatchNorm.
    """
    context = small_context(**{"federation__method": "fedavg"} | settings)
    first, _ = play(context, 2)
    second, line = run_round(first, context)
    apart = context.layout.batch_norm if "model__batch_norm" in settings else context.layout.buffers
    moved = (second.row.double() - first.row).index_fill(0, apart, 0.0)
    assert line["drift"]["mean_update_norm"] == pytest.approx(moved.norm().item(), rel=1e-9)
    assert len(line["drift"]["update_norm"]) == 2 and min(line["drift"]["update_norm"]) > 0


def test_a_dropped_client_has_no_drift(quadratic_world, monkeypatch):
    honest = story.train_client

    def train(update):
        report = honest(update)
        if update.client == 1:
            with torch.no_grad():
                update.context.model.w[0] = float("inf")
        return report

    monkeypatch.setattr(story, "train_client", train)
    (line,) = play(quadratic_world(federation__method="fedavg", federation__non_finite="drop"), 1)[
        1
    ]
    norms = 0.75 * TARGETS.norm(dim=1)
    assert line["dropped"] == [1] and line["drift"]["update_norm"] == [
        pytest.approx(norms[0].item()),
        None,
        pytest.approx(norms[2].item()),
    ]
    assert line["drift"]["mean_update_norm"] == pytest.approx(
        0.75 * TARGETS[[0, 2]].mean(0).norm().item()
    )
    json.dumps(line, allow_nan=False)


def test_the_server_optimiser_comes_after_the_mean_update(quadratic_world):
    (line,) = play(
        quadratic_world(
            federation__method="fedavg",
            federation__server_optimizer="fedavgm",
            server__learning_rate=0.5,
        ),
        1,
    )[1]
    assert line["drift"]["mean_update_norm"] == pytest.approx(0.75 * MEAN.norm().item())
