"""Running rounds; and clients with the losses |w - t_k|^2 / 2 over three parameters.

Every number of a round of the latter can be redone on paper.
"""

import torch

from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.report import ClientReport
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import FederatedState, initial_state

# t_k: values that a byte of an image represents exactly.
TARGETS = torch.tensor([[1.0, -1.0, 0.2], [-1.0, -0.6, 0.2], [0.6, 0.2, 1.0]])
MEAN = TARGETS.mean(0)


class Quadratic(torch.nn.Module):
    """Three parameters w; an image is one pixel whose channels are a target t in -1 ... 1, and its
    loss is |w - t|^2 / 2: the gradient is w - t."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images):
        features_B3 = self.w.expand(len(images), 3)
        return (features_B3 - images[:, :, 0, 0]).square().sum(1, keepdim=True) / 2, features_B3


def run_rounds(context: RunContext, rounds: int = 2) -> tuple[FederatedState, list[dict]]:
    """The state after some rounds from the start, and their metrics."""
    state, lines = initial_state(context), []
    for _ in range(rounds):
        state, line = run_round(state, context)
        lines.append(line)
    return state, lines


def first_update(context: RunContext, client: int, start_P: torch.Tensor) -> LocalUpdate:
    """A client's local update in round 1, of a method without state."""
    return LocalUpdate(
        context=context,
        client=client,
        round=1,
        start_P=start_P,
        method_state={},
    )


def trained_alone(
    context: RunContext, client: int, start_P: torch.Tensor
) -> tuple[torch.Tensor, ClientReport]:
    """A client's parameters after its local update in round 1, and its report."""
    (report,) = context.replicas.train([first_update(context, client, start_P)])
    return context.replicas.params_RP[0].clone(), report


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
