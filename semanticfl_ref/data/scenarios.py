"""Rules that say whose an image is: its label, and a seeded draw. `partition.py` repairs and checks
what they give.

    iid           equal parts of a shuffle
    nid1          label skew: every class is dealt out by Dirichlet(alpha) proportions; a client
    that holds N / M images gets no more nid2          the extreme split of six clients: five hold a
    fifth of the classes each, one holds all pathological  every client holds k classes, in shards
    of about one size quantity      quantity skew: sizes by Dirichlet(alpha), labels alike

Each gives the owner of every image, int64 [N], 0 ... M - 1. A global long tail, which goes with any
of them, says first which images there are.

Letters: M clients in all, C classes, N images.
"""

import heapq
import math

import torch

from semanticfl_ref.errors import UserError

NID2_CLIENTS = 6  # five biased, one unbiased


def iid(labels: torch.Tensor, clients: int, source: torch.Generator) -> torch.Tensor:
    """Owner of each image: sizes differ by one at most."""
    order_N = torch.randperm(len(labels), generator=source)
    return torch.empty_like(order_N).index_copy_(0, order_N, torch.arange(len(labels)) % clients)


def nid1(
    labels: torch.Tensor, clients: int, classes: int, alpha: float, source: torch.Generator
) -> torch.Tensor:
    """Owner of each image, class by class. Source: the Dirichlet split with balancing that MOON's
    and FedDisco's experiments use.
    """
    owner_N = torch.empty(len(labels), dtype=torch.int64)
    sizes_M = torch.zeros(clients, dtype=torch.int64)
    for c in range(classes):
        mine = _shuffled(labels, c, source)
        if len(mine) == 0:
            continue
        log_share_M = _log_gamma_draws(alpha, clients, source)
        log_share_M[
            sizes_M * clients >= len(labels)
        ] = -math.inf  # never all: they hold less than N while a class is left
        counts_M = _sizes(log_share_M, len(mine))
        owner_N[mine] = torch.repeat_interleave(torch.arange(clients), counts_M)
        sizes_M += counts_M
    return owner_N


def nid2(labels: torch.Tensor, clients: int, classes: int, source: torch.Generator) -> torch.Tensor:
    """Owner of each image: a sixth of every class goes to the unbiased client (the last), the rest
    to the class's biased one.

    Choice: groups of consecutive classes (two of CIFAR-10's, 20 of CIFAR-100's) and six equal
        clients; neither is published.
    """
    if clients != NID2_CLIENTS:
        defined = f"scenario nid2 is defined for {NID2_CLIENTS} clients (five biased, one unbiased), not {clients}"
        raise UserError(f"{defined}: use --clients {NID2_CLIENTS}, or nid1")
    biased = NID2_CLIENTS - 1
    if classes < biased:
        raise UserError(
            f"scenario nid2 gives each of {biased} biased clients classes of its own; this data set has {classes} classes: use nid1"
        )
    owner_N = torch.empty(len(labels), dtype=torch.int64)
    for c in range(classes):
        mine = _shuffled(labels, c, source)
        owner_N[mine] = c * biased // classes
        owner_N[mine[: round(len(mine) / NID2_CLIENTS)]] = biased
    return owner_N


def pathological(
    labels: torch.Tensor, clients: int, classes: int, k: int, minimum: int, source: torch.Generator
) -> torch.Tensor:
    """Owner of each image: every class is cut into equal shards, the larger classes into more of
    them; a client gets k shards, of k classes.

    Source: McMahan et al. 2017, Section 3. `Choice:` theirs cuts the sorted images into M k equal
        shards, deals them at random, and so gives most
    clients k classes; here no shard crosses from one class to the next and no client gets two of
    one class, so that it has k exactly.

    Raises:
        UserError: more classes than M k shards, or more shards than the images and the classes
            give.
    """
    counts = torch.bincount(labels, minlength=classes).tolist()
    most = [
        min(clients, max(1, n // -(-minimum // k))) if n else 0 for n in counts
    ]  # k shards have the minimum, and a client takes one of a class
    pieces = [min(1, n) for n in counts]
    if not sum(pieces) <= clients * k <= sum(most):
        raise UserError(
            f"scenario pathological cuts {clients * k} shards, {k} classes for each of {clients} clients; these {len(labels)} images of {sum(pieces)} classes "
            f"allow {sum(pieces)} ... {sum(most)}: change --clients or partition.classes_per_client"
        )
    largest = [(-counts[c], c) for c in range(classes) if most[c] > 1]
    heapq.heapify(largest)
    for _ in range(clients * k - sum(pieces)):
        _, c = heapq.heappop(largest)
        pieces[c] += 1
        if pieces[c] < most[c]:
            heapq.heappush(largest, (-counts[c] / pieces[c], c))
    left_C, holds_MC = (
        torch.tensor(pieces).double(),
        torch.zeros(clients, classes, dtype=torch.bool),
    )
    for m in range(
        clients
        # the classes with most shards left, ties at random: it always comes out (Gale 1957, Ryser 1957)
    ):
        chosen = (left_C + torch.rand(classes, generator=source)).topk(k).indices
        left_C[chosen] -= 1
        holds_MC[m, chosen] = True
    owner_N = torch.empty_like(labels)
    for c in range(classes):
        mine, (holders,) = _shuffled(labels, c, source), torch.where(holds_MC[:, c])
        owner_N[mine] = holders[torch.arange(len(mine)) * len(holders) // max(len(mine), 1)]
    return owner_N


def quantity(
    labels: torch.Tensor, clients: int, alpha: float, source: torch.Generator
) -> torch.Tensor:
    """Owner of each image: sizes by Dirichlet(alpha), whatever the labels. Source: NIID-Bench (Li
    et al.: Federated Learning on Non-IID Data Silos: An Experimental Study. ICDE 2022, arXiv
    2102.02079), its quantity skew, which draws until nobody is small; here the split is
    repaired."""
    sizes_M = _sizes(_log_gamma_draws(alpha, clients, source), len(labels))
    order_N = torch.randperm(len(labels), generator=source)
    return torch.empty_like(labels).index_copy_(
        0, order_N, torch.repeat_interleave(torch.arange(clients), sizes_M)
    )


def long_tail(
    labels: torch.Tensor, classes: int, factor: float, source: torch.Generator
) -> torch.Tensor:
    """The images that stay, ascending int64: of class c's n the whole part of n * factor^(-c / (C -
    1)), at least one.

    Source: Cui et al.: Class-Balanced Loss Based on Effective Number of Samples. CVPR 2019; Cao et
        al. 2019 (LDAM). 1 keeps all.
    """
    if factor == 1:
        return torch.arange(len(labels))
    kept = []
    for c in range(classes):
        mine = _shuffled(labels, c, source)
        kept.append(mine[: max(1, int(len(mine) * factor ** (-c / max(classes - 1, 1)) + 1e-9))])
    return torch.cat(kept).sort().values


def _shuffled(labels: torch.Tensor, c: int, source: torch.Generator) -> torch.Tensor:
    """The places of class c's images, in random order."""
    (mine,) = torch.where(labels == c)
    return mine[torch.randperm(len(mine), generator=source)]


def _sizes(log_share_M: torch.Tensor, n: int) -> torch.Tensor:
    """n images by these logarithms of shares: int64 [M]."""
    bounds = (log_share_M.softmax(0).cumsum(0) * n).round().long().clamp_(max=n)
    bounds[-1] = n
    if log_share_M[-1] == -math.inf:  # rounding's remainder must not go to a client that is full
        bounds[int(torch.where(log_share_M > -math.inf)[0][-1]) :] = n
    return bounds.diff(prepend=torch.zeros(1, dtype=torch.int64))


def _log_gamma_draws(alpha: float, n: int, source: torch.Generator) -> torch.Tensor:
    """log of n Gamma(alpha) draws, float64; their softmax is Dirichlet(alpha). In logarithms, as a
    small alpha underflows.

    Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha) in distribution.
    """
    above = torch._standard_gamma(
        torch.full((n,), alpha + 1.0, dtype=torch.float64), generator=source
    )
    uniform = 1 - torch.rand(
        n, dtype=torch.float64, generator=source
    )  # in (0, 1]: its logarithm is finite
    return above.log() + uniform.log() / alpha
