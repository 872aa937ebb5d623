"""The clients' learning rate over the rounds, and their optimizers.

These are torch's own, in the forms that can be captured as CUDA graphs.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from semanticfl_ref.config.schedule import SCHEDULES
from semanticfl_ref.config.settings import FederationSettings
from semanticfl_ref.errors import unknown

DEFAULT_DECAY = {"step": 0.1, "exponential": 0.998}


def learning_rate(settings: FederationSettings, round: int) -> float:
    """The learning rate of a round; within a round it does not change.

    Equation (schedule) [cosine: Loshchilov and Hutter 2017; exponential: FedRCL]:
        constant     eta
        step         eta * decay^floor((r - 1) / decay_rounds)
        cosine       eta * (1 + cos(pi (r - 1) / decay_rounds)) / 2
        exponential  eta * decay^(r - 1)
    Test: tests/federated/test_local_optimizer.py::test_schedules_on_numbers

    Args:
        settings: the section `federation`.
        round: r, from 1.

    Source: Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts. ICLR 2017,
    without restarts; FedRCL (Seo et al. 2024), whose experiments have a decay of 0.998 per round.
    """
    rate, done, kind = settings.learning_rate, round - 1, settings.schedule
    if kind == "constant":
        return rate
    if kind == "cosine":
        return rate * (1 + math.cos(math.pi * done / settings.decay_rounds)) / 2
    decay = settings.decay or DEFAULT_DECAY[kind]
    if kind == "step":
        return rate * decay ** (done // settings.decay_rounds)
    if kind == "exponential":
        return rate * decay**done
    raise unknown("federation.schedule", kind, SCHEDULES)


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: FederationSettings, rate: torch.Tensor
) -> Optimizer:
    """The optimizer of `federation.optimizer`.

    Args:
        parameters: what it changes; their data may move.
        settings: the section `federation`.
        rate: the learning rate, a scalar tensor on the parameters' device. A captured step reads it
            at every replay, so it may change from round to round.

    Source: Kingma, Ba: Adam: A Method for Stochastic Optimization. ICLR 2015; Loshchilov, Hutter:
    Decoupled Weight Decay Regularization. ICLR 2019 (AdamW).
    """
    momentum, kind = settings.momentum, settings.optimizer
    common = {"weight_decay": settings.weight_decay}
    if kind in ("adam", "adamw"):
        betas, build = (momentum, settings.beta_2), {"adam": Adam, "adamw": AdamW}[kind]
        return build(parameters, rate, betas, fused=True, capturable=True, **common)
    # The fused form reads a rate from the device; foreach has it as a constant.
    is_constant = settings.schedule == "constant"
    return SGD(
        parameters,
        settings.learning_rate if is_constant else rate,
        momentum,
        nesterov=kind == "nesterov",
        foreach=is_constant,
        fused=not is_constant,
        **common,
    )


def reset_optimizer(optimizer: Optimizer) -> None:
    """As it was when it was made; its tensors stay where they are."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    if tensors := [value for value in states if torch.is_tensor(value)]:
        torch._foreach_zero_(tensors)  # in a few launches
