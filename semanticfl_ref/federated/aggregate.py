"""Beside the weighted average (`kernels/weighted_average.py`): robust rules, selected models, drift.

Letters: S clients of a cohort, K clients of the round, P size of a flat vector.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from semanticfl_ref.config.settings import ServerSettings, trimmed_clients
from semanticfl_ref.errors import unknown
from semanticfl_ref.federated.methods.method import SelectedModel
from semanticfl_ref.kernels.weighted_average import weighted_average

COHORT = 16  # models that are in memory at a time, beside those that a method keeps
CHUNK = 2**20  # entries of each client that are sorted at a time


@dataclass
class Drift:
    """How far the averaged models moved from the global model.

    Norms leave out entries that do not descend from the global model: BatchNorm's running statistics,
    or with model.batch_norm = local all of BatchNorm.

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

    def summary(self, aggregate_P: torch.Tensor) -> dict[str, float | None]:
        """Of the aggregate, before the server optimizer.

        Returns:
            mean_update_norm: |aggregate - w|. update_alignment: that over the weighted mean of
            |w_k - w|: 1 if all updates are equal, 1 / sqrt(K) if K updates of one length are
            orthogonal, 0 if they cancel; None if no client moved.
        """
        one = torch.ones(1, dtype=torch.float64, device=aggregate_P.device)
        measured = weighted_average(aggregate_P[None], one, self.start_P)
        norm = self._norm(aggregate_P, measured.squared_norm_S[0])
        alignment = norm * self.weight / self.weighted_norms if self.weighted_norms else None
        return {"mean_update_norm": norm, "update_alignment": alignment}

    def _norm(self, params_P: torch.Tensor, squared_norm: float) -> float:
        outside = params_P[self.excluded].double() - self.start_P[self.excluded]
        return math.sqrt(max(float(squared_norm) - float(outside.square().sum()), 0.0))


def cohorts(count: int, size: int = COHORT) -> Iterator[slice]:
    """Consecutive slices of `count` clients, at most `size` each."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def average_selected(selected: Sequence[SelectedModel], drift: Drift) -> torch.Tensor:
    """The weighted average, float32 [P], of models that a method selects; fills `drift`."""
    average, device = None, drift.start_P.device
    for cohort in cohorts(len(selected)):
        models, last = selected[cohort], cohort.stop == len(selected)
        params_SP = torch.stack([model.params_P for model in models]).to(device)
        weights_S = torch.tensor([model.weight for model in models], dtype=torch.float64)
        weights_S = weights_S.to(device)
        average = weighted_average(params_SP, weights_S, drift.start_P, average, final=last)
        for model, params_P, norm in zip(models, params_SP, average.squared_norm_S, strict=True):
            drift.add(model.client, params_P, norm, model.weight)
    return average.values_P


def robust_aggregate(params_KP: torch.Tensor, rule: str, settings: ServerSettings) -> torch.Tensor:
    """The median or trimmed mean of every entry, float32 [P]; each client counts once.

    BatchNorm's running statistics are treated alike. The rules tolerate fewer hostile clients than
    half, or than the share `server.trim`. Under label skew an honest client is an outlier too, and is
    lost with them.

    Raises:
        UserError: an unknown rule.

    Source: Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning. ICML 2018,
    Definitions 1 and 2.
    """
    clients = len(params_KP)
    cuts = {
        "median": (clients - 1) // 2,
        "trimmed-mean": trimmed_clients(settings.trim, clients),
    }
    if rule not in cuts:
        raise unknown("federation.aggregation", rule, ("mean", *cuts))
    return trimmed_mean(params_KP, cuts[rule])


def trimmed_mean(params_KP: torch.Tensor, cut: int) -> torch.Tensor:
    """The mean of every entry without its `cut` smallest and largest values, float32 [P].

    With all but one or two values cut, it is the median.

    Equation (trimmed-mean) [Yin et al. 2018, Definitions 1 and 2]:
        w_p = mean of the sorted w_1p ... w_Kp without the `cut` first and last
    Test: tests/federated/test_aggregate.py::test_median_and_trimmed_mean_on_numbers

    Args:
        params_KP: float32 [K, P], K > 2 cut.
        cut: clients cut at each end.
    """
    kept = slice(cut, len(params_KP) - cut)
    chunks = params_KP.split(CHUNK, dim=1)
    return torch.cat([c.sort(0).values[kept].double().mean(0).float() for c in chunks])
