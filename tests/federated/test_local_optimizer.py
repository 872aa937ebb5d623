"""The clients' learning rate over the rounds, and their optimizers, against formulas and torch."""

import math

import pytest
import torch
from quadratic import TARGETS, assert_near, run_rounds, trained_alone

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.local_optimizer import learning_rate
from semanticfl_ref.federated.round import run_round

HALF_COSINE = (1 + math.cos(math.pi / 4)) / 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1] * 5),
        ({"schedule": "step", "decay_rounds": 2}, [0.1, 0.1, 0.01, 0.01, 0.001]),
        ({"schedule": "step", "decay_rounds": 3, "decay": 0.5}, [0.1, 0.1, 0.1, 0.05, 0.05]),
        ({"schedule": "exponential"}, [0.1 * 0.998**r for r in range(5)]),
        ({"schedule": "exponential", "decay": 0.5}, [0.1, 0.05, 0.025, 0.0125, 0.00625]),
        (
            {"schedule": "cosine", "decay_rounds": 4, "rounds": 4},
            [0.1, 0.1 * HALF_COSINE, 0.05, 0.1 * (1 - HALF_COSINE), 0.0],
        ),
    ],
)
def test_schedules_on_numbers(settings, expected):
    """Rounds 1 to 5."""
    given = {f"federation.{name}": value for name, value in settings.items()}
    federation = resolve({"federation.learning_rate": 0.1, **given}).federation
    found = [learning_rate(federation, r) for r in range(1, 6)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "step needs federation.decay_rounds: .* 40 rounds .* to 14"),
        ({"decay": 0.5}, "decay = 0.5 has no effect .* constant.* choose the schedule step or exp"),
        ({"schedule": "exponential", "decay_rounds": 5}, "decay_rounds = 5 has no effect"),
        ({"schedule": "cosine", "decay_rounds": 40, "decay": 0.5}, "decay = 0.5 has no effect"),
        ({"schedule": "cosine", "decay_rounds": 39}, "rate is 0; set it to at least 40"),
        ({"optimizer": "nesterov", "momentum": 0.0}, "nesterov needs federation.momentum above 0"),
        ({"optimizer": "adam", "method": "scaffold"}, "the arithmetic of scaffold holds for sgd "),
        ({"optimizer": "nesterov", "method": "scaffold"}, "choose it, or another method"),
        ({"optimizer": "lion"}, "Known: sgd, nesterov, adam, adamw"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        resolve({f"federation.{name}": value for name, value in settings.items()})


def test_adams_rate_is_not_that_of_sgd():
    """The data sets' presets are for SGD; what a user gives counts for all."""
    embedded = {"data.name": "digits", "federation.optimizer": "AdamW"}
    assert resolve({"data.name": "digits"}).federation.learning_rate == 0.1
    assert resolve(embedded).federation.learning_rate == 0.001
    assert resolve({**embedded, "federation.learning_rate": 0.2}).federation.learning_rate == 0.2


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
def test_two_steps_on_paper(quadratic_context, name, schedule):
    """The gradient is w - t; in round 1 every schedule has the rate itself."""
    rate, momentum, decay, beta_2, t = 0.25, 0.5, 0.1, 0.75, TARGETS[1]
    context = quadratic_context(
        federation__optimizer=name,
        federation__schedule=schedule,
        federation__learning_rate=rate,
        federation__momentum=momentum,
        federation__weight_decay=decay,
        federation__beta_2=beta_2,
    )
    w, velocity, first, second = torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for step in (1, 2):
        gradient = w - t
        if name == "adamw":
            w = w - rate * decay * w
        else:
            gradient = gradient + decay * w
        if name in ("sgd", "nesterov"):
            velocity = momentum * velocity + gradient
            ahead = gradient + momentum * velocity if name == "nesterov" else velocity
            w = w - rate * ahead
            continue
        first = momentum * first + (1 - momentum) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        unbiased = first / (1 - momentum**step), second / (1 - beta_2**step)
        w = w - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    for _ in range(2):  # the second visit starts afresh
        params_P, report = trained_alone(context, 1, torch.zeros(3))
        assert report.steps == 2
        assert_near(params_P, w)


def test_the_rate_of_the_round_is_used_and_recorded(quadratic_context):
    """One step of one client: w <- w - eta_r (w - t)."""
    context = quadratic_context(
        federation__local_epochs=1,
        federation__clients_per_round=3,
        federation__schedule="step",
        federation__decay=0.5,
        federation__decay_rounds=1,
    )
    state, lines = run_rounds(context, 3)
    assert [line["learning_rate"] for line in lines] == [0.5, 0.25, 0.125]
    left = (1 - 0.5) * (1 - 0.25) * (1 - 0.125)
    assert_near(state.params, (1 - left) * TARGETS.mean(0))


def test_control_variates_have_the_rate_of_the_round(quadratic_context):
    """c_i+ - c_i + c is the mean gradient (x - y) / (K eta) with the round's eta: of one step, it
    is x - t, corrected by what was added."""
    context = quadratic_context(
        federation__method="scaffold",
        federation__local_epochs=1,
        federation__schedule="exponential",
        federation__decay=0.5,
    )
    first, _ = run_rounds(context, 1)
    second, _ = run_round(first, context)
    for k, t in enumerate(TARGETS):
        assert_near(second.method_state["scaffold.clients"][k], first.params - t)
