"""Client rows -> the new global row, by one averaging kernel.

Letters: M clients in all, P entries of a row, Q entries of BatchNorm layers.
"""

import torch

from semanticfl_ref.kernels.weighted_average import RunningAverage


class Aggregator:
    """Takes the round's rows one by one, in ascending client number, in O(P) memory."""

    def __init__(self, entries: int, device: torch.device):
        self._average, self.clients = RunningAverage(entries, device), []

    def add(self, client: int, row_P: torch.Tensor, weight: float) -> None:
        """Add a client's row; `weight` relative to the other clients of the round."""
        assert not self.clients or client > self.clients[-1], "rows must come in ascending client number: the sum's order is the result"
        self._average.add(row_P, weight)
        self.clients.append(client)

    def finish(self) -> torch.Tensor:
        """The weighted average, float32 [P]."""
        return self._average.finish()
