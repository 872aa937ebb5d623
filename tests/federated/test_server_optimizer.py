"""Server optimizers on numbers that can be redone on paper."""

from types import SimpleNamespace

import pytest
import torch
from quadratic import MEAN, assert_near, run_rounds

from semanticfl_ref.config.settings import ServerSettings
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.server_optimizer import init_optimizer, server_step

LAYOUT = SimpleNamespace(buffers=torch.tensor([1]))


def config_of(kind, **server):
    federation = SimpleNamespace(server_optimizer=kind)
    return SimpleNamespace(federation=federation, server=ServerSettings(**server))


def steps(config, averages):
    """The global models that follow [0, 5] for these clients' averages; entry 1 is a buffer."""
    params_P, state, models = torch.tensor([0.0, 5.0]), init_optimizer(config, torch.zeros(2)), []
    for average in averages:
        params_P = server_step(config, LAYOUT, state, params_P, torch.tensor(average))
        models.append(params_P.tolist())
    return torch.tensor(models)


def test_no_server_optimizer_is_the_average_itself():
    average = torch.tensor([0.1, 0.3])
    assert server_step(config_of("none"), LAYOUT, {}, torch.zeros(2), average) is average


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="server_optimizer 'sgd'"):
        server_step(config_of("sgd", learning_rate=1.0), LAYOUT, {}, *torch.zeros(2, 2))


def test_fedavgm_on_numbers():
    """Averages 1 and 2.5: Delta = 1, v = 1, w = 1; Delta = 1.5, v = 0.5 + 1.5 = 2, w = 3.

    With eta = 1/2: w = 0.5; Delta = 2, v = 2.5, w = 1.75.
    """
    averages = [[1.0, 7.0], [2.5, 6.0]]
    assert_near(
        steps(config_of("fedavgm", momentum=0.5), averages),
        torch.tensor([[1.0, 7.0], [3.0, 6.0]]),
    )
    assert_near(
        steps(config_of("fedavgm", momentum=0.5, learning_rate=0.5), averages),
        torch.tensor([[0.5, 7.0], [1.75, 6.0]]),
    )


def test_fedadam_on_numbers():
    """beta_1 = 1/2, beta_2 = 3/4, tau = 1, eta = 1: Delta = 2: m = 1, v = 1, w = 1/2.

    Then Delta = 2: m = 3/2, v = 3/4 + 1 = 7/4, w = 1/2 + 1.5 / (sqrt(7/4) + 1).
    """
    config = config_of("fedadam", momentum=0.5, beta_2=0.75, tau=1.0, learning_rate=1.0)
    assert_near(
        steps(config, [[2.0, 7.0], [2.5, 6.0]]),
        torch.tensor([[0.5, 7.0], [0.5 + 1.5 / (1.75**0.5 + 1), 6.0]]),
    )


def test_fedavgm_with_a_method_over_two_rounds(quadratic_context):
    """Round 1: Delta = v = 3/4 t. Round 2: from 3/4 t clients go 3/4 of the way on: Delta = 3/16 t,
    v = 3/8 t + 3/16 t = 9/16 t, w = 21/16 t."""
    context = quadratic_context(
        federation__method="scaffold",
        scaffold__control_scale=0.0,
        federation__server_optimizer="fedavgm",
        server__momentum=0.5,
    )
    state, _ = run_rounds(context, 2)
    assert_near(state.params, 21 / 16 * MEAN)
    assert_near(state.method_state["server.velocity"], 9 / 16 * MEAN)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_running_statistics_take_the_clients_average(small_context, kind):
    """So Adam leaves every variance positive."""
    context = small_context(federation__method="fedavg", federation__server_optimizer=kind)
    state, _ = run_rounds(context, 1)
    plain, _ = run_rounds(small_context(federation__method="fedavg"), 1)
    layout = context.layout
    assert torch.equal(state.params[layout.buffers], plain.params[layout.buffers])
    assert not torch.equal(state.params, plain.params)
    sizes = [b.numel() for name, b in context.model.named_buffers() if "running" in name]
    assert len(layout.buffers) == sum(sizes)
