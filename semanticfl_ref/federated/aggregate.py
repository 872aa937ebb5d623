"""Cohorts of clients, and the average of models that a method selects; beside the weighted average
(`kernels/weighted_average.py`) and robust rules (robust.py).

Letters: S clients of a cohort, P size of a flat vector.
"""

from collections.abc import Iterator, Sequence

import torch

from semanticfl_ref.federated.methods.method import SelectedModel
from semanticfl_ref.federated.metrics import Drift
from semanticfl_ref.federated.replicas import COHORT
from semanticfl_ref.kernels.weighted_average import weighted_average


def cohorts(count: int, size: int = COHORT) -> Iterator[slice]:
    """Consecutive slices of `count` clients, at most `size` each."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def average_selected(
    selected: Sequence[SelectedModel], start_P: torch.Tensor, excluded: torch.Tensor
) -> tuple[torch.Tensor, Drift]:
    """The weighted average, float32 [P], of models that a method selects, and their drift.

    Args:
        selected: the models.
        start_P, excluded: as in `Drift`.
    """
    drift, average, device = Drift(start_P, excluded), None, start_P.device
    for cohort in cohorts(len(selected)):
        models, last = selected[cohort], cohort.stop == len(selected)
        params_SP = torch.stack([model.params_P for model in models]).to(device)
        weights_S = torch.tensor(
            [model.weight for model in models], dtype=torch.float64, device=device
        )
        average = weighted_average(params_SP, weights_S, start_P, average, final=last)
        for model, params_P, norm in zip(models, params_SP, average.squared_norm_S, strict=True):
            drift.add(model.client, params_P, norm, model.weight)
    return average.values_P, drift
