"""Robust rules and server optimisers on numbers that can be redone on paper."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quadratic import MEAN, near, play

from semanticfl_ref.config.settings import build
from semanticfl_ref.errors import NonFiniteError, UserError
from semanticfl_ref.federated import round as story
from semanticfl_ref.federated.aggregate import (
    Aggregator,
    server_memory,
    server_step,
    trimmed,
    trimmed_mean,
)
from semanticfl_ref.federated.flat import load_params, flatten_params
from semanticfl_ref.federated.methods import METHODS

ROWS = torch.tensor([[1.0, -8.0], [2.0, 0.0], [4.0, 1.0], [7.0, 2.0], [1e9, 3.0]])


def aggregate(rows, rule, trim=0.2, weights=None):
    aggregator = Aggregator(torch.zeros(rows.shape[1]), rule, trim)
    for client, row in enumerate(rows):
        aggregator.add(client, row, 1.0 if weights is None else weights[client])
    return aggregator.finish().tolist()


def test_median_and_trimmed_mean_on_numbers():
    assert aggregate(ROWS, "median") == [4.0, 1.0]
    assert aggregate(ROWS[:4], "median") == [3.0, 0.5], "of an even number: the middle two's mean"
    assert aggregate(ROWS, "trimmed-mean") == pytest.approx([(2 + 4 + 7) / 3, 1.0])
    assert aggregate(ROWS, "trimmed-mean", 0.4) == aggregate(ROWS, "median")
    assert aggregate(ROWS, "median", weights=[100.0, 1, 1, 1, 1]) == [4.0, 1.0], (
        "each client counts once"
    )
    assert aggregate(ROWS[:2], "mean", weights=[3.0, 1.0]) == [1.25, -6.0]


def test_trimmed_mean_in_chunks(monkeypatch):
    rows = list(torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)))
    whole = trimmed_mean(rows, 2)
    monkeypatch.setattr("semanticfl_ref.federated.aggregation.CHUNK", 64)
    assert torch.equal(trimmed_mean(rows, 2), whole)
    near(trimmed_mean(rows, 3), torch.stack(rows).median(0).values)


def test_a_share_of_clients_is_counted_exactly():
    assert trimmed(0.29, 100) == 29 and trimmed(0.1, 30) == 3 and trimmed(0.2, 4) == 0


def test_a_trim_that_cuts_nobody_is_refused():
    with pytest.raises(
        UserError, match="server.trim = 0.1 of federation.clients_per_round = 5 cuts nobody.*0.2"
    ):
        build({"federation.aggregation": "trimmed-mean", "server.trim": 0.1})


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean"])
def test_a_row_that_is_not_finite_is_left_out(rule):
    aggregator = Aggregator(torch.zeros(2), rule, 0.2)
    bad = ROWS[0].clone()
    bad[1] = float("inf")
    assert [aggregator.add(client, row, 1.0) for client, row in enumerate([bad, *ROWS[1:4]])] == [
        False,
        True,
        True,
        True,
    ]
    assert aggregator.clients == [1, 2, 3] and aggregator.weight == 3
    assert aggregator.update_norms == pytest.approx({1: 2.0, 2: 17**0.5, 3: 53**0.5})
    assert aggregator.finish().tolist() == pytest.approx([13 / 3 if rule != "median" else 4.0, 1.0])


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_hostile_client_does_not_carry_the_round(small_context, monkeypatch, rule):
    """One of three returns its row times a million: the mean follows it, the robust rules stay
    among the honest rows.
    """
    honest, rows = story.train_client, []

    def train(update):
        report, model = honest(update), update.context.model
        load_params(model, flatten_params(model) * (1e6 if update.client == 1 else 1))
        rows.append(flatten_params(model))
        return report

    monkeypatch.setattr(story, "train_client", train)
    settings = {"federation__clients_per_round": 3, "federation__method": "fedavg"}
    state, _ = play(small_context(**settings, federation__aggregation=rule, server__trim=0.34), 1)
    honest_rows = torch.stack([rows[0], rows[2]])
    assert (state.params.abs() <= honest_rows.abs().amax(0) * (1 + 1e-6)).all()
    hijacked, _ = play(small_context(**settings), 1)
    assert hijacked.row.abs().max() > 1e4


def config_of(kind, **server):
    defaults = {"learning_rate": 0.0, "momentum": 0.9, "beta_2": 0.99, "tau": 1e-3}
    return SimpleNamespace(
        federation=SimpleNamespace(server_optimizer=kind),
        server=SimpleNamespace(**defaults | server),
    )


LAYOUT = SimpleNamespace(buffers=torch.tensor([1]))


def steps(config, averages):
    """The global rows that follow [0, 5] when the clients' averages are these; entry 1 is a buffer."""
    row, memory, rows = torch.tensor([0.0, 5.0]), server_memory(config, torch.zeros(2)), []
    for average in averages:
        row = server_step(config, LAYOUT, memory, row, torch.tensor(average))
        rows.append(row.tolist())
    return rows


def test_no_server_optimizer_is_the_average_itself():
    average = torch.tensor([0.1, 0.3])
    assert server_step(config_of("none"), LAYOUT, {}, torch.zeros(2), average) is average


def test_fedavgm_on_numbers():
    """Averages 1 and 2.5: Delta = 1, v = 1, w = 1; Delta = 1.5, v = 0.5 + 1.5 = 2, w = 3. With eta
    = 1/2: w = 0.5; Delta = 2, v = 2.5, w = 1.75.
    """
    near(
        torch.tensor(steps(config_of("fedavgm", momentum=0.5), [[1.0, 7.0], [2.5, 6.0]])),
        torch.tensor([[1.0, 7.0], [3.0, 6.0]]),
    )
    near(
        torch.tensor(
            steps(config_of("fedavgm", momentum=0.5, learning_rate=0.5), [[1.0, 7.0], [2.5, 6.0]])
        ),
        torch.tensor([[0.5, 7.0], [1.75, 6.0]]),
    )


def test_fedadam_on_numbers():
    """beta_1 = 1/2, beta_2 = 3/4, tau = 1, eta = 1: Delta = 2: m = 1, v = 1, w = 1/2. Delta = 2: m
    = 3/2, v = 3/4 + 1 = 7/4, w = 1/2 + 1.5 / (sqrt(7/4) + 1).
    """
    config = config_of("fedadam", momentum=0.5, beta_2=0.75, tau=1.0, learning_rate=1.0)
    near(
        torch.tensor(steps(config, [[2.0, 7.0], [2.5, 6.0]])),
        torch.tensor([[0.5, 7.0], [0.5 + 1.5 / (1.75**0.5 + 1), 6.0]]),
    )


def test_fedavgm_with_a_method_over_two_rounds(quadratic_world):
    """Round 1: Delta = v = 3/4 t. Round 2: from 3/4 t clients go 3/4 of the way on: Delta = 3/16 t,
    v = 3/8 t + 3/16 t = 9/16 t, w = 21/16 t.
    """
    state, _ = play(
        quadratic_world(
            federation__method="scaffold",
            scaffold__control_scale=0.0,
            federation__server_optimizer="fedavgm",
            server__momentum=0.5,
        ),
        2,
    )
    near(state.params, 21 / 16 * MEAN)
    near(state.memory["server.velocity"], 9 / 16 * MEAN)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_running_averages_take_the_clients_average(small_context, kind):
    """And Adam leaves every variance positive."""
    context = small_context(federation__method="fedavg", federation__server_optimizer=kind)
    state, _ = play(context, 1)
    plain, _ = play(small_context(federation__method="fedavg"), 1)
    buffers = context.layout.buffers
    assert torch.equal(state.params[buffers], plain.row[buffers]) and not torch.equal(
        state.params, plain.row
    )
    assert len(buffers) == sum(
        shape.numel()
        for name, shape in zip(context.layout.names, context.layout.shapes, strict=True)
        if "running" in name
    )


def test_a_round_whose_survivors_weigh_nothing(small_context, monkeypatch):
    """FedDisco gave the only surviving client no weight: the run stops by name instead of dividing
    by zero.
    """
    honest = story.train_client

    def train(update):
        report = honest(update)
        report.loss = report.loss * (1 if update.client == 0 else float("nan"))
        return report

    monkeypatch.setattr(story, "train_client", train)
    method = replace(
        METHODS["feddisco"], weights=lambda participants: torch.tensor([0.0, 1.0, 1.0])
    )
    monkeypatch.setitem(METHODS, "feddisco", method)
    with pytest.raises(NonFiniteError, match="every client that has a weight"):
        play(
            small_context(
                federation__method="feddisco",
                federation__clients_per_round=3,
                federation__non_finite="drop",
            ),
            1,
        )
