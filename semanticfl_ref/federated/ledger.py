"""What a round cost and showed: bytes each way, steps, losses, each term's share of the gradient.

Letters: P entries of a row.
"""

import math

import torch

from semanticfl_ref.federated.client import ClientReport
from semanticfl_ref.federated.methods import METHODS


class RoundLedger:
    """Counts while the round is played. Bytes are those of float32 rows and of anchors, which a client gets once."""

    def __init__(self, world, state):
        self._world, self._served = world, state.served
        self.bytes_down = self.bytes_up = self.steps = 0
        self.reports: dict[int, ClientReport] = {}
        self.dropped: list[int] = []

    def count(self, client: int, report: ClientReport) -> None:
        """Book one client: its row both ways, with what the method sends beside it, its anchors the first time, its training."""
        sent = row_bytes(self._world)
        self.bytes_down += sent + (0 if self._served[client] else self._anchor_bytes(client))
        self.bytes_up += sent
        self.steps += report.steps
        self.reports[client] = report

    def line(self) -> dict:
        """The round's books; dropped clients count in steps and bytes, not in the means."""
        reports = [report for client, report in self.reports.items() if client not in self.dropped]
        terms: dict[str, list[float]] = {}
        shares: dict[str, list[float]] = {}
        for report in reports:
            for name, total in report.terms.items():
                terms.setdefault(name, []).append(float(total) / report.steps)
            for name, share in report.gradient_share.items():
                shares.setdefault(name, []).append(share)
        losses = [float(r.loss) / r.steps for r in reports]
        return {
            "loss": _mean(losses),
            "terms": {name: _mean(values) for name, values in terms.items()},
            "gradient_share": {name: _mean(values) for name, values in shares.items()},
            "steps": self.steps,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "dropped": self.dropped,
        }

    @staticmethod
    def culprit(report: ClientReport) -> str:
        """The first term that is not finite, or else the weights."""
        bad = [name for name, total in report.terms.items() if not torch.isfinite(torch.as_tensor(total))]
        return f"the term {bad[0]!r}" if bad else "the weights"

    def _anchor_bytes(self, client: int) -> int:
        anchors = self._world.anchors
        if anchors is None:
            return 0
        visual = len(self._world.partition.indices[client]) if anchors.per == "image" else len(anchors.visual)
        return 4 * (visual * anchors.visual.shape[1] + anchors.text.numel())


def row_bytes(world) -> int:
    """Bytes that a client and the server send each other in a round, each way: a float32 row, and the method's control rows, which have no buffers."""
    layout = world.layout
    return 4 * (layout.entries + METHODS[world.config.federation.method].control_rows * (layout.entries - len(layout.buffers)))


def _mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
