"""Every method's equation on numbers that can be redone on paper: three clients, three parameters,
the losses |w - t_k|^2 / 2.

With learning rate 1/2 a plain step goes half-way to t_k: from 0, two steps end at 3/4 t_k.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from quadratic import MEAN, TARGETS, assert_near, run_rounds

from semanticfl_ref.config.methods import FedCDASettings, FedDiscoSettings, ScaffoldSettings
from semanticfl_ref.config.settings import FederationSettings
from semanticfl_ref.federated.methods.fedcda import FEDCDA, batches, least_divergent
from semanticfl_ref.federated.methods.feddisco import discrepancy, discrepancy_weights
from semanticfl_ref.federated.methods.fedprox import proximal
from semanticfl_ref.federated.methods.fedrcl import divergence_penalty, supervised_contrast
from semanticfl_ref.federated.methods.method import SampledClients
from semanticfl_ref.federated.methods.moon import model_contrast
from semanticfl_ref.federated.methods.scaffold import effective_steps, update_controls
from semanticfl_ref.federated.round import run_round


def test_fedavg_weighs_by_images(quadratic_context):
    state, lines = run_rounds(quadratic_context(images=(2, 4, 10), federation__method="fedavg"), 1)
    average = (2 * TARGETS[0] + 4 * TARGETS[1] + 10 * TARGETS[2]) / 16
    assert_near(state.params, 0.75 * average)
    assert lines[0]["steps"] == 6
    assert state.method_state == {}


def test_fedprox_stays_nearer(quadratic_context):
    """mu = 1: the first step goes to t/2; there the gradient is (t/2 - t) + 1 (t/2 - 0) = 0, so the
    second stays."""
    state, lines = run_rounds(quadratic_context(federation__method="fedprox", fedprox__mu=1.0), 1)
    assert_near(state.params, 0.5 * MEAN)
    # The term is 0 before the first step and |t/2|^2 / 2 before the second; the mean over steps and
    # clients is half of that.
    expected = float((TARGETS / 2).square().sum(1).mean()) / 4
    assert lines[0]["terms"]["proximal"] == pytest.approx(expected, rel=1e-5)
    assert set(lines[0]["gradient_share"]) == {"cross_entropy"}, (
        "a distance between parameters does not depend on the features"
    )


def test_the_proximal_term_is_half_the_squared_distance():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    value = proximal([(w, torch.zeros(2)), (torch.ones(1), torch.zeros(1))])
    value.backward()
    assert value.item() == 13
    assert w.grad.tolist() == [3.0, 4.0]


def test_scaffold_over_two_rounds(quadratic_context):
    """Round 1, control variates zero, K = 2: y_i = 3/4 t_i; the gradients were -t_i and -t_i/2, so
    c_i = -3/4 t_i and c = -3/4 t. Round 2 starts at 3/4 t; the corrected gradient is
    w - 1/4 t_i - 3/4 t: the steps go to 3/4 t + 1/8 t_i and 3/4 t + 3/16 t_i."""
    context = quadratic_context(federation__method="scaffold")
    state, _ = run_rounds(context, 1)
    assert_near(state.params, 0.75 * MEAN)
    assert_near(state.method_state["scaffold.clients"], -0.75 * TARGETS)
    assert_near(state.method_state["scaffold.server"], -0.75 * MEAN)
    state, line = run_round(state, context)
    assert_near(state.params, 0.9375 * MEAN)
    assert_near(state.method_state["scaffold.clients"], 0.75 * MEAN - 0.9375 * TARGETS)
    assert_near(state.method_state["scaffold.server"], -0.1875 * MEAN)
    assert line["bytes_down"] == line["bytes_up"] == 3 * 4 * (3 + 3), (
        "three parameters and their control variates, each way"
    )


def test_scaffold_counts_the_steps_made(quadratic_context):
    """Batches of 2, one epoch: 1, 2 and 1 steps, since a last batch of one image joins the one
    before. After one step c_i is the first gradient, -t_i; after two the mean of -t_i and
    -t_i/2."""
    context = quadratic_context(
        images=(2, 4, 3),
        federation__method="scaffold",
        federation__batch_size=2,
        federation__local_epochs=1,
    )
    state, lines = run_rounds(context, 1)
    controls = state.method_state["scaffold.clients"]
    assert lines[0]["steps"] == 1 + 2 + 1
    assert_near(controls, torch.stack([-TARGETS[0], -0.75 * TARGETS[1], -TARGETS[2]]))
    assert_near(state.method_state["scaffold.server"], controls.mean(0))


def test_scaffold_leaves_absent_clients_alone(quadratic_context):
    context = quadratic_context(federation__method="scaffold", federation__clients_per_round=2)
    state, lines = run_rounds(context, 1)
    (absent,) = {0, 1, 2} - set(lines[0]["clients"])
    controls = state.method_state["scaffold.clients"]
    assert not controls[absent].any()
    assert_near(state.method_state["scaffold.server"], controls.sum(0) / 3)


@pytest.mark.parametrize(("steps", "control"), [("effective", 1.0), ("made", 1.25)])
def test_scaffold_under_momentum(steps, control):
    """Constant gradient g = 1, momentum 1/2, rate 0.1: velocities 1 and 3/2, so two steps move by
    0.25; over K eta = 0.2 that is 1.25 g, over 2.5 eta it is g."""
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([w], 0.1, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        w.sum().backward()
        optimizer.step()
    state = {"scaffold.clients": torch.zeros(3, 3), "scaffold.server": torch.zeros(3)}
    update = SimpleNamespace(
        settings=ScaffoldSettings(steps=steps),
        config=SimpleNamespace(
            federation=FederationSettings(learning_rate=0.1, momentum=0.5),
            partition=SimpleNamespace(clients=3),
        ),
        context=SimpleNamespace(layout=SimpleNamespace(buffers=torch.tensor([2]))),
        client=1,
        round=1,
        start_P=torch.zeros(3),
        method_state={name: value.clone() for name, value in state.items()},
    )
    update_controls(state, update, w.detach(), SimpleNamespace(steps=2))
    expected = torch.zeros(3, 3)
    expected[1, :2] = control  # the third entry is a buffer
    assert_near(state["scaffold.clients"], expected)
    assert effective_steps(2, 0.5) == 2.5
    assert effective_steps(7, 0.0) == 7


@pytest.mark.parametrize("steps", ["effective", "made"])
def test_scaffold_after_the_momentum_step(quadratic_context, steps):
    """Momentum 1/2, K = 2. Round 1: velocities -t_i and -t_i, since the second gradient is -t_i/2;
    so y_i = t_i, and c_i is their mean -t_i, as c is -t. Round 2 starts at t, the correction is
    t_i - t: velocity t - t_i, which the correction undoes, and from t again 3/2 (t - t_i). The
    model goes to t + 1/4 (t_i - t), and c_i+ = 5/4 (t - t_i)."""
    context = quadratic_context(
        federation__method="scaffold",
        federation__momentum=0.5,
        scaffold__place="step",
        scaffold__steps=steps,
    )
    state, _ = run_rounds(context, 1)
    assert_near(state.params, MEAN)
    assert_near(state.method_state["scaffold.clients"], -TARGETS)
    trained = []
    state, _ = run_round(state, context, lambda _, params_P, __: trained.append(params_P.clone()))
    assert_near(torch.stack(trained), MEAN + (TARGETS - MEAN) / 4)
    assert_near(state.method_state["scaffold.clients"], 1.25 * (MEAN - TARGETS))
    assert_near(state.method_state["scaffold.server"], torch.zeros(3))


def test_the_place_of_the_correction_does_not_matter_without_momentum(quadratic_context):
    places = ("gradient", "step")
    contexts = [quadratic_context(federation__method="scaffold", scaffold__place=p) for p in places]
    one, other = (run_rounds(context, 3)[0] for context in contexts)
    assert_near(one.params, other.params)
    assert_near(one.method_state["scaffold.clients"], other.method_state["scaffold.clients"])


def test_moon_on_vectors():
    z, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert model_contrast(z, z, y, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert model_contrast(z, y, z, 0.5).item() == pytest.approx(math.log(1 + math.exp(2)))
    free = torch.tensor([[1.0, 1.0]], requires_grad=True)
    value = model_contrast(free, y, y, 0.5)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert free.grad.abs().max() == 0, "in the first round both reference models are the same"


RELAXED = torch.tensor([[1.0, 0.0], [1.2, 1.6], [0.0, 1.0]])  # cosine similarities 0.6, 0 and 0.8
LABELS = torch.tensor([0, 0, 1])


def test_supervised_contrast_on_vectors():
    """Positives 0.6, 0.6 and, alone in its class, itself; negatives 0, 0.8 and {0.8, 0}."""
    terms = [
        math.log(1 + math.exp(0 - 0.6)),
        math.log(1 + math.exp(0.8 - 0.6)),
        math.log(1 + math.exp(0.8 - 1) + math.exp(0 - 1)),
    ]
    value = supervised_contrast(RELAXED, LABELS, 1.0)
    assert value.item() == pytest.approx(sum(terms) / 3)
    nearest_only = [*terms[:2], math.log(1 + math.exp(0.8 - 1))]
    value = supervised_contrast(RELAXED, LABELS, 1.0, negatives=1)
    assert value.item() == pytest.approx(sum(nearest_only) / 3)
    with_itself = [
        (terms[0] + math.log(1 + math.exp(-1))) / 2,
        (terms[1] + math.log(1 + math.exp(0.8 - 1))) / 2,
        terms[2],
    ]
    value = supervised_contrast(RELAXED, LABELS, 1.0, positives=5)
    assert value.item() == pytest.approx(sum(with_itself) / 3), "itself is a positive too"


def test_divergence_penalty_on_vectors():
    """The pair of class 0 has similarity 0.6: counted from threshold 0.5, not from 0.7."""
    expected = 2 * math.log(1 + math.exp(0.6 - 1)) / 3
    assert divergence_penalty(RELAXED, LABELS, 1.0, 0.5).item() == pytest.approx(expected)
    assert divergence_penalty(RELAXED, LABELS, 1.0, 0.7).item() == 0


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0, 0, 1]])
def test_relaxed_contrast_is_finite_with_its_gradient(labels):
    """One class, no pair of one class, a feature of zero."""
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 0.0]], requires_grad=True)
    labels_B = torch.tensor(labels)
    contrast = supervised_contrast(features, labels_B, 0.05)
    value = contrast + divergence_penalty(features, labels_B, 0.05, 0.7)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    if len(set(labels)) == 1:
        assert contrast.item() == 0


def sampled(histograms, a=0.5, b=0.1):
    histograms_KC = torch.tensor(histograms)
    return SampledClients(
        config=SimpleNamespace(method=SimpleNamespace(a=a, b=b)),  # b < 0 is no valid setting
        histograms_KC=histograms_KC,
    )


def test_feddisco_on_numbers():
    """16 images, two classes. KL to uniform: log 2, 0, log 2; so d = 1/2, 0, 1/2 and n = 1/2, 1/4,
    1/4: n - d/2 + 0.1 = 0.35, 0.35, 0.1."""
    skewed = [[8, 0], [2, 2], [0, 4]]
    expected = torch.tensor([0.5, 0, 0.5], dtype=torch.float64)
    assert_near(discrepancy(torch.tensor(skewed)), expected)
    expected = torch.tensor([0.35, 0.35, 0.1], dtype=torch.float64)
    assert_near(discrepancy_weights(sampled(skewed)) / 16, expected)
    weights = discrepancy_weights(sampled(skewed, a=1.0, b=0.0)).tolist()
    assert weights == [0.0, 4.0, 0.0], "ReLU"
    weights = discrepancy_weights(sampled(skewed, a=0.0, b=-1.0)).tolist()
    assert weights == [8.0, 4.0, 4.0], "all weights vanish: sample counts"
    weights = discrepancy_weights(sampled([[2, 2], [3, 3]], a=5.0, b=0.0)).tolist()
    assert weights == [4.0, 6.0], "all uniform: no discrepancy"
    assert (FedDiscoSettings().a, FedDiscoSettings().b) == (0.5, 0.1)


def test_fedcda_chooses_on_numbers():
    """Newest and older models of three clients, one parameter. (10, 9, 9) has variance 2/9,
    (0, 4, 1) has 26/9; with L = 2 that is the objective."""
    models = [
        torch.tensor([[0.0], [10.0]]),
        torch.tensor([[4.0], [9.0]]),
        torch.tensor([[9.0], [1.0]]),
    ]
    losses = [torch.zeros(2) for _ in models]
    assert least_divergent(models, losses, [1, 1, 1], 2.0) == [1, 1, 0]
    losses[0][1] = 9  # a mean loss of 3 more than (0, 4, 1)'s 26/9 outweighs
    assert least_divergent(models, losses, [1, 1, 1], 2.0) == [0, 0, 1]
    newest = least_divergent(models, [torch.zeros(2)] * 3, [1, 1, 1], 0.0)
    assert newest == [0, 0, 0], "without a difference, the newest"
    # Weighted 3 : 1, models 0 and 4 or 0 and 2: variances 3/16 * 16 = 3 and 3/16 * 4 = 3/4; the
    # second's loss of 10 counts a quarter: 2.5 + 3/4 > 3.
    pair = [torch.tensor([[0.0]]), torch.tensor([[4.0], [2.0]])]
    assert least_divergent(pair, [torch.zeros(1), torch.tensor([0.0, 8.0])], [3, 1], 2.0) == [0, 1]
    assert least_divergent(pair, [torch.zeros(1), torch.tensor([0.0, 10.0])], [3, 1], 2.0) == [0, 0]


@pytest.mark.parametrize(("parameter", "expected"), [(0, [0, 0]), (1, [0, 1])])
def test_fedcda_only_looks_at_parameters(parameter, expected):
    """Entry 0 favours the newest model, entry 1 the older one; the other entry is a buffer."""
    settings = FedCDASettings(memory=2, warm_up=0, batches=1, smoothness=2.0)
    context = SimpleNamespace(
        config=SimpleNamespace(method=settings, run=SimpleNamespace(seed=0)),
        partition=SimpleNamespace(sizes=(1, 1)),
        layout=SimpleNamespace(optimised=torch.tensor([parameter])),
    )
    state = {
        "fedcda.models": torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 9.0], [4.0, 0.0]]]),
        "fedcda.losses": torch.zeros(2, 2),
        "fedcda.valid": torch.tensor([1, 2]),
        "fedcda.selected": torch.tensor([0, 0]),
    }
    models = FEDCDA.select_models(context, state, [0, 1], 1)
    assert state["fedcda.selected"].tolist() == expected
    assert torch.equal(models[1].params_P, state["fedcda.models"][1, expected[1]])


@pytest.mark.parametrize(("weights", "expected"), [("even", [1, 1]), ("images", [1, 3])])
def test_fedcda_weighs_evenly_or_by_images(weights, expected):
    """Client 1, which has 3 of 4 images, lost 3 less with its older model, which is 4 away instead
    of 0. Evenly, L = 1: a variance of 4 costs 2, more than the 3/2 that it gains. By images the
    variance is 3/16 * 16 = 3, which costs 3/2, less than the 9/4 that it gains."""
    settings = FedCDASettings(memory=2, warm_up=0, batches=1, weights=weights)
    context = SimpleNamespace(
        config=SimpleNamespace(method=settings, run=SimpleNamespace(seed=0)),
        partition=SimpleNamespace(sizes=(1, 3)),
        layout=SimpleNamespace(optimised=torch.tensor([0])),
    )
    state = {
        "fedcda.models": torch.tensor([[[0.0], [0.0]], [[0.0], [4.0]]]),
        "fedcda.losses": torch.tensor([[0.0, 0.0], [3.0, 0.0]]),
        "fedcda.valid": torch.tensor([1, 2]),
        "fedcda.selected": torch.tensor([0, 0]),
    }
    models = FEDCDA.select_models(context, state, [0, 1], 1)
    assert [model.weight for model in models] == expected
    assert state["fedcda.selected"].tolist() == [0, 0 if weights == "even" else 1]
    assert FedCDASettings().weights == "even"


def test_fedcda_splits_the_round():
    source = torch.Generator().manual_seed(0)
    split = batches([3, 5, 7, 8, 9], 3, 3, source)
    assert sorted(map(len, split)) == [1, 2, 2]
    assert sorted(itertools.chain(*split)) == [3, 5, 7, 8, 9]
    largest = max(map(len, batches(list(range(100)), 3, 3, source)))
    assert largest <= 7, "3^7 = 2187 combinations, 3^8 are too many"
    assert batches([4], 3, 3, source) == [[4]]


def test_fedcda_remembers_absent_clients(quadratic_context):
    """One client per round, no warm-up: the second round averages the models of both clients seen;
    with absent clients left out, the new model stands alone."""
    settings = {
        "federation__method": "fedcda",
        "fedcda__warm_up": 0,
        "federation__clients_per_round": 1,
        "run__seed": 2,
    }
    for absent in ("remembered", "left-out"):
        state, lines = run_rounds(quadratic_context(**settings, fedcda__absent=absent), 2)
        one, two = (line["clients"][0] for line in lines)
        assert one != two, "the seed samples two clients"
        first = 0.75 * TARGETS[one]
        second = first + 0.75 * (TARGETS[two] - first)
        assert_near(state.params, (first + second) / 2 if absent == "remembered" else second)
        # The loss is that of the last epoch, whose one step is at t/2: |t/2|^2 / 2.
        loss = state.method_state["fedcda.losses"][one, 0]
        assert_near(loss, TARGETS[one].square().sum() / 8)
        assert state.method_state["fedcda.valid"].sum() == 2


def test_fedcda_takes_an_older_model_that_fits_better(quadratic_context):
    """All three clients, memory 2, L large: round 2's selection minimises the variance over the 2^3
    combinations, found here by trying them."""
    context = quadratic_context(
        federation__method="fedcda",
        fedcda__warm_up=0,
        fedcda__memory=2,
        fedcda__batches=1,
        fedcda__smoothness=1000.0,
    )
    state, _ = run_rounds(context, 1)
    old, middle = 0.75 * TARGETS, 0.75 * MEAN
    assert_near(state.params, middle)
    new = middle + 0.75 * (TARGETS - middle)
    state, _ = run_round(state, context)
    choices = [torch.stack([(new, old)[(code >> k) & 1][k] for k in range(3)]) for code in range(8)]
    best = min(choices, key=lambda models: (models - models.mean(0)).square().sum().item())
    assert not torch.equal(best, new), "otherwise the newest models would do"
    assert_near(state.params, best.mean(0))
    assert_near(state.method_state["fedcda.models"], torch.stack([new, old], dim=1))
