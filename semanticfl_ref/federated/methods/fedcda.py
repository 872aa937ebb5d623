"""FedCDA: of each client's recent models, average those that diverge least from one another.

    min over choices of   1/N sum_n [ F_n(w_n) + L/2 |w_n|^2 ]  -  L/2 |w_bar|^2
                      =   mean loss + L/2 mean |w_n - w_bar|^2

Source: Wang, Xu, Li, Xu, Li, Zhang: FedCDA: Federated Learning with Cross-rounds Divergence-aware
Aggregation. ICLR 2024, Eqs. 7 and 8, read in a specification made from the paper: the paper itself
was not at hand. The server keeps K = 3 models of each client and the loss F_n of its last local
epoch. The first 50 rounds are FedAvg's. Then the round's clients are split at random into B = 3
batches; batch by batch, the best combination of kept models is selected, with everything selected
before held fixed. Clients that are not sampled keep their last selection.

N counts all clients, and models are averaged evenly; fedcda.weights = images puts each client's
share of images in place of 1/N, in the selection and in the average. During the warm-up and with
memory = 1, weights are FedAvg's. Choice: divergence is over parameters, not over BatchNorm's
running statistics; there are more batches where one would have more than 4096 combinations.
memory = 1 is FedAvg: nothing is kept across rounds, so absent clients are left out too. The server
holds M x memory models. With many clients and few of them per round, the models selected are old,
and the average lags.

Letters: M clients in all, P size of a flat vector, R kept models.
"""

import itertools
import math

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.federated.methods.method import (
    LocalUpdate,
    Method,
    MethodState,
    SelectedModel,
)
from semanticfl_ref.randomness import generator

MOST_COMBINATIONS = 4096
CHUNK = 2**20  # entries of each model that are in memory as float64 at a time


def recent_models(config: Config, params_P: torch.Tensor) -> MethodState:
    """Recent models [M, memory, P], newest first; their losses [M, memory]; how many are valid [M];
    which one was selected [M]."""
    clients, memory = config.partition.clients, config.method.memory
    if memory == 1:
        return {}
    return {
        "fedcda.models": torch.zeros(clients, memory, len(params_P)),
        "fedcda.losses": torch.zeros(clients, memory),
        "fedcda.valid": torch.zeros(clients, dtype=torch.int64),
        "fedcda.selected": torch.zeros(clients, dtype=torch.int64),
    }


def keep_model(state: MethodState, update: LocalUpdate, params_P: torch.Tensor, report) -> None:
    """The newest model replaces the oldest; it counts as selected until `select` decides."""
    if update.settings.memory == 1:
        return
    client = update.client
    newest = {"fedcda.models": params_P, "fedcda.losses": report.last_epoch_loss}
    for name, value in newest.items():
        kept = state[name][client]
        kept[1:] = kept[:-1].clone()
        kept[0] = value
    valid = state["fedcda.valid"][client] + 1
    state["fedcda.valid"][client] = valid.clamp(max=update.settings.memory)
    state["fedcda.selected"][client] = 0


def select(
    context, state: MethodState, clients: list[int], round: int
) -> list[SelectedModel] | None:
    """The models to average, with their weights; writes the selection into the state.

    None: the round's own models.
    """
    settings, weights = context.config.method, context.partition.sizes
    if settings.weights == "even":
        weights = (1,) * len(weights)
    if settings.memory == 1 or round <= settings.warm_up:
        return None
    models, losses = state["fedcda.models"], state["fedcda.losses"]
    valid, selected = state["fedcda.valid"], state["fedcda.selected"]
    fixed: set[int] = set()
    if settings.absent == "remembered":
        fixed = set(valid.nonzero()[:, 0].tolist()) - set(clients)
    source = generator(context.config.run.seed, "fedcda", round)
    for batch in batches(clients, settings.batches, settings.memory, source):
        candidates = {
            k: torch.arange(valid[k]) if k in batch else selected[k : k + 1]
            for k in sorted([*fixed, *batch])
        }
        picks = least_divergent(
            [models[k, own][:, context.layout.optimised] for k, own in candidates.items()],
            [losses[k, own] for k, own in candidates.items()],
            [weights[k] for k in candidates],
            settings.smoothness,
        )
        for (k, own), pick in zip(candidates.items(), picks, strict=True):
            selected[k] = own[pick]
        fixed |= set(batch)
    return [SelectedModel(k, models[k, selected[k]], weights[k]) for k in sorted(fixed)]


def batches(
    clients: list[int], count: int, memory: int, source: torch.Generator
) -> list[list[int]]:
    """The clients in random order in `count` nearly equal batches, or in more, so that none has
    more than 4096 combinations."""
    count = min(count, len(clients))
    while memory ** math.ceil(len(clients) / count) > MOST_COMBINATIONS:
        count += 1
    order = torch.randperm(len(clients), generator=source).tolist()
    return [[clients[i] for i in order[start::count]] for start in range(count)]


def least_divergent(
    models: list[torch.Tensor],
    losses: list[torch.Tensor],
    weights: list[int],
    smoothness: float,
) -> list[int]:
    """The combination of one model per client that minimises mean loss + L/2 * variance.

    Equation (least-divergent) [FedCDA, Eqs. 7 and 8, as a specification gives them]:
        min over choices of mean_n F_n(w_n) + L/2 mean_n |w_n - w_bar|^2
    Test: tests/federated/test_method_equations.py::test_fedcda_chooses_on_numbers

    Args:
        models: per client float32 [c, P], the parameters of its candidates; one for a client whose
            model is fixed.
        losses: per client [c].
        weights: per client its weight in both means, not normalised.
        smoothness: L.

    Returns:
        Per client the index of its candidate; the newest wins a tie.
    """
    products_RR = _inner_products(torch.cat(models))
    shares = torch.tensor([n / sum(weights) for n in weights], dtype=torch.float64)
    loss_R, starts = torch.cat(losses).double(), [0, *itertools.accumulate(map(len, models))]

    def objective(picks: tuple[int, ...]) -> float:
        rows = torch.tensor([start + i for start, i in zip(starts[:-1], picks, strict=True)])
        second_moment = shares @ products_RR[rows, rows]
        variance = second_moment - shares @ products_RR[rows][:, rows] @ shares
        return float(shares @ loss_R[rows] + smoothness / 2 * variance)

    return list(min(itertools.product(*(range(len(m)) for m in models)), key=objective))


def _inner_products(models_RP: torch.Tensor) -> torch.Tensor:
    """Inner products float64 [R, R], relative to the first model.

    The variance does not depend on the origin, and a near one loses fewer digits.
    """
    products_RR = torch.zeros(len(models_RP), len(models_RP), dtype=torch.float64)
    for chunk in models_RP.split(CHUNK, dim=1):
        relative = chunk.double()
        relative -= relative[0].clone()
        products_RR += relative @ relative.T
    return products_RR


FEDCDA = Method(init_state=recent_models, update_state=keep_model, select_models=select)
