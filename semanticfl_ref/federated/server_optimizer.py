"""Server optimizers: from the clients' average to the next global model.

Letters: P size of a flat vector.
"""

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import unknown
from semanticfl_ref.federated.flat import FlatLayout
from semanticfl_ref.federated.methods.method import MethodState

VELOCITY = "server.velocity"
FIRST_MOMENT, SECOND_MOMENT = "server.first_moment", "server.second_moment"
DEFAULT_RATES = {"fedavgm": 1.0, "fedadam": 0.01}


def init_optimizer(config: Config, params_P: torch.Tensor) -> MethodState:
    """The optimizer's state: nothing, a velocity [P], or Adam's two moments [P]."""
    zero_P = torch.zeros(len(params_P))
    states = {
        "none": {},
        "fedavgm": {VELOCITY: zero_P},
        "fedadam": {FIRST_MOMENT: zero_P, SECOND_MOMENT: zero_P.clone()},
    }
    return states[config.federation.server_optimizer]


def server_step(
    config: Config,
    layout: FlatLayout,
    state: MethodState,
    params_P: torch.Tensor,
    average_P: torch.Tensor,
) -> torch.Tensor:
    """The next global model from the current one and the clients' average.

    Equation (server-step) [Hsu et al. 2019; Reddi et al. 2021, Alg. 2]:
        Delta = average - w
        none      w + Delta, which is the average itself
        fedavgm   v <- beta v + Delta,                              w + eta v
        fedadam   m <- beta_1 m + (1 - beta_1) Delta,
                  v <- beta_2 v + (1 - beta_2) Delta^2,             w + eta m / (sqrt(v) + tau)
    Test: tests/federated/test_server_optimizer.py::test_fedavgm_on_numbers,
        tests/federated/test_server_optimizer.py::test_fedadam_on_numbers

    Args:
        config: sections `federation` and `server`.
        layout: which entries are buffers.
        state: holds the optimizer's vectors, which are updated in place.
        params_P, average_P: float32 [P].

    Source: Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification. arXiv 1909.06335; Reddi et al.: Adaptive Federated Optimization. ICLR
    2021, Algorithm 2 (no bias correction). fedavgm with beta = 0, eta = 1 is the average within
    rounding.
    Choice: the optimizer moves parameters; BatchNorm's running statistics take the clients'
    average: they are not update directions, and Adam could make a variance negative. Choice: v
    starts at zero, where the paper has at least tau^2.
    """
    settings, kind = config.server, config.federation.server_optimizer
    if kind == "none":
        return average_P
    rate = settings.learning_rate or DEFAULT_RATES[kind]
    change_P = average_P - params_P
    change_P[layout.buffers] = 0
    change_P = change_P.cpu()
    if kind == "fedavgm":
        step_P = state[VELOCITY].mul_(settings.momentum).add_(change_P)
    elif kind == "fedadam":
        first_P, second_P = state[FIRST_MOMENT], state[SECOND_MOMENT]
        first_P.mul_(settings.momentum).add_(change_P, alpha=1 - settings.momentum)
        second_P.mul_(settings.beta_2).addcmul_(change_P, change_P, value=1 - settings.beta_2)
        step_P = first_P / (second_P.sqrt() + settings.tau)
    else:
        raise unknown("federation.server_optimizer", kind, ("none", *DEFAULT_RATES))
    next_P = params_P + rate * step_P.to(params_P.device)
    next_P[layout.buffers] = average_P[layout.buffers]
    return next_P
