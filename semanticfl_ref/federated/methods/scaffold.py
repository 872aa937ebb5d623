"""SCAFFOLD: each gradient is corrected by how the client's gradient differs from everybody's.

    y_i <- y_i - eta_l (g_i(y_i) - c_i + c)
    c_i+ = c_i - c + (x - y_i) / (K eta_l)            (option II)
    c   <- c + 1/M sum_{i in S} (c_i+ - c_i)

Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging
    for Federated Learning. ICML 2020,
Eqs. 3-5, Algorithm 1. Controls start at zero; K is the number of steps that the client really made,
the last short batch included.

The paper has plain SGD. With momentum beta, a constant gradient g moves the model by eta_l g sum_t
(1 - beta^t) / (1 - beta) in K steps, up to 1 / (1 - beta) times as far, and controls by the formula
above come out that much too large, so that corrections overshoot and the run may blow up. `Choice:`
scaffold.steps = effective divides by that sum instead of K: exact for a constant gradient, the
paper's own without momentum; "made" is the formula as written. Weight decay is part of what the
steps show, and so of the controls. `Choice:` models are averaged by images, as in FedAvg; the
controls evenly, as published. The paper's server step eta_g is the server optimiser's.

control_scale = 0 is FedAvg. BatchNorm's running averages have no gradient, hence no control. With
few clients a round the c_i are old, and the correction is then known to do more harm than good."""

import torch

from semanticfl_ref.config import Config
from semanticfl_ref.federated.methods.method import Memory, Method, Visit


def controls(config: Config, row_P: torch.Tensor) -> Memory:
    """c_i = 0 [M, P] and c = 0 [P]."""
    if config.scaffold.control_scale == 0:
        return {}
    return {
        "scaffold.clients": torch.zeros(config.partition.clients, len(row_P)),
        "scaffold.server": torch.zeros(len(row_P)),
    }


def control_gradient(visit: Visit) -> torch.Tensor | None:
    """What is added to every gradient of a visit, scaled; None at scale 0.

    Equation (scaffold-correction) [SCAFFOLD, Eq. 3]: g <- g - c_i + c
    Test: tests/federated/test_method_equations.py::test_scaffold_over_two_rounds
    """
    scale = visit.config.scaffold.control_scale
    return (
        scale * (visit.memory["scaffold.server"] - visit.memory["scaffold.clients"][visit.client])
        if scale > 0
        else None
    )


def update_controls(memory: Memory, visit: Visit, row_P: torch.Tensor, report) -> None:
    """Option II, with the controls as they were before the round.

    Equation (scaffold-controls) [SCAFFOLD, Eqs. 4 and 5]:
        c_i+ = c_i - c + (x - y_i) / (K eta)
        c   <- c + 1/M sum_i (c_i+ - c_i)
    Test: tests/federated/test_method_equations.py::test_scaffold_over_two_rounds
    """
    if visit.config.scaffold.control_scale == 0:
        return
    options, before = visit.config.federation, visit.memory
    steps = (
        report.steps
        if visit.config.scaffold.steps == "made"
        else effective_steps(report.steps, options.momentum)
    )
    moved_P = (visit.start_P - row_P) / (steps * options.learning_rate)
    moved_P[visit.world.layout.buffers] = 0
    change_P = moved_P.cpu() - before["scaffold.server"]
    memory["scaffold.clients"][visit.client] += change_P
    memory["scaffold.server"] += change_P / visit.config.partition.clients


def effective_steps(steps: int, momentum: float) -> float:
    """Plain steps that move as far as these do, at a constant gradient.

    Equation (effective-steps) [O]: sum over t = 1 ... K of (1 - beta^t) / (1 - beta)
    Test: tests/federated/test_method_equations.py::test_scaffold_under_momentum
    """
    return sum((1 - momentum**t) / (1 - momentum) for t in range(1, steps + 1))


# c goes to a client, c_i+ - c_i comes back.
SCAFFOLD = Method(
    keeps=controls,
    correction=control_gradient,
    remember=update_controls,
    control_rows=lambda config: int(config.scaffold.control_scale > 0),
)
