"""What a round's line of metrics records: losses, gradients, steps, communication cost, drift.

Letters: S clients of a cohort, K clients of the round, M clients in all, P size of a flat vector.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from semanticfl_ref.errors import NonFiniteError
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.report import ClientReport
from semanticfl_ref.kernels.weighted_average import weighted_average

FLOAT_BYTES = 4


class RoundMetrics:
    """Collects the clients' reports while a round runs.

    Communication is counted in bytes of uncompressed float32 values: `model`, parameters and heads
    each way, also of dropped clients; `anchors`, a client's visual ones (or those of every class)
    and all text anchors (or those of its images), the first time it is sampled, if an active term
    needs them; `controls`, vectors that the method sends beside the model.

    Not counted: single numbers (image counts, FedDisco's discrepancy, FedCDA's loss); what the
    server or a client keeps for itself; whatever reached the server before the first round to make
    anchors (anchors.json says what it saw); evaluation.
    """

    def __init__(self, context: RunContext, anchors_sent: torch.Tensor):
        self._context, self._anchors_sent = context, anchors_sent
        self._reports: dict[int, ClientReport] = {}
        self.dropped: list[int] = []

    def add_cohort(
        self, updates: list[LocalUpdate], reports: list[ClientReport], finite_S: torch.Tensor
    ) -> torch.Tensor:
        """Count the clients of a cohort.

        Args:
            updates, reports: S of each.
            finite_S: bool [S], whether a client's parameters are finite.

        Returns:
            bool [S], the clients that take part in the average.

        Raises:
            NonFiniteError: a client returned NaN or infinity and `federation.non_finite` is stop.
        """
        losses_are_finite = [math.isfinite(report.loss) for report in reports]
        finite_S = finite_S & torch.tensor(losses_are_finite, device=finite_S.device)
        for update, report, finite in zip(updates, reports, finite_S.tolist(), strict=True):
            self._reports[update.client] = report
            if finite:
                continue
            if update.config.federation.non_finite == "stop":
                raise NonFiniteError(
                    f"round {update.round}, client {update.client}: {non_finite_part(report)} "
                    f"became NaN or infinite. Lower federation.learning_rate, or set "
                    f"federation.non_finite=drop"
                )
            self.dropped.append(update.client)
        return finite_S

    def line(self) -> dict:
        """The round's metrics; dropped clients count in steps and bytes, not in means."""
        kept = [report for client, report in self._reports.items() if client not in self.dropped]
        terms = [
            {name: float(total) / report.steps for name, total in report.terms.items()}
            for report in kept
        ]
        gradients = {}
        for key in ("share", "norm", "cosine"):
            values = [
                {name: getattr(gradient, key) for name, gradient in report.first.gradients.items()}
                for report in kept
            ]
            gradients[f"gradient_{key}"] = _means(values)
        gradients["gradient_cosine"].pop("cross_entropy")  # with itself
        sent = self._bytes()
        return {
            "loss": _mean(float(report.loss) / report.steps for report in kept),
            "terms": _means(terms),
            **gradients,
            "steps": sum(report.steps for report in self._reports.values()),
            "bytes_down": sum(sent["down"].values()),
            "bytes_up": sum(sent["up"].values()),
            "bytes": sent,
            "dropped": self.dropped,
        }

    def _bytes(self) -> dict[str, dict[str, int]]:
        clients, total = len(self._reports), {}
        for way, cost in communication_cost(self._context).items():
            total[way] = {kind: clients * count for kind, count in cost.items()} | {"anchors": 0}
        for client in self._reports:
            if not self._anchors_sent[client]:
                total["down"]["anchors"] += anchor_bytes(self._context, client)
        return total


@dataclass
class Drift:
    """How far the averaged models moved from the global model.

    Norms leave out entries that do not descend from the global model: BatchNorm's running
    statistics, or with model.batch_norm = local all of BatchNorm.

    Attributes:
        start_P: the global model [P].
        excluded: int64 indices of the entries to leave out.
        norms: client -> |w_k - w|.
        weight: sum of the clients' weights.
    """

    start_P: torch.Tensor
    excluded: torch.Tensor
    norms: dict[int, float] = field(default_factory=dict)
    weight: float = 0.0
    weighted_norms: float = 0.0

    def add(self, client: int, params_P: torch.Tensor, squared_norm: float, weight: float) -> None:
        """Count a model.

        Args:
            client: whose model it is.
            params_P: its parameters [P].
            squared_norm: |params - start|^2 over all entries.
            weight: its aggregation weight.
        """
        self.norms[client] = norm = self._norm(params_P, squared_norm)
        self.weight += float(weight)
        self.weighted_norms += float(weight) * norm

    def require_weight(self, round: int) -> None:
        """Check that an average exists.

        Raises:
            NonFiniteError: no client with a weight was added.
        """
        if not self.weight:
            raise NonFiniteError(
                f"round {round}: every client with a weight returned NaN or infinity (lower "
                f"federation.learning_rate), or all aggregation weights are 0 (correct the "
                f"method's weights)"
            )

    def summary(self, aggregate_P: torch.Tensor) -> dict[str, float | None]:
        """Of the aggregate, before the server optimizer.

        Returns:
            mean_update_norm: |aggregate - w|. update_alignment: that over the weighted mean of
            |w_k - w|: 1 if all updates are equal, 1 / sqrt(K) if K updates of one length are
            orthogonal, 0 if they cancel; None if no client moved.
        """
        one = aggregate_P.new_ones(1, dtype=torch.float64)
        measured = weighted_average(aggregate_P[None], one, self.start_P)
        norm = self._norm(aggregate_P, measured.squared_norm_S[0])
        alignment = norm * self.weight / self.weighted_norms if self.weighted_norms else None
        return {"mean_update_norm": norm, "update_alignment": alignment}

    def _norm(self, params_P: torch.Tensor, squared_norm: float) -> float:
        outside = params_P[self.excluded].double() - self.start_P[self.excluded]
        return math.sqrt(max(float(squared_norm) - float(outside.square().sum()), 0.0))


def anchor_bytes(context: RunContext, client: int) -> int:
    """Bytes of the anchors that a client receives once."""
    anchors, partition = context.anchors, context.partition
    payload, count = context.method.payload(context.config), 0
    if anchors is None:
        return 0
    if payload.visual and partition.receives(client, "visual"):
        rows = partition.sizes[client] if anchors.per == "image" else len(anchors.visual)
        count += rows * anchors.visual.shape[1]
    if payload.text and partition.receives(client, "text"):
        text = anchors.text
        count += text.numel() if text.ndim == 2 else partition.sizes[client] * text[0].numel()
    return FLOAT_BYTES * count


def communication_cost(context: RunContext) -> dict[str, dict[str, int]]:
    """Bytes that a client receives ("down") and returns ("up") per round, anchors aside.

    With model.batch_norm = local, BatchNorm entries are not sent down, since the client uses its
    own; they go up, since the server averages them for evaluation. Control vectors have no buffers.
    """
    layout, config = context.layout, context.config
    own = len(layout.batch_norm) if config.model.batch_norm == "local" else 0
    vectors = context.method.payload(config).vectors
    controls = FLOAT_BYTES * vectors * len(layout.optimised)
    return {
        "down": {"model": FLOAT_BYTES * (layout.size - own), "controls": controls},
        "up": {"model": FLOAT_BYTES * layout.size, "controls": controls},
    }


def non_finite_part(report: ClientReport) -> str:
    """The terms that are not finite, or else the parameters, for messages.

    Those of the first batch if there are any: NaN in the parameters spreads to every term.
    """
    first = {name: value for name, (_, value) in report.first.terms.items()}
    for terms in (first, report.terms):
        bad = [repr(name) for name, value in terms.items() if not math.isfinite(value)]
        if bad:  # the method's terms, the more likely cause, come last
            return f"the term {' or '.join(reversed(bad))}"
    return "the parameters"


def _means(reports: list[dict[str, float]]) -> dict[str, float | None]:
    """Every name's mean over the reports that have it."""
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: _mean(report[name] for report in reports if name in report) for name in names}


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
