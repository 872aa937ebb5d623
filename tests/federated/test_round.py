"""Properties of a round: repeatable, independent of the test data, robust against a bad client."""

from dataclasses import replace

import pytest
import torch
from quadratic import run_rounds, trained_alone

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.errors import NonFiniteError
from semanticfl_ref.federated import aggregate, replicas
from semanticfl_ref.federated.flat import flatten_params, load_params
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.randomness import generator


def test_a_round_by_hand(small_context):
    """One client, one step, plain SGD: w - lr * (gradient + decay * w), without the loop's code."""
    context = small_context(
        federation__method="fedavg",
        partition__clients=1,
        federation__clients_per_round=1,
        federation__batch_size=64,
        federation__momentum=0.0,
    )
    state, data = initial_state(context), context.dataset
    model = ResNet10(2, 3)
    load_params(model, state.params)
    (batch,) = epoch_batches(
        context.partition.indices[0], batch_size=64, generator=generator(0, "batches", 1, 0, 0)
    )
    logits, _ = model(network_input(data.train_images[batch]))
    torch.nn.functional.cross_entropy(logits, data.train_labels[batch]).backward()
    settings = context.config.federation
    with torch.no_grad():
        for p in model.parameters():
            p -= settings.learning_rate * (p.grad + settings.weight_decay * p)
    after, line = run_round(state, context)
    torch.testing.assert_close(after.params, flatten_params(model), rtol=1e-5, atol=1e-7)
    assert line["steps"] == 1
    assert line["clients"] == [0]
    assert line["bytes_up"] == 4 * context.layout.size


def test_bitwise_repeatable_and_no_global_randomness(small_context):
    first, lines = run_rounds(small_context())
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    second, again = run_rounds(small_context())
    assert torch.equal(first.params, second.params)
    assert lines == again
    assert torch.equal(before, torch.random.get_rng_state())


def test_zero_strength_is_fedavg_bitwise(small_context):
    """Over the entries that both have; weight decay still moves unused heads, which come last."""
    plain, _ = run_rounds(small_context(federation__method="fedavg"))
    idle, _ = run_rounds(small_context(semanticfl__lambda_kd=0.0, semanticfl__lambda_con=0.0))
    assert len(idle.params) > len(plain.params)
    assert torch.equal(idle.params[: len(plain.params)], plain.params)


def test_its_proximal_term_alone_is_fedprox(small_context):
    near, _ = run_rounds(small_context(federation__method="fedprox", fedprox__mu=0.5))
    zero = {"semanticfl__lambda_kd": 0.0, "semanticfl__lambda_con": 0.0}
    same, lines = run_rounds(small_context(**zero, semanticfl__mu=0.5))
    assert torch.equal(same.params[: len(near.params)], near.params)
    assert set(lines[0]["terms"]) == {"cross_entropy", "proximal"}


@pytest.mark.parametrize("term", ["lambda_kd", "lambda_con"])
def test_each_term_alone_changes_the_result_and_is_reported(small_context, term):
    other = {"lambda_kd": "semanticfl__lambda_con", "lambda_con": "semanticfl__lambda_kd"}[term]
    state, lines = run_rounds(small_context(**{other: 0.0}), rounds=1)
    plain, _ = run_rounds(small_context(federation__method="fedavg"), rounds=1)
    assert not torch.equal(state.params[: len(plain.params)], plain.params)
    name = {"lambda_kd": "consistency", "lambda_con": "contrast"}[term]
    assert set(lines[0]["terms"]) == {"cross_entropy", name} == set(lines[0]["gradient_share"])
    assert sum(lines[0]["gradient_share"].values()) == pytest.approx(1)


def test_anchors_are_sent_once(small_context):
    context = small_context(federation__clients_per_round=3)
    _, lines = run_rounds(context)
    model, anchors = 4 * context.layout.size * 3, 4 * (30 * 8 + 3 * (3 * 6))
    assert [line["bytes_down"] for line in lines] == [model + anchors, model]


def test_a_client_does_not_depend_on_who_trained_before_it(small_context):
    """Neither momentum nor BatchNorm's statistics nor a gradient crosses clients or rounds."""
    context = small_context(federation__momentum=0.9, federation__local_epochs=2)
    start_P, trained = initial_state(context).params, []
    for clients in ((1,), (0, 1), (2, 0, 1)):
        for client in clients:
            params_P, _ = trained_alone(context, client, start_P)
        trained.append(params_P)
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], start_P)


def test_cohorts_do_not_change_the_result(small_context, monkeypatch):
    """Averaging one, two or all clients at a time gives the same bits."""
    results = []
    for size in (1, 2, 16):
        monkeypatch.setattr(replicas, "COHORT", size)
        results.append(run_rounds(small_context(federation__clients_per_round=3)))
    for state, lines in results[1:]:
        assert torch.equal(state.params, results[0][0].params)
        assert lines == results[0][1]


def test_cohorts_of_selected_models_do_not_change_the_result(small_context, monkeypatch):
    settings = {
        "federation__method": "fedcda",
        "fedcda__warm_up": 0,
        "federation__clients_per_round": 3,
    }
    whole, lines = run_rounds(small_context(**settings))
    monkeypatch.setattr(aggregate.cohorts, "__defaults__", (1,))
    single, again = run_rounds(small_context(**settings))
    assert torch.equal(whole.params, single.params)
    assert lines == again


def test_test_images_do_not_reach_the_parameters(small_context):
    """With other pixels and labels in the test and validation parts, the model is the same."""
    first = run_rounds(small_context())[0]
    data = small_context().dataset
    blank = replace(data, test_images=data.test_images * 0, test_labels=data.test_labels * 0)
    validated = replace(
        blank, validation_images=blank.test_images, validation_labels=blank.test_labels
    )
    for dataset in (blank, validated):
        other = run_rounds(replace(small_context(), dataset=dataset))[0]
        assert torch.equal(other.params, first.params)


def test_running_statistics_are_averaged_like_any_parameter(small_context):
    """By image counts over those who took part: neither the first client's, nor left out."""
    context = small_context(federation__method="fedavg", federation__clients_per_round=2)
    start = initial_state(context)
    after, line = run_round(start, context)
    trained, counts = [], [context.partition.sizes[k] for k in line["clients"]]
    for client in line["clients"]:
        params_P, _ = trained_alone(context, client, start.params)
        trained.append(params_P.double()[context.layout.buffers])
    running = [b for b in context.model.buffers() if b.is_floating_point()]
    assert len(context.layout.buffers) == sum(b.numel() for b in running) > 0
    average = after.params[context.layout.buffers].double()
    expected = (counts[0] * trained[0] + counts[1] * trained[1]) / sum(counts)
    torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(average, trained[0])


def break_client(number):
    def change(update, replica, report):
        if update.client == number:
            next(replica.model.parameters())[0] = float("nan")

    return change


def test_a_broken_client_stops_the_run_by_name(small_context, tamper):
    tamper(break_client(1))
    with pytest.raises(NonFiniteError, match="round 1, client 1: the parameters"):
        run_rounds(small_context(federation__clients_per_round=3), rounds=1)


@pytest.mark.parametrize("cohort", [1, 16])
def test_a_broken_client_is_dropped_and_leaves_the_others_intact(
    small_context, tamper, monkeypatch, cohort
):
    tamper(break_client(2))
    monkeypatch.setattr(replicas, "COHORT", cohort)
    context = small_context(
        federation__clients_per_round=3, federation__non_finite="drop", federation__method="fedavg"
    )
    state, lines = run_rounds(context, rounds=1)
    assert lines[0]["dropped"] == [2]
    assert torch.isfinite(state.params).all()
    start_P = initial_state(small_context(federation__method="fedavg")).params
    trained, losses = [], []
    for client in (0, 1):
        params_P, report = trained_alone(context, client, start_P)
        trained.append(params_P.double())
        losses.append(float(report.loss) / report.steps)
    assert lines[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6), (
        "a dropped client's loss is not part of the round's, even if it is finite"
    )
    counts = [len(context.partition.indices[k]) for k in (0, 1)]
    expected = (counts[0] * trained[0] + counts[1] * trained[1]) / sum(counts)
    torch.testing.assert_close(state.params.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_round_without_any_surviving_weight(small_context, tamper):
    """All clients diverge: the run stops by name instead of dividing by zero."""

    def diverge(update, replica, report):
        report.loss = report.loss * float("nan")

    tamper(diverge)
    with pytest.raises(NonFiniteError, match="every client with a weight"):
        run_rounds(small_context(federation__non_finite="drop"), rounds=1)


def test_local_batch_norm_keeps_each_clients_own(small_context):
    context = small_context(
        model__batch_norm="local", federation__method="fedavg", federation__clients_per_round=2
    )
    state, lines = run_rounds(context, rounds=1)
    absent = ({0, 1, 2} - set(lines[0]["clients"])).pop()
    start_P = initial_state(small_context(federation__method="fedavg")).params
    start = start_P[context.layout.batch_norm]
    assert torch.equal(state.batch_norm[absent], start)
    assert all(not torch.equal(state.batch_norm[k], start) for k in lines[0]["clients"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_group_norm(small_context, name):
    """Also with a server optimizer, and with a client that has a batch of a single image."""
    context = small_context(
        federation__method=name,
        model__norm="group",
        federation__server_optimizer="fedadam",
        federation__batch_size=3,
    )
    start_P = initial_state(context).params
    state, lines = run_rounds(context, rounds=2)
    assert len(context.layout.optimised) == context.layout.size
    assert state.params.isfinite().all() and not torch.equal(state.params, start_P)
    assert all(line["test_accuracy"] >= 0 for line in lines)


def test_an_observer_sees_every_local_update(small_context):
    context, seen = small_context(federation__clients_per_round=3), []
    state = initial_state(context)

    def observe(update, params_P, report):
        seen.append((update.client, params_P.clone(), report))

    _, line = run_round(state, context, observe)
    unobserved = run_round(state, context)[1]
    assert [client for client, _, _ in seen] == line["clients"]
    assert line == unobserved
    for client, params_P, report in seen:
        params_again_P, again = trained_alone(context, client, state.params)
        assert torch.equal(params_P, params_again_P)
        assert report.steps == again.steps


def test_the_first_batch_is_reported(small_context):
    context = small_context()
    state = initial_state(context)
    first = trained_alone(context, 0, state.params)[1].first
    weighted = sum(weight * value for weight, value in first.terms.values())
    assert set(first.indices.tolist()) <= set(context.partition.indices[0].tolist())
    assert first.loss == pytest.approx(weighted.item(), rel=1e-6)
    assert set(first.terms) == {"cross_entropy", "consistency", "contrast"}
    assert set(first.gradients) == set(first.terms)
