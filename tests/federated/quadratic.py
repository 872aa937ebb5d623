"""Playing rounds; and three clients with the losses |w - t_k|^2 / 2 over three parameters: every
number of a round can be redone on paper.
"""

import torch

from semanticfl_ref.federated.context import new_state
from semanticfl_ref.federated.round import run_round

TARGETS = torch.tensor(
    [[1.0, -1.0, 0.2], [-1.0, -0.6, 0.2], [0.6, 0.2, 1.0]]
)  # t_k: what a byte of an image can say exactly
MEAN = TARGETS.mean(0)


class Quadratic(torch.nn.Module):
    """Three parameters w; an image is one pixel whose channels are a target t in -1 ... 1, and its
    loss |w - t|^2 / 2: the gradient is w - t.
    """

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images):
        features_B3 = self.w.expand(len(images), 3)
        return (features_B3 - images[:, :, 0, 0]).square().sum(1, keepdim=True) / 2, features_B3


def play(context, rounds=2):
    """The state after some rounds from the start, and their metrics."""
    state, lines = new_state(context), []
    for _ in range(rounds):
        state, line = run_round(state, context)
        lines.append(line)
    return state, lines


def near(actual, expected):
    """Equal within rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
