"""Scenarios: rules that assign every training image to a client; partition.py enforces the minimum.

    iid           equal parts of a shuffle
    nid1          label skew: every class by Dirichlet(alpha) proportions; a client that holds
                  N / M images gets no more; or clients of equal size
    nid2          the extreme split of six clients: five hold a fifth of the classes each, one all
    pathological  every client holds k classes, in shards of about one size
    extended      every client holds k classes, each by Dirichlet(alpha) over its holders
    quantity      size skew: sizes by Dirichlet(alpha), the same labels everywhere
    natural       the clients that the data set itself names

Each takes an `Assignment` and returns the client of every image, int64 [N], 0 ... M - 1. A long
tail, which combines with any of them, is cut first: it decides which images there are.

Letters: M clients in all, C classes, N images.
"""

import math
from dataclasses import dataclass

import torch

from semanticfl_ref.config.presets import NID2_CLIENTS
from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.dataset import shuffled_class
from semanticfl_ref.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a scenario gets.

    Attributes:
        labels: int64 [N], 0 ... C - 1.
        classes: C.
        settings: the section `partition`.
        minimum: images that every client gets at least.
        generator: the only source of random numbers that a scenario may use.
        natural_N: int64 [N], the data set's own clients; None without.
        client_names: their names.
    """

    labels: torch.Tensor
    classes: int
    settings: PartitionSettings
    minimum: int
    generator: torch.Generator
    natural_N: torch.Tensor | None = None
    client_names: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        """M."""
        return self.settings.clients

    def shuffled(self, c: int) -> torch.Tensor:
        """The indices of class c's images, in random order."""
        return shuffled_class(self.labels, c, self.generator)


def iid(a: Assignment) -> torch.Tensor:
    """Equal parts: sizes differ by one at most."""
    order_N = torch.randperm(len(a.labels), generator=a.generator)
    clients = torch.arange(len(a.labels)) % a.clients
    return clients[order_N.argsort()]


def nid1(a: Assignment) -> torch.Tensor:
    """Label skew: every class is distributed by Dirichlet proportions of its own.

    Source: the Dirichlet split with balancing that MOON's and FedDisco's experiments use.
    `partition.equal_sizes` as in FedDifRC's public code: the clients' images one client after the
    other, cut into equal parts. Choice: the order within a client is random.
    """
    client_N = torch.empty_like(a.labels)
    sizes_M = torch.zeros(a.clients, dtype=torch.int64)
    for c in range(a.classes):
        own = a.shuffled(c)
        if len(own) == 0:
            continue
        log_share_M = _log_gamma_samples(a.settings.alpha, a.clients, a.generator)
        # Never all clients: together they hold less than N as long as a class is left.
        log_share_M[sizes_M * a.clients >= len(a.labels)] = -math.inf
        counts_M = _sizes(log_share_M, len(own))
        client_N[own] = torch.repeat_interleave(torch.arange(a.clients), counts_M)
        sizes_M += counts_M
    if a.settings.equal_sizes:
        return equal_parts(client_N, a.clients, a.generator)
    return client_N


def equal_parts(client_N: torch.Tensor, clients: int, source: torch.Generator) -> torch.Tensor:
    """The clients' images one client after the other, in random order within it, cut into parts
    whose sizes differ by one at most."""
    order_N = torch.randperm(len(client_N), generator=source)
    order_N = order_N[client_N[order_N].argsort(stable=True)]
    parts = torch.arange(len(client_N)) * clients // len(client_N)
    return parts[order_N.argsort()]


def nid2(a: Assignment) -> torch.Tensor:
    """The extreme split: a sixth of every class for the unbiased client, the rest for a biased one.

    The unbiased client is the last. Five biased clients with two of CIFAR-10's classes or 20 of
    CIFAR-100's, and an unbiased one, are those of FedDisco's code. Choice: the classes of a client
    are consecutive and all clients are of equal size; neither was compared with that code.

    Raises:
        UserError: another number of clients, or fewer classes than biased clients.
    """
    biased = NID2_CLIENTS - 1
    if a.clients != NID2_CLIENTS:
        raise UserError(
            f"scenario nid2 is defined for {NID2_CLIENTS} clients (five biased, one unbiased), not "
            f"{a.clients}: use --clients {NID2_CLIENTS}, or nid1"
        )
    if a.classes < biased:
        raise UserError(
            f"scenario nid2 gives each of {biased} biased clients its own classes; this data set "
            f"has {a.classes} classes: use nid1"
        )
    client_N = torch.empty_like(a.labels)
    for c in range(a.classes):
        own = a.shuffled(c)
        client_N[own] = c * biased // a.classes
        client_N[own[: round(len(own) / NID2_CLIENTS)]] = biased
    return client_N


def pathological(a: Assignment) -> torch.Tensor:
    """Every client holds k classes, one shard of each.

    Every class is cut into equal shards, a larger class into more of them.

    Source: McMahan et al. 2017, Section 3. Choice: they cut the images, sorted by class, into M k
    equal shards and deal them at random, which gives most clients k classes. Here no shard holds
    two classes and no client gets two shards of one class, so every client has exactly k.

    Raises:
        UserError: fewer than M k shards are possible, or more than M k are needed.
    """
    holds_MC = _holders(a)
    client_N = torch.empty_like(a.labels)
    for c in range(a.classes):
        own, (holders,) = a.shuffled(c), torch.where(holds_MC[:, c])
        client_N[own] = holders[torch.arange(len(own)) * len(holders) // max(len(own), 1)]
    return client_N


def extended(a: Assignment) -> torch.Tensor:
    """Every client holds k classes, each distributed by Dirichlet proportions over its holders.

    With a small alpha a client may get nothing of a class that it could hold.

    Source: Li, Lyu: Convergence Analysis of Sequential Federated Learning on Heterogeneous Data.
    NeurIPS 2023, arXiv 2311.03154 (the extended Dirichlet strategy). Choice: who holds which
    classes is chosen as in `pathological`.

    Raises:
        UserError: as `pathological`.
    """
    client_N, holds_MC = torch.empty_like(a.labels), _holders(a)
    for c in range(a.classes):
        own, (holders,) = a.shuffled(c), torch.where(holds_MC[:, c])
        if len(own):
            log_share = _log_gamma_samples(a.settings.alpha, len(holders), a.generator)
            client_N[own] = holders.repeat_interleave(_sizes(log_share, len(own)))
    return client_N


def _holders(a: Assignment) -> torch.Tensor:
    """Which client holds which class, bool [M, C]: k classes each."""
    left_C = _shards_per_class(a)
    holds_MC = torch.zeros(a.clients, a.classes, dtype=torch.bool)
    for m in range(a.clients):
        # The classes with most shards left, ties at random: never fails (Gale, Ryser 1957).
        ties_C = torch.rand(a.classes, generator=a.generator)
        chosen = (left_C + ties_C).topk(a.settings.classes_per_client).indices
        left_C[chosen] -= 1
        holds_MC[m, chosen] = True
    return holds_MC


def _shards_per_class(a: Assignment) -> torch.Tensor:
    """Into how many shards each class is cut, float64 [C], M k in all."""
    k, clients = a.settings.classes_per_client, a.clients
    counts_C = torch.bincount(a.labels, minlength=a.classes).double()
    pieces_C = counts_C.clamp(max=1)
    # k shards hold the minimum together, and a client takes at most one shard of a class.
    most_C = pieces_C * (counts_C // -(-a.minimum // k)).clamp(1, clients)
    fewest, most = int(pieces_C.sum()), int(most_C.sum())
    if not fewest <= clients * k <= most:
        raise UserError(
            f"scenario {a.settings.scenario} needs {clients * k} shards, {k} classes for each of "
            f"{clients} clients; these {len(a.labels)} images of {fewest} classes allow {fewest} "
            f"... {most}: change --clients or partition.classes_per_client"
        )
    for _ in range(clients * k - fewest):
        size_C = torch.where(pieces_C < most_C, counts_C / pieces_C, 0)
        pieces_C[size_C.argmax()] += 1
    return pieces_C


def quantity(a: Assignment) -> torch.Tensor:
    """Size skew: sizes by Dirichlet(alpha), independent of the labels.

    Source: NIID-Bench (Li et al.: Federated Learning on Non-IID Data Silos: An Experimental Study.
    ICDE 2022, arXiv 2102.02079). It samples again until no client is small; here the split is
    repaired.
    """
    log_share_M = _log_gamma_samples(a.settings.alpha, a.clients, a.generator)
    sizes_M = _sizes(log_share_M, len(a.labels))
    order_N = torch.randperm(len(a.labels), generator=a.generator)
    clients = torch.repeat_interleave(torch.arange(a.clients), sizes_M)
    return clients[order_N.argsort()]


def long_tail(
    labels: torch.Tensor, classes: int, factor: float, source: torch.Generator
) -> torch.Tensor:
    """The images that a long tail over the classes keeps, ascending int64; factor 1 keeps all.

    Of the n images of class c it keeps the integer part of n * factor^(-c / (C - 1)), at least one.

    Source: Cui et al.: Class-Balanced Loss Based on Effective Number of Samples. CVPR 2019; Cao et
    al. 2019 (LDAM).
    """
    if factor == 1:
        return torch.arange(len(labels))
    kept = []
    for c in range(classes):
        own = shuffled_class(labels, c, source)
        share = factor ** (-c / max(classes - 1, 1))
        kept.append(own[: max(1, int(len(own) * share + 1e-9))])
    return torch.cat(kept).sort().values


def _sizes(log_share_M: torch.Tensor, n: int) -> torch.Tensor:
    """n images distributed by these logarithms of shares: int64 [M]."""
    bounds = (log_share_M.softmax(0).cumsum(0) * n).round().long().clamp_(max=n)
    # The remainder of the rounding goes to the last client that is not full.
    (open_clients,) = torch.where(log_share_M > -math.inf)
    bounds[open_clients[-1] :] = n
    return bounds.diff(prepend=torch.zeros(1, dtype=torch.int64))


def natural(a: Assignment) -> torch.Tensor:
    """The data set's own clients; none gets images of another's.

    Raises:
        UserError: it names none, another number of them, or one with fewer images than `minimum`.
    """
    if a.natural_N is None:
        raise UserError(
            "scenario natural: the data set does not name its clients; --set data.clients_from "
            "says what does (docs/data.md)"
        )
    sizes_M = torch.bincount(a.natural_N, minlength=len(a.client_names))
    if len(sizes_M) != a.clients:
        raise UserError(
            f"scenario natural: the data set has {len(sizes_M)} clients: use --clients "
            f"{len(sizes_M)} and at most as many --clients-per-round"
        )
    if sizes_M.min() < a.minimum:
        raise UserError(
            f"scenario natural: client {a.client_names[sizes_M.argmin()]!r} has {sizes_M.min()} "
            f"training images, fewer than partition.minimum = {a.minimum}: remove the client"
        )
    return a.natural_N


def _log_gamma_samples(alpha: float, n: int, source: torch.Generator) -> torch.Tensor:
    """log of n Gamma(alpha) samples, float64; their softmax is Dirichlet(alpha).

    In logarithms, since a small alpha underflows: Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha)
    in distribution. Beyond 1e-6 ... 1e6 even the logarithms are not finite.
    """
    shape = torch.full((n,), alpha + 1.0, dtype=torch.float64)
    above = torch._standard_gamma(shape, generator=source)
    # In (0, 1], so that its logarithm is finite.
    uniform = 1 - torch.rand(n, dtype=torch.float64, generator=source)
    return above.log() + uniform.log() / alpha
