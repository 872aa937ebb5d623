"""FedProx: a client's model is kept near the model that it received.

    h_k(w; w_t) = F_k(w) + mu/2 |w - w_t|^2

Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous
Networks. MLSys 2020, Eq. 2, Algorithm 2.

mu = 0 is FedAvg. A gradient step with learning rate eta multiplies the distance to w_t by
1 - eta mu, so eta mu must stay below 2 (with momentum beta, below 2 (1 + beta)), and well below 1
to be useful. Every parameter counts, those of BatchNorm included; its running statistics are
buffers and stay free. The paper also lets clients stop early; here all complete their epochs.
"""

import torch

from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms


def proximal_term(batch: LocalBatch) -> Terms:
    """mu * |w - w_t|^2 / 2."""
    mu = batch.settings.mu
    return {"proximal": (mu, proximal(batch.parameters))} if mu > 0 else {}


def proximal(parameters: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Half the squared distance to the model received; its gradient is w - w_t.

    Equation (proximal) [FedProx, Eq. 2]: |w - w_t|^2 / 2
    Test:
        tests/federated/test_method_equations.py::test_the_proximal_term_is_half_the_squared_distance

    Args:
        parameters: pairs of a parameter and its value in the model received.
    """
    return sum((w - received).square().sum() for w, received in parameters) / 2


FEDPROX = Method(local_terms=proximal_term)
