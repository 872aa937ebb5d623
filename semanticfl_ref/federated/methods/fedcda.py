"""FedCDA: of each client's last models, average those that diverge least from one another.

    min over choices of   1/N sum_n [ F_n(w_n) + L/2 |w_n|^2 ]  -  L/2 |w_bar|^2  =  mean loss + L/2
    mean |w_n - w_bar|^2

Source: Wang, Xu, Li, Xu, Li, Zhang: FedCDA: Federated Learning with Cross-rounds Divergence-aware
    Aggregation. ICLR 2024, from
its abstract and as public re-implementations read it (its equations were not at hand). The server
keeps K = 3 models of each client and the loss F_n of its last local epoch. The first 50 rounds are
FedAvg's. Then the round's clients are split at random into B = 3 batches; batch by batch, the best
combination of kept models is taken with all that was chosen before held fixed, and clients that sit
out keep their last choice.

`Choice:` 1/N is the share of images, as in FedAvg, where the paper averages evenly; divergence is
over parameters, not over BatchNorm's running averages; more batches are made where one would have
more than 4096 combinations. memory = 1 is FedAvg: nothing outlives a round, so absent clients are
out too. The server holds M x memory rows. With many clients and few of them a round the models
chosen are old, and the average lags."""

import itertools

import torch

from semanticfl_ref.config import Config
from semanticfl_ref.federated.methods.method import Memory, Method, Visit
from semanticfl_ref.randomness import generator

MOST_COMBINATIONS = 4096
CHUNK = 2**20  # entries of each row that are in memory as float64 at a time


def cached_rows(config: Config, row_P: torch.Tensor) -> Memory:
    """Last rows [M, memory, P], newest first; their losses [M, memory]; how many are valid [M];
    which one was chosen [M].
    """
    clients, kept = config.partition.clients, config.fedcda.memory
    if kept == 1:
        return {}
    return {
        "fedcda.rows": torch.zeros(clients, kept, len(row_P)),
        "fedcda.losses": torch.zeros(clients, kept),
        "fedcda.valid": torch.zeros(clients, dtype=torch.int64),
        "fedcda.chosen": torch.zeros(clients, dtype=torch.int64),
    }


def cache_row(memory: Memory, visit: Visit, row_P: torch.Tensor, report) -> None:
    """The newest row pushes out the oldest; until `choose` says otherwise the newest is the one
    chosen.
    """
    if visit.config.fedcda.memory == 1:
        return
    client = visit.client
    for name, newest in (
        ("fedcda.rows", row_P),
        ("fedcda.losses", torch.as_tensor(report.last_epoch_loss)),
    ):
        memory[name][client] = torch.cat([newest.detach().cpu()[None], memory[name][client][:-1]])
    memory["fedcda.valid"][client] = min(
        int(memory["fedcda.valid"][client]) + 1, visit.config.fedcda.memory
    )
    memory["fedcda.chosen"][client] = 0


def choose_rows(
    world, memory: Memory, clients: list[int], round: int
) -> list[tuple[int, torch.Tensor, float]] | None:
    """The rows to average: (client, row [P], images), in ascending client number; writes the choice
    into the memory. None: the round's own rows.
    """
    options, images = world.config.fedcda, world.partition.sizes
    if options.memory == 1 or round <= options.warm_up:
        return None
    rows, losses, valid, chosen = (
        memory[f"fedcda.{name}"] for name in ("rows", "losses", "valid", "chosen")
    )
    settled = (
        set(valid.nonzero()[:, 0].tolist()) - set(clients)
        if options.absent == "remembered"
        else set()
    )
    for batch in batches(
        clients, options.batches, options.memory, generator(world.config.run.seed, "fedcda", round)
    ):
        members = sorted([*settled, *batch])
        kept = [torch.arange(int(valid[k])) if k in batch else chosen[k : k + 1] for k in members]
        candidates = [rows[k, own] for k, own in zip(members, kept, strict=True)]
        their_losses = [losses[k, own] for k, own in zip(members, kept, strict=True)]
        picks = least_divergent(
            candidates,
            their_losses,
            [float(images[k]) for k in members],
            options.smoothness,
            _parameters(world.layout),
        )
        for k, own, pick in zip(members, kept, picks, strict=True):
            chosen[k] = own[pick]
        settled |= set(batch)
    return [(k, rows[k, chosen[k]], float(images[k])) for k in sorted(settled)]


def batches(clients: list[int], count: int, kept: int, source: torch.Generator) -> list[list[int]]:
    """The clients in random order in `count` nearly equal batches, or in more, so that none has
    more than 4096 combinations.
    """
    largest = max(
        size for size in range(1, len(clients) + 1) if size == 1 or kept**size <= MOST_COMBINATIONS
    )
    count = min(len(clients), max(count, -(-len(clients) // largest)))
    order = torch.randperm(len(clients), generator=source).tolist()
    return [[clients[i] for i in order[start::count]] for start in range(count)]


def least_divergent(
    rows: list[torch.Tensor],
    losses: list[torch.Tensor],
    images: list[float],
    smoothness: float,
    columns: torch.Tensor | None = None,
) -> list[int]:
    """The combination of one row per client that minimises mean loss + L/2 * variance; the newest
    rows win a tie.

    Equation (least-divergent) [FedCDA, from its abstract]: min over choices of mean_n F_n(w_n) +
        L/2 mean_n |w_n - w_bar|^2
    Test: tests/federated/test_method_equations.py::test_fedcda_chooses_on_numbers

    Args:
        rows: per client float32 [c, P], its candidates; a client that is settled has one.
        losses: per client [c].
        images: per client, its weight.
        smoothness: L.
        columns: int64, the entries that count; None = all.

    Returns:
        per client the number of its candidate.
    """
    all_RP, weights = torch.cat(rows), [n / sum(images) for n in images]
    products_RR = _products(all_RP, columns)
    loss_R, first = torch.cat(losses).double(), [0, *itertools.accumulate(len(r) for r in rows)]

    def objective(picks: tuple[int, ...]) -> float:
        places, p = (
            torch.tensor([f + i for f, i in zip(first[:-1], picks, strict=True)]),
            torch.tensor(weights, dtype=torch.float64),
        )
        variance = p @ products_RR[places, places] - p @ products_RR[places][:, places] @ p
        return float(p @ loss_R[places] + smoothness / 2 * variance)

    return list(min(itertools.product(*(range(len(r)) for r in rows)), key=objective))


def _products(rows_RP: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """Inner products float64 [R, R] of the rows seen from the first one: the variance is the same
    from anywhere, and nearby it cancels less.
    """
    products_RR = torch.zeros(len(rows_RP), len(rows_RP), dtype=torch.float64)
    for part in (torch.arange(rows_RP.shape[1]) if columns is None else columns).split(CHUNK):
        seen = rows_RP[:, part].double()
        seen -= seen[0].clone()
        products_RR += seen @ seen.T
    return products_RR


def _parameters(layout) -> torch.Tensor:
    mask = torch.ones(layout.entries, dtype=torch.bool)
    mask[layout.buffers] = False
    return mask.nonzero()[:, 0]


FEDCDA = Method(keeps=cached_rows, remember=cache_row, choose=choose_rows)
