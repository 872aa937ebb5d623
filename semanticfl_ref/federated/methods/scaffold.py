"""SCAFFOLD: each gradient is corrected by how the client's gradient differs from everybody's.

    y_i <- y_i - eta_l (g_i(y_i) - c_i + c)
    c_i+ = c_i - c + (x - y_i) / (K eta_l)            (option II)
    c   <- c + 1/M sum_{i in S} (c_i+ - c_i)

Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging
for Federated Learning. ICML 2020, Eqs. 3-5, Algorithm 1. Control variates start at zero; K is the
number of steps made, a last short batch included.

The paper has plain SGD, so client optimizers other than `sgd` are refused. With momentum beta, a
constant gradient g moves the model by eta_l g sum_t (1 - beta^t) / (1 - beta) in K steps, up to
1 / (1 - beta) times as far; control variates by the formula above then come out that much too
large, so that corrections overshoot and the run may diverge. Choice: scaffold.steps = effective
divides by that sum instead of K: exact for a constant gradient, the paper's own formula without
momentum. scaffold.steps = made is the literal K: right without momentum, and with it the formula
outside of what it was derived for.

scaffold.place = step adds the correction after momentum, w <- w - eta_l (v + c - c_i), as in
FedDisco's code and NIID-Bench. There K steps move the model by eta_l (sum_t v_t + K (c - c_i)), so
that the literal K is right with any momentum, and is always taken: c_i+ is the mean of the v_t.

Weight decay is part of what the steps show, and so of the control variates. Choice: models are
averaged by images, as in FedAvg; control variates evenly, as published. The paper's server step
eta_g is the server optimizer's.

control_scale = 0 is FedAvg. BatchNorm's running statistics have no gradient, hence no control
variate. With few clients per round the c_i are old, and the correction is known to do more harm
than good.

Letters: M clients in all, P size of a flat vector.
"""

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.federated.local_optimizer import learning_rate
from semanticfl_ref.federated.methods.method import LocalUpdate, Method, MethodState, Payload

CLIENTS, SERVER = "scaffold.clients", "scaffold.server"


def control_variates(config: Config, params_P: torch.Tensor) -> MethodState:
    """c_i = 0 [M, P] and c = 0 [P]."""
    if config.method.control_scale == 0:
        return {}
    size = len(params_P)
    return {CLIENTS: torch.zeros(config.partition.clients, size), SERVER: torch.zeros(size)}


def control_correction(update: LocalUpdate) -> torch.Tensor | None:
    """What is added to every gradient, or step, of a local update, scaled; None at scale 0.

    Equation (scaffold-correction) [SCAFFOLD, Eq. 3]: g <- g - c_i + c
    Test: tests/federated/test_method_equations.py::test_scaffold_over_two_rounds,
        tests/federated/test_method_equations.py::test_scaffold_after_the_momentum_step
    """
    scale, state = update.settings.control_scale, update.method_state
    return scale * (state[SERVER] - state[CLIENTS][update.client]) if scale > 0 else None


def update_controls(
    state: MethodState, update: LocalUpdate, params_P: torch.Tensor, report
) -> None:
    """Option II, with the control variates as they were before the round.

    Equation (scaffold-controls) [SCAFFOLD, Eqs. 4 and 5]:
        c_i+ = c_i - c + (x - y_i) / (K eta)
        c   <- c + 1/M sum_i (c_i+ - c_i)
    Test: tests/federated/test_method_equations.py::test_scaffold_over_two_rounds
    """
    if update.settings.control_scale == 0:
        return
    federation, steps = update.config.federation, report.steps
    if update.settings.place == "gradient" and update.settings.steps == "effective":
        steps = effective_steps(steps, federation.momentum)
    rate = learning_rate(federation, update.round)
    moved_P = (update.start_P - params_P) / (steps * rate)
    moved_P[update.context.layout.buffers] = 0
    change_P = moved_P.cpu() - update.method_state[SERVER]
    state[CLIENTS][update.client] += change_P
    state[SERVER] += change_P / update.config.partition.clients


def effective_steps(steps: int, momentum: float) -> float:
    """Steps of plain SGD that move as far, for a constant gradient.

    Equation (effective-steps) [O]: sum over t = 1 ... K of (1 - beta^t) / (1 - beta)
    Test: tests/federated/test_method_equations.py::test_scaffold_under_momentum
    """
    return sum((1 - momentum**t) / (1 - momentum) for t in range(1, steps + 1))


def corrects_step(config: Config) -> bool:
    """Whether the correction is added after momentum."""
    return config.method.place == "step"


def one_vector_each_way(config: Config) -> Payload:
    """c goes to a client, c_i+ - c_i comes back."""
    return Payload(vectors=int(config.method.control_scale > 0))


SCAFFOLD = Method(
    init_state=control_variates,
    correction=control_correction,
    corrects_step=corrects_step,
    update_state=update_controls,
    payload=one_vector_each_way,
    client_state=(CLIENTS,),
    sent_state=(SERVER,),
)
