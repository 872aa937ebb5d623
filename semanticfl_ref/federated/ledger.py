"""What a round cost and showed: bytes each way and by kind, steps, losses, each term's gradient,
how far the clients drifted.

Letters: K clients in the round, P entries of a row.
"""

import math
from collections import Counter

import torch

from semanticfl_ref.federated.aggregation import Aggregator
from semanticfl_ref.federated.client import ClientReport
from semanticfl_ref.federated.methods import METHODS


class RoundLedger:
    """Counts while the round is played.

    Bytes are those of float32 entries, uncompressed: `model`, the row both ways, heads with it, a
    dropped client's too; `anchors`, a client's own visual ones (or every class's) and all texts,
    the first time that it is chosen, if a term reads them; `controls`, the rows that the method
    sends beside the model. Not counted: single numbers (image counts, FedDisco's discrepancy,
    FedCDA's loss); what the server keeps (FedCDA's rows) or a client keeps for itself (MOON's last
    model); whatever reached the server before the first round so that anchors could be made
    (`anchors.json` says what it saw); evaluation, which reads every part in place."""

    def __init__(self, world, state):
        self._world, self._served = world, state.served
        self._down, self._up = Counter(), Counter()
        self._steps = 0
        self._reports: dict[int, ClientReport] = {}
        self.dropped: list[int] = []

    def count(self, client: int, report: ClientReport) -> None:
        """Book one client: its row both ways, with what the method sends beside it, its anchors the
        first time, its training.
        """
        sent = row_bytes(self._world)
        self._down.update(
            sent["down"], anchors=0 if self._served[client] else self._anchor_bytes(client)
        )
        self._up.update(sent["up"], anchors=0)
        self._steps += report.steps
        self._reports[client] = report

    def line(self) -> dict:
        """The round's books; dropped clients count in steps and bytes, not in the means."""
        reports = [report for client, report in self._reports.items() if client not in self.dropped]
        gradients = [r.gradients for r in reports]
        return {
            "loss": _mean([float(r.loss) / r.steps for r in reports]),
            "terms": _means(
                [{name: float(total) / r.steps for name, total in r.terms.items()} for r in reports]
            ),
            "gradient_share": _means(
                [{name: g.share for name, g in found.items()} for found in gradients]
            ),
            "gradient_norm": _means(
                [{name: g.norm for name, g in found.items()} for found in gradients]
            ),
            "gradient_cosine": _means(
                [
                    {name: g.cosine for name, g in found.items() if name != "cross_entropy"}
                    for found in gradients
                ]
            ),
            "steps": self._steps,
            "bytes_down": self._down.total(),
            "bytes_up": self._up.total(),
            "bytes": {"down": dict(self._down), "up": dict(self._up)},
            "dropped": self.dropped,
        }

    @staticmethod
    def culprit(report: ClientReport) -> str:
        """The first term that is not finite, or else the weights."""
        bad = [
            name
            for name, total in report.terms.items()
            if not torch.isfinite(torch.as_tensor(total))
        ]
        return f"the term {bad[0]!r}" if bad else "the weights"

    def _anchor_bytes(self, client: int) -> int:
        anchors = self._world.anchors
        if anchors is None:
            return 0
        partition = self._world.partition
        visual, text = METHODS[self._world.config.federation.method].reads_anchors(
            self._world.config
        )
        visual, text = (
            visual and partition.gets(client, "visual"),
            text and partition.gets(client, "text"),
        )
        images = len(partition.indices[client]) if anchors.per == "image" else len(anchors.visual)
        return 4 * (visual * images * anchors.visual.shape[1] + text * anchors.text.numel())


def row_bytes(world) -> dict[str, dict[str, int]]:
    """Bytes that a client receives ("down") and returns ("up") in a round, anchors aside: "model",
    a float32 row, and "controls", which have no buffers.

    Under the policy "local" BatchNorm entries are not sent down, as the client uses its own; they
    go up, since the server averages them: for evaluation alone."""
    layout, config = world.layout, world.config
    own = len(layout.batch_norm) if config.model.batch_norm == "local" else 0
    controls = (
        4
        * METHODS[config.federation.method].control_rows(config)
        * (layout.entries - len(layout.buffers))
    )
    return {
        "down": {"model": 4 * (layout.entries - own), "controls": controls},
        "up": {"model": 4 * layout.entries, "controls": controls},
    }


def drift(clients_K: list[int], returned: Aggregator, averaged: Aggregator) -> dict:
    """How far clients went from the global row, from the pass that averaged their rows.

    Args:
        clients_K: the round's clients.
        returned: took their rows.
        averaged: made the aggregate; another than `returned` where the method averages other rows.

    Returns:
        update_norm: |row_k - global row| of each client, None for a dropped one; mean_update_norm:
            |aggregate - global row|, before the server optimiser;
        agreement: that over the weighted mean norm of the rows averaged, see
            `Aggregator.agreement`.
    """
    return {
        "update_norm": [returned.update_norms.get(client) for client in clients_K],
        "mean_update_norm": averaged.mean_update_norm,
        "agreement": averaged.agreement,
    }


def _means(reports: list[dict[str, float]]) -> dict[str, float | None]:
    """Every name's mean over the reports that have it."""
    names = {name: None for report in reports for name in report}  # a dict keeps their order
    return {name: _mean([report[name] for report in reports if name in report]) for name in names}


def _mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
