"""Clients elsewhere: a server without replicas, and clients that keep their own state, give the
bits of a run in one process."""

import json
import math

import pytest
import torch

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.errors import NonFiniteError
from semanticfl_ref.federated.flat import load_params
from semanticfl_ref.federated.remote import (
    Answer,
    numbers_of,
    report_from,
    sent_state,
    server_side,
    train_here,
)
from semanticfl_ref.federated.round import received, run_round, sample_clients
from semanticfl_ref.federated.state import initial_state

EVERYBODY = {"federation__method": "fedavg", "federation__clients_per_round": 3}
ACTIVE = {"fedcda": {"fedcda__warm_up": 1}, "fedrcl": {"fedrcl__threshold": 0.0}}


def play(make, settings, rounds, distort=lambda client, round, answer: answer):
    """Rounds whose answers travel: the state after them, the lines, and what clients keep."""
    server, context, kept, lines = server_side(make(**settings)), make(**settings), {}, []
    state = initial_state(server)
    for _ in range(rounds):
        server.replicas.received = {}
        for client in sample_clients(server.config, state.round + 1):
            update = received(state, context, client)
            sent = sent_state(server.method, state.method_state)
            answer, kept[client] = train_here(update, kept.get(client, {}), sent)
            numbers = json.loads(json.dumps(answer.numbers))  # plain, so that any transport will do
            answer = distort(client, state.round + 1, Answer(answer.params_P, numbers))
            server.replicas.received[client] = answer
        state, line = run_round(state, server)
        lines.append(line)
    return state, lines, kept


@pytest.mark.parametrize("name", METHODS)
def test_the_bits_of_one_process(small_context, name):
    settings = {"federation__method": name, **ACTIVE.get(name, {})}
    context = small_context(**settings)
    state, lines = initial_state(context), []
    for _ in range(3):
        state, line = run_round(state, context)
        lines.append(line)
    again, other_lines, kept = play(small_context, settings, 3)
    assert torch.equal(again.params, state.params)
    assert other_lines == lines
    own = context.method.client_state
    assert set(again.method_state) == set(state.method_state) - set(own)
    for client, rows in kept.items():
        for row in own:
            assert torch.equal(rows[row], state.method_state[row][client])


@pytest.mark.parametrize(
    "settings",
    [
        {"federation__server_optimizer": "fedadam"},
        {"federation__aggregation": "median", "federation__clients_per_round": 3},
        {"model__batch_norm": "local"},
    ],
)
def test_the_server_has_what_it_has_in_one_process(small_context, settings):
    settings = {"federation__method": "scaffold", **settings}
    context = small_context(**settings)
    state = initial_state(context)
    for _ in range(2):
        state, _ = run_round(state, context)
    again, _, _ = play(small_context, settings, 2)
    for name in again.tensors:
        assert torch.equal(again.tensors[name], state.tensors[name]), name


def spoiled(make, settings, how):
    """In round 2, client 1 answers otherwise."""

    def distort(client, round, answer):
        return how(answer) if (client, round) == (1, 2) else answer

    return play(make, settings, 2, distort)


def test_a_client_without_an_answer_is_dropped(small_context):
    settings = {**EVERYBODY, "federation__non_finite": "drop"}
    size = small_context(**settings).layout.size
    state, lines, _ = spoiled(small_context, settings, lambda answer: Answer.missing(size))
    assert [line["dropped"] for line in lines] == [[], [1]]
    assert state.params.isfinite().all()
    assert math.isfinite(lines[1]["loss"])
    kept, _, _ = spoiled(
        small_context,
        settings,
        lambda answer: Answer(torch.full((size,), math.nan), answer.numbers),
    )
    assert torch.equal(kept.params, state.params)


def test_a_client_that_returns_nan_stops_the_run_by_name(small_context):
    with pytest.raises(NonFiniteError, match="round 2, client 1: the parameters became NaN"):
        spoiled(
            small_context,
            EVERYBODY,
            lambda answer: Answer(answer.params_P * math.nan, answer.numbers),
        )


def test_a_client_that_diverges_keeps_its_state(small_context, tamper):
    settings = {"federation__method": "scaffold", "federation__non_finite": "drop"}

    def diverge(update, replica, report):
        if (update.client, update.round) == (1, 2):
            load_params(replica.model, torch.full_like(update.start_P, math.nan))

    tamper(diverge)
    _, lines, kept = play(small_context, EVERYBODY | settings, 2)
    assert lines[1]["dropped"] == [1]
    assert all(row.isfinite().all() for row in kept[1].values())


def test_a_report_survives_as_numbers(small_context):
    context = small_context(federation__method="semanticfl")
    update = received(initial_state(context), context, 0)
    (report,) = context.replicas.train([update])
    again = report_from(numbers_of(report))
    assert numbers_of(again) == numbers_of(report)
    assert again.first.gradients == report.first.gradients
    assert len(again.first.indices) == 0, "which images a client has is not told"
