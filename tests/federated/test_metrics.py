"""A round's metrics on numbers that can be redone on paper: bytes, gradients, drift."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from quadratic import MEAN, TARGETS, run_rounds

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.errors import NonFiniteError
from semanticfl_ref.federated.methods.method import Method
from semanticfl_ref.federated.metrics import Drift, RoundMetrics, non_finite_part
from semanticfl_ref.federated.report import (
    ClientReport,
    FirstBatch,
    gradient_products,
    gradients_of,
)
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state

# Bytes: each of 30 images' 8 entries once; three classes' 6 entries to each of three clients.
VISUAL, TEXT = 4 * 30 * 8, 4 * 3 * (3 * 6)


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_bytes(small_context, name):
    """Three clients, two rounds: the model both ways, SCAFFOLD's control variates both ways, the
    anchors in the first round, and nothing else."""
    context = small_context(
        federation__method=name, federation__clients_per_round=3, fedcda__warm_up=0
    )
    model = 3 * 4 * context.layout.size
    parameters = 3 * 4 * sum(p.numel() for p in context.model.parameters())
    controls = parameters if name == "scaffold" else 0
    anchors = VISUAL + TEXT if name in ("semanticfl", "feddifrc") else 0
    for line, sent in zip(run_rounds(context)[1], (anchors, 0), strict=True):
        assert line["bytes"] == {
            "down": {"model": model, "anchors": sent, "controls": controls},
            "up": {"model": model, "anchors": 0, "controls": controls},
        }
        assert line["bytes_down"] == model + sent + controls
        assert line["bytes_up"] == model + controls


@pytest.mark.parametrize(
    ("settings", "anchors"),
    [
        ({"semanticfl__lambda_kd": 0.0}, TEXT),
        ({"semanticfl__lambda_con": 0.0}, VISUAL),
        ({"semanticfl__lambda_kd": 0.0, "semanticfl__lambda_con": 0.0}, 0),
        ({"federation__method": "feddifrc", "feddifrc__lambda_noise": 0.0}, TEXT),
        ({"federation__method": "feddifrc", "feddifrc__lambda_text": 0.0}, VISUAL),
    ],
)
def test_anchors_that_no_term_reads_are_not_sent(small_context, settings, anchors):
    (line,) = run_rounds(small_context(federation__clients_per_round=3, **settings), 1)[1]
    assert line["bytes"]["down"]["anchors"] == anchors


def test_a_method_that_does_not_say_what_it_reads_is_sent_all_anchors(small_context):
    context = small_context(federation__clients_per_round=3)
    method = dataclasses.replace(context.method, payload=Method().payload)
    (line,) = run_rounds(dataclasses.replace(context, method=method), 1)[1]
    assert line["bytes"]["down"]["anchors"] == VISUAL + TEXT


def test_no_control_variate_is_sent_at_scale_zero(small_context):
    context = small_context(federation__method="scaffold", scaffold__control_scale=0.0)
    (line,) = run_rounds(context, 1)[1]
    assert line["bytes"]["down"]["controls"] == line["bytes"]["up"]["controls"] == 0


def test_a_clients_own_batch_norm_does_not_come_down(small_context):
    """Width 2: BatchNorm of 2, 2 x 2, 3 x 4, 3 x 8 and 3 x 16 channels, four entries each."""
    context = small_context(
        federation__method="fedavg", model__batch_norm="local", federation__clients_per_round=3
    )
    (line,) = run_rounds(context, 1)[1]
    own = 4 * (2 + 2 * 2 + 3 * 4 + 3 * 8 + 3 * 16)
    assert line["bytes_down"] == 3 * 4 * (context.layout.size - own)
    assert line["bytes_up"] == 3 * 4 * context.layout.size


def test_gradients_at_the_features_on_numbers():
    """Gradients at f: of cross-entropy f_0 (1, 0); of 2 * 2 f_1 (0, 4); of -3 f_0 (-3, 0); of
    f_0 + f_1 (1, 1); their norms are 1, 4, 3, sqrt 2."""
    features = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weights = torch.ones(2, requires_grad=True)
    f_0, f_1 = features[0]
    terms = {
        "cross_entropy": (1.0, f_0),
        "across": (2.0, 2 * f_1),
        "against": (3.0, -f_0),
        "between": (1.0, f_0 + f_1),
        "still": (1.0, 0 * f_0),
        "aside": (1.0, weights.sum()),
    }
    found, total = gradients_of(gradient_products(terms, features)), 8 + math.sqrt(2)
    expected = {
        "cross_entropy": (1, 1 / total, 1),
        "across": (4, 4 / total, 0),
        "against": (3, 3 / total, -1),
        "between": (2**0.5, 2**0.5 / total, 0.5**0.5),
    }
    assert set(found) == {*expected, "still"}, (
        "a distance between parameters does not depend on the features"
    )
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6), name
    assert found["still"][:2] == (0, 0)
    assert math.isnan(found["still"].cosine), "no direction"


def test_the_line_averages_over_clients_and_holds_no_nan():
    """Cosines 1/2 and, of a client whose term vanished, none; a third client, whose loss is NaN, is
    dropped."""
    context = SimpleNamespace(
        method=METHODS["fedavg"],
        anchors=None,
        partition=None,
        layout=SimpleNamespace(size=5, optimised=[1, 2, 3, 4], batch_norm=[0]),
        config=SimpleNamespace(
            federation=SimpleNamespace(non_finite="drop"),
            model=SimpleNamespace(batch_norm="average"),
        ),
    )
    metrics = RoundMetrics(context, torch.zeros(3, dtype=torch.bool))
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    clients = [
        (6.0, torch.tensor([0.5, 0.75**0.5])),
        (2.0, torch.zeros(2)),
        (math.nan, torch.tensor([0.0, math.nan])),
    ]
    for client, (loss, direction) in enumerate(clients):
        terms = {"cross_entropy": (1.0, x[0, 0]), "other": (2.0, (x[0] * direction).sum())}
        first = FirstBatch(torch.arange(1), terms, torch.tensor(loss), gradient_products(terms, x))
        summed = {"cross_entropy": torch.tensor(loss)}
        update = SimpleNamespace(client=client, round=1, config=context.config)
        report = ClientReport(steps=2, loss=loss, last_epoch_loss=loss, terms=summed, first=first)
        finite = metrics.add_cohort([update], [report], torch.tensor([True]))
        assert finite.tolist() == [math.isfinite(loss)]
    line = metrics.line()
    assert line["dropped"] == [2]
    assert line["loss"] == 2.0
    assert line["terms"] == {"cross_entropy": 2.0}
    assert line["steps"] == 6
    assert line["bytes_up"] == 3 * 4 * 5
    assert line["gradient_norm"] == pytest.approx({"cross_entropy": 1, "other": 1})
    assert line["gradient_cosine"] == pytest.approx({"other": 0.5})
    assert line["gradient_share"] == pytest.approx({"cross_entropy": 2 / 3, "other": 1 / 3})
    json.dumps(line, allow_nan=False)


def test_drift_on_numbers(quadratic_context):
    """From w clients end at w + 3/4 (t_k - w), so the average moves by 3/4 of the way to the
    weighted mean of the targets."""
    context = quadratic_context(images=(2, 4, 10), federation__method="fedavg")
    weights = torch.tensor([2.0, 4.0, 10.0]) / 16
    state, start = initial_state(context), torch.zeros(3)
    for _ in range(2):
        norms = 0.75 * (TARGETS - start).norm(dim=1)
        mean = 0.75 * (weights @ TARGETS - start).norm()
        state, line = run_round(state, context)
        drift = line["drift"]
        assert drift["update_norm"] == pytest.approx(norms.tolist(), rel=1e-5)
        assert drift["mean_update_norm"] == pytest.approx(mean.item(), rel=1e-5)
        alignment = (mean / (weights @ norms)).item()
        assert drift["update_alignment"] == pytest.approx(alignment, rel=1e-5)
        start = state.params


def test_clients_that_do_not_move_have_no_alignment(quadratic_context):
    still = quadratic_context(federation__method="fedavg", federation__learning_rate=1e-60)
    (line,) = run_rounds(still, 1)[1]
    assert line["drift"] == {
        "update_norm": [0, 0, 0],
        "mean_update_norm": 0,
        "update_alignment": None,
    }
    alone = quadratic_context(federation__method="fedavg", federation__clients_per_round=1)
    (line,) = run_rounds(alone, 1)[1]
    assert line["drift"]["update_alignment"] == pytest.approx(1), "a client is aligned with itself"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"federation__aggregation": "median"},
        {"federation__method": "fedcda", "fedcda__warm_up": 0},
        {"model__batch_norm": "local"},
        {"model__norm": "group"},
    ],
)
def test_drift_is_over_what_descends_from_the_global_model(small_context, settings):
    """For any models averaged by any rule; without running statistics, and with model.batch_norm =
    local without all of BatchNorm."""
    context = small_context(**{"federation__method": "fedavg"} | settings)
    first, _ = run_rounds(context, 2)
    second, line = run_round(first, context)
    layout = context.layout
    excluded = layout.batch_norm if "model__batch_norm" in settings else layout.buffers
    moved = (second.params.double() - first.params).index_fill(0, excluded, 0.0)
    assert line["drift"]["mean_update_norm"] == pytest.approx(moved.norm().item(), rel=1e-9)
    assert len(line["drift"]["update_norm"]) == 2
    assert min(line["drift"]["update_norm"]) > 0


def test_a_dropped_client_has_no_drift(quadratic_context, tamper):
    def overflow(update, replica, report):
        if update.client == 1:
            replica.model.w[0] = float("inf")

    tamper(overflow)
    context = quadratic_context(federation__method="fedavg", federation__non_finite="drop")
    (line,) = run_rounds(context, 1)[1]
    norms = 0.75 * TARGETS.norm(dim=1)
    assert line["dropped"] == [1]
    assert line["drift"]["update_norm"] == [
        pytest.approx(norms[0].item()),
        None,
        pytest.approx(norms[2].item()),
    ]
    mean = 0.75 * TARGETS[[0, 2]].mean(0).norm()
    assert line["drift"]["mean_update_norm"] == pytest.approx(mean.item())
    json.dumps(line, allow_nan=False)


def test_the_server_optimizer_comes_after_the_mean_update(quadratic_context):
    context = quadratic_context(
        federation__method="fedavg",
        federation__server_optimizer="fedavgm",
        server__learning_rate=0.5,
    )
    (line,) = run_rounds(context, 1)[1]
    assert line["drift"]["mean_update_norm"] == pytest.approx(0.75 * MEAN.norm().item())


@pytest.mark.parametrize(
    ("first", "sums", "named"),
    [
        (
            {"cross_entropy": 1.0, "own": math.nan},
            {"cross_entropy": math.nan, "own": math.nan},
            "the term 'own'",
        ),
        (
            {"cross_entropy": 1.0, "own": 1.0},
            {"cross_entropy": math.nan, "own": math.nan},
            "the term 'own' or 'cross_entropy'",
        ),
        ({"cross_entropy": 1.0}, {"cross_entropy": math.inf}, "the term 'cross_entropy'"),
        ({"cross_entropy": 1.0}, {"cross_entropy": 1.0}, "the parameters"),
    ],
)
def test_the_term_that_was_first_not_finite_is_named(first, sums, named):
    """From the second batch on, NaN in the parameters is in every term."""
    terms = {name: (1.0, torch.tensor(value)) for name, value in first.items()}
    batch = FirstBatch(torch.arange(1), terms, torch.tensor(0.0), {})
    report = SimpleNamespace(terms=sums, first=batch)
    assert non_finite_part(report) == named


def test_weights_that_are_all_zero_are_not_reported_as_nan_alone():
    drift = Drift(torch.zeros(2), torch.tensor([], dtype=torch.int64))
    drift.add(0, torch.ones(2), 2.0, 0.0)
    with pytest.raises(NonFiniteError, match="or all aggregation weights are 0"):
        drift.require_weight(1)
