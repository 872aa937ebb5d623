"""Robust rules on numbers that can be redone on paper, and hostile clients in a round."""

from dataclasses import replace

import pytest
import torch
from quadratic import assert_near, run_rounds

from semanticfl_ref.config.registry import METHODS, Entry
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import ServerSettings, trimmed_clients
from semanticfl_ref.errors import NonFiniteError, UserError
from semanticfl_ref.federated.flat import flatten_params, load_params
from semanticfl_ref.federated.metrics import Drift
from semanticfl_ref.federated.robust import clip_update, robust_aggregate, trimmed_mean
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state

PARAMS = torch.tensor([[1.0, -8.0], [2.0, 0.0], [4.0, 1.0], [7.0, 2.0], [1e9, 3.0]])


def aggregate(params_KP, rule, trim=0.2, sampled=5):
    return robust_aggregate(params_KP, rule, ServerSettings(trim=trim), sampled).tolist()


def test_median_and_trimmed_mean_on_numbers():
    assert aggregate(PARAMS, "median") == [4.0, 1.0]
    assert aggregate(PARAMS[:4], "median") == [3.0, 0.5], "of an even number: the middle two's mean"
    assert aggregate(PARAMS, "trimmed-mean") == pytest.approx([(2 + 4 + 7) / 3, 1.0])
    assert aggregate(PARAMS, "trimmed-mean", 0.4) == aggregate(PARAMS, "median")


def test_multi_krum_on_numbers():
    """By hand: with f = 1 of five, the two nearest count, and three of five models are left."""
    five = torch.tensor([[0.0], [1.0], [3.0], [4.0], [1e30]])
    scores = [1 + 9, 1 + 4, 1 + 4, 1 + 9]
    assert sorted(range(4), key=lambda k: scores[k])[:2] == [1, 2]
    assert aggregate(five, "multi-krum") == pytest.approx([(0 + 1 + 3) / 3])
    two = torch.tensor([[0.0], [1.0], [3.0], [1e30], [1e30]])
    assert aggregate(two, "multi-krum") == pytest.approx([4 / 3]), "two that agree are left out too"
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    assert aggregate(two[order], "multi-krum") == pytest.approx([4 / 3])
    assert aggregate(five[:1], "multi-krum") == [0.0]


def test_multi_krum_needs_clients_enough():
    """K > 2 f + 2, as its publication has it."""
    settings = {"federation.aggregation": "multi-krum", "federation.clients_per_round": 6}
    resolve(settings)
    with pytest.raises(UserError, match=r"bears 1 hostile clients .* asks for 2"):
        resolve({**settings, "server.trim": 0.4})


def test_a_client_that_is_not_finite_does_not_turn_trimming_off():
    """Five clients are sampled, one of which sends 1 000 and perhaps another NaN: floor(0.2 * 4)
    would be 0, and the mean 250.75."""
    five = torch.tensor([[1.0], [1.0], [1.0], [1.1], [1000.0]])
    assert aggregate(five, "trimmed-mean") == pytest.approx([3.1 / 3])
    without_nan = five[[0, 1, 2, 4]]
    assert without_nan.mean() == 250.75
    assert aggregate(without_nan, "trimmed-mean") == [1.0]
    assert aggregate(five[[0, 3, 4]], "trimmed-mean", 0.4) == pytest.approx([1.1]), (
        "two of five at each end; of three clients that are left, the median"
    )
    assert aggregate(five[3:4], "trimmed-mean", 0.4) == pytest.approx([1.1])


@pytest.mark.parametrize("nan", [False, True])
def test_trimming_in_a_round_with_a_client_that_is_not_finite(small_context, tamper, nan):
    """The client that returns a million everywhere is trimmed, also if another is dropped."""

    def attack(update, replica, report):
        value = {0: 1e6, 1: float("nan") if nan else None}.get(update.client)
        if value is not None:
            load_params(replica.model, torch.full_like(update.start_P, value))

    tamper(attack)
    context = small_context(
        federation__method="fedavg",
        partition__clients=5,
        federation__clients_per_round=5,
        federation__aggregation="trimmed-mean",
        federation__non_finite="drop",
    )
    state, line = observed_round(context, [])
    assert line["dropped"] == ([1] if nan else [])
    assert state.params.abs().max() < 1e3


def test_clipping_on_numbers():
    """Entries 0 and 1 have the norm 5, entry 2 the norm 3; the bound is 4."""
    excluded, start_P = torch.tensor([2]), torch.tensor([1.0, 1.0, 1.0])
    params_P = torch.tensor([4.0, 5.0, 4.0])
    clip_update(params_P, start_P, excluded, 4.0)
    assert params_P.tolist() == pytest.approx([1 + 3 * 4 / 5, 1 + 4 * 4 / 5, 4])
    before = params_P.clone()
    clip_update(params_P, start_P, excluded, 4.1)
    assert torch.equal(params_P, before), "a shorter update keeps its bits"
    for value in (float("inf"), float("nan")):
        params_P[0] = value
        clip_update(params_P, start_P, excluded, 4.0)
        assert not params_P[0].isfinite(), "the client is still dropped, or stops the run"


@pytest.mark.parametrize("batch_norm", ["average", "local"])
@pytest.mark.parametrize("optimizer", ["none", "fedadam"])
def test_a_client_that_sends_1e30_is_clipped(small_context, tamper, optimizer, batch_norm):
    """With a bound the global model moves no farther than it; without, the metrics say who did."""

    def attack(update, replica, report):
        if update.client == 1:
            load_params(replica.model, torch.full_like(update.start_P, 1e30))

    tamper(attack)
    settings = {
        "federation__method": "fedavg",
        "federation__clients_per_round": 3,
        "federation__server_optimizer": optimizer,
        "model__batch_norm": batch_norm,
    }
    context = small_context(**settings, server__clip_norm=0.5)
    start_P = initial_state(context).params
    state, (line,) = run_rounds(context, 1)
    own = context.layout.batch_norm if batch_norm == "local" else context.layout.buffers
    moved_P = state.params - start_P
    moved_P[own] = 0
    limit = 0.5 if optimizer == "none" else float(len(moved_P)) ** 0.5
    assert 0 < moved_P.norm() <= limit * (1 + 1e-6)
    assert max(line["drift"]["update_norm"]) == pytest.approx(0.5, rel=1e-5)
    _, (unbounded,) = run_rounds(small_context(**settings), 1)
    assert unbounded["drift"]["update_norm"][1] > 1e30


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match=r"federation\.aggregation 'bulyan'"):
        aggregate(PARAMS, "bulyan")


def test_each_client_counts_once(quadratic_context):
    """Robust rules ignore image counts; the mean does not."""
    models = {}
    for images in ((4, 4, 4), (30, 4, 4)):
        for rule in ("median", "mean"):
            settings = {"federation__method": "fedavg", "federation__aggregation": rule}
            state, _ = run_rounds(quadratic_context(images, **settings), 1)
            models[images, rule] = state.params
    equal, skewed = (4, 4, 4), (30, 4, 4)
    assert_near(models[equal, "median"], models[skewed, "median"])
    assert (models[equal, "mean"] - models[skewed, "mean"]).abs().max() > 0.1


def test_trimmed_mean_in_chunks(monkeypatch):
    params_KP = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    whole = trimmed_mean(params_KP, 2)
    monkeypatch.setattr("semanticfl_ref.federated.robust.CHUNK", 64)
    assert torch.equal(trimmed_mean(params_KP, 2), whole)
    assert_near(trimmed_mean(params_KP, 3), params_KP.median(0).values)


def test_a_share_of_clients_is_counted_exactly():
    assert trimmed_clients(0.29, 100) == 29
    assert trimmed_clients(0.1, 30) == 3
    assert trimmed_clients(0.2, 4) == 0


def test_a_trim_that_removes_no_client_is_refused():
    with pytest.raises(
        UserError,
        match=r"server.trim = 0.1 of federation.clients_per_round = 5 removes no client.*0.2",
    ):
        resolve({"federation.aggregation": "trimmed-mean", "server.trim": 0.1})


def test_drift_on_numbers():
    """Entry 1 does not descend from the global model."""
    drift = Drift(torch.zeros(2), excluded=torch.tensor([1]))
    for client, params_P in enumerate(PARAMS[:3]):
        drift.add(client, params_P, params_P.double().square().sum(), weight=1.0)
    assert drift.norms == pytest.approx({0: 1.0, 1: 2.0, 2: 4.0})
    assert drift.weight == 3
    summary = drift.summary(torch.tensor([-2.0, 5.0]))
    assert summary["mean_update_norm"] == pytest.approx(2.0)
    assert summary["update_alignment"] == pytest.approx(2 * 3 / 7)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean"])
def test_a_client_that_is_not_finite_is_left_out(small_context, tamper, rule):
    """The aggregate is that of the other clients, as if it had not been sampled."""

    def overflow(update, replica, report):
        if update.client == 0:
            next(replica.model.parameters())[0] = float("inf")

    tamper(overflow)
    context = small_context(
        federation__method="fedavg",
        partition__clients=5,
        federation__clients_per_round=5,
        federation__aggregation=rule,
        federation__non_finite="drop",
        server__trim=0.25,
    )
    trained = []
    state, line = observed_round(context, trained)
    assert line["dropped"] == [0]
    assert line["drift"]["update_norm"][0] is None
    others = torch.stack(trained[1:])
    if rule == "mean":
        counts = torch.tensor(context.partition.sizes[1:], dtype=torch.float64)
        expected = (counts @ others.double() / counts.sum()).float()
    else:
        expected = trimmed_mean(others, 1)
    assert_near(state.params, expected)


def observed_round(context, trained):
    """One round, and in `trained` every client's parameters."""

    def observe(update, params_P, report):
        trained.append(params_P.clone())

    return run_round(initial_state(context), context, observe)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_hostile_client_does_not_carry_the_round(small_context, tamper, rule):
    """One of three returns its model times a million: the mean follows it, robust rules do not."""
    returned = {}

    def attack(update, replica, report):
        factor = 1e6 if update.client == 1 else 1
        load_params(replica.model, flatten_params(replica.model) * factor)
        returned[update.client] = flatten_params(replica.model)

    tamper(attack)
    settings = {"federation__clients_per_round": 3, "federation__method": "fedavg"}
    robust = small_context(**settings, federation__aggregation=rule, server__trim=0.34)
    state, _ = run_rounds(robust, 1)
    honest = torch.stack([returned[0], returned[2]])
    assert (state.params.abs() <= honest.abs().amax(0) * (1 + 1e-6)).all()
    hijacked, _ = run_rounds(small_context(**settings), 1)
    assert hijacked.params.abs().max() > 1e4


def test_a_round_whose_survivors_have_no_weight(small_context, tamper, monkeypatch):
    """FedDisco gave the only surviving client no weight: an error instead of a division by zero."""

    def diverge(update, replica, report):
        report.loss = report.loss * (1 if update.client == 0 else float("nan"))

    tamper(diverge)
    method = replace(METHODS["feddisco"], weights=lambda _: torch.tensor([0.0, 1.0, 1.0]))
    settings = METHODS.entries["feddisco"].settings
    monkeypatch.setitem(METHODS.entries, "feddisco", Entry(method, settings))
    context = small_context(
        federation__method="feddisco",
        federation__clients_per_round=3,
        federation__non_finite="drop",
    )
    with pytest.raises(NonFiniteError, match="every client with a weight"):
        run_rounds(context, 1)
