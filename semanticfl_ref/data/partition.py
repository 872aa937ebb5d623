"""Training images partitioned across clients by a scenario or a file.

A partition is drawn once and repaired within a bound, or refused with the reason.

Letters: M clients in all, C classes, N images.
"""

import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from semanticfl_ref.config.registry import SCENARIOS
from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data import scenarios
from semanticfl_ref.data.partition_file import read_assignment
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator

ALPHA_RANGE = (1e-6, 1e6)  # outside, even the logarithms of Gamma samples leave float64's range
MINIMUM_IMAGES = 2  # per client: BatchNorm has no variance over one
CORRUPTIONS = ("grey", "blur", "noise", "colour cast", "low resolution")
MODALITIES = ("visual and text", "text", "visual", "neither")  # which anchors a client receives


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which client holds which training images, and how clients differ otherwise.

    Attributes:
        scenario, seed, alpha: how it was drawn.
        indices: M ascending int64 tensors, the images that each client trains on.
        held_out: M ascending int64 tensors, the images of each client's own test set. All these
            tensors are disjoint; together they are all images but the `dropped` ones.
        sizes: M image counts, of `indices`.
        histograms: M rows of C image counts, of `indices`.
        skew: mean over clients of the total-variation distance between the client's and the global
            label distribution, 0 ... 1.
        sha256: of the indices.
        dropped: C counts of unused images (outside the long tail, or in no list of a file); empty
            if there are none.
        corruptions, modalities: M names, of CORRUPTIONS and of MODALITIES; empty where clients do
            not differ in them.
    """

    scenario: str
    seed: int
    alpha: float
    indices: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]
    sizes: tuple[int, ...]
    histograms: tuple[tuple[int, ...], ...]
    skew: float
    sha256: str
    dropped: tuple[int, ...] = ()
    corruptions: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()

    @property
    def trained(self) -> torch.Tensor:
        """The images that some client trains on, ascending int64."""
        return torch.cat(self.indices).sort().values

    @property
    def used(self) -> torch.Tensor:
        """The images that some client holds, ascending int64."""
        return torch.cat([*self.indices, *self.held_out]).sort().values

    @property
    def kl(self) -> float:
        """Mean over clients of KL(client's label distribution || global one), in nats."""
        table_MC = torch.tensor(self.histograms, dtype=torch.float64)
        client_MC = table_MC / table_MC.sum(1, keepdim=True)
        global_C = (table_MC.sum(0) / table_MC.sum()).clamp(min=1e-300)
        return float(torch.xlogy(client_MC, client_MC / global_C).sum(1).mean())

    def among_used(self) -> "Partition":
        """The same partition of the data set that has the used images only."""
        used = self.used
        return replace(
            self,
            indices=tuple(torch.searchsorted(used, own) for own in self.indices),
            held_out=tuple(torch.searchsorted(used, own) for own in self.held_out),
        )

    def receives(self, client: int, modality: str) -> bool:
        """Whether the client receives these anchors, "visual" or "text"."""
        return not self.modalities or modality in self.modalities[client]

    def manifest(self) -> dict:
        """All but the indices, which the SHA-256 stands for; plain JSON values."""
        return {
            "scenario": self.scenario,
            "seed": self.seed,
            "alpha": self.alpha if self.scenario in ("nid1", "quantity") else None,
            "clients": len(self.indices),
            "sizes": list(self.sizes),
            "held_out_sizes": [len(own) for own in self.held_out],
            "histograms": [list(row) for row in self.histograms],
            "dropped": list(self.dropped),
            "corruptions": list(self.corruptions),
            "modalities": list(self.modalities),
            "skew": self.skew,
            "kl": self.kl,
            "sha256": self.sha256,
        }


def make_partition(
    labels: torch.Tensor,
    settings: PartitionSettings,
    *,
    classes: int,
    seed: int,
    data_sha256: str = "",
    minimum: int = MINIMUM_IMAGES,
) -> Partition:
    """Partition the training images.

    Args:
        labels: int64 [N], 0 ... C - 1.
        settings: the section `partition`.
        classes: C.
        seed: the run's seed.
        data_sha256: of the data set, which a partition file may record.
        minimum: images that every client gets at least; the largest clients give what is missing.

    Raises:
        UserError: an alpha out of range, too few images for so many clients, or what a scenario
            does not admit.
        DataError, MismatchError: the file is damaged, gives a client too few images, or belongs to
            another data set.
    """
    labels, clients = labels.cpu(), settings.clients
    assert len(labels) == 0 or (0 <= int(labels.min()) and int(labels.max()) < classes)
    low, high = ALPHA_RANGE
    if not low <= settings.alpha <= high:
        raise UserError(
            f"partition.alpha = {settings.alpha}: must be in {low:g} ... {high:g} (small values "
            f"are skewed)"
        )
    source = generator(seed, "long-tail")
    kept = scenarios.long_tail(labels, classes, settings.imbalance, source)
    if settings.file:
        scenario = "file"
        client_N = read_assignment(Path(settings.file), len(labels), clients, data_sha256)
        kept = kept[client_N[kept] >= 0]
        client_N = client_N[kept]
        _refuse_short(client_N, settings, minimum)
    else:
        scenario = settings.scenario
        if len(kept) < clients * minimum:
            raise UserError(
                f"{clients} clients need at least {clients * minimum} training images ({minimum} "
                f"each), there are {len(kept)}: lower --clients"
            )
        source = generator(seed, f"partition-{scenario}")
        assignment = scenarios.Assignment(
            labels=labels[kept],
            classes=classes,
            settings=settings,
            minimum=minimum,
            generator=source,
        )
        client_N = _repair(SCENARIOS[scenario](assignment), clients, minimum, source)
    shift, modality = settings.feature_shift, settings.modality
    traits = {
        "corruptions": _in_turn(CORRUPTIONS, clients, seed, "cameras") if shift != "none" else (),
        "modalities": _in_turn(MODALITIES, clients, seed, "modalities")
        if modality != "none"
        else (),
    }
    drawn = {"scenario": scenario, "seed": seed, "alpha": float(settings.alpha)}
    return _partition(client_N, kept, labels, classes, settings, {**drawn, **traits})


def _in_turn(names: tuple[str, ...], clients: int, seed: int, purpose: str) -> tuple[str, ...]:
    """A name for each client: in turn, over a seeded shuffle of the clients."""
    order = torch.randperm(clients, generator=generator(seed, purpose)).tolist()
    return tuple(names[position % len(names)] for position in order)


def _refuse_short(client_N: torch.Tensor, settings: PartitionSettings, minimum: int) -> None:
    """Raise DataError if a file leaves a client below the minimum: it is not repaired."""
    fewest = torch.bincount(client_N, minlength=settings.clients).min(0)
    if fewest.values < minimum:
        left = ", of those that partition.imbalance leaves" if settings.imbalance > 1 else ""
        raise DataError(
            f"partition.file = {settings.file}: client {int(fewest.indices)} has "
            f"{int(fewest.values)} images{left}; at least {minimum} are needed"
        )


def _repair(
    client_N: torch.Tensor, clients: int, minimum: int, source: torch.Generator
) -> torch.Tensor:
    """Every client its minimum: one image at a time from the largest, at most M * minimum moves."""
    sizes = torch.bincount(client_N, minlength=clients).tolist()
    short = [m for m in range(clients) if sizes[m] < minimum]
    if not short:
        return client_N
    order = torch.randperm(len(client_N), generator=source)
    stock = {m: order[client_N[order] == m].tolist() for m in range(clients) if sizes[m] > minimum}
    largest = [(-len(images), m) for m, images in stock.items()]
    heapq.heapify(largest)
    for m in short:
        for _ in range(minimum - sizes[m]):
            size, giver = heapq.heappop(largest)
            client_N[stock[giver].pop()] = m
            if -size - 1 > minimum:
                heapq.heappush(largest, (size + 1, giver))
    return client_N


def _partition(
    client_N: torch.Tensor,
    kept: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    settings: PartitionSettings,
    about: Mapping[str, object],
) -> Partition:
    """The partition that assigns the kept images to these clients; checks the invariants."""
    counts = torch.bincount(client_N, minlength=settings.clients)
    assert len(counts) == settings.clients and int(counts.min()) > 0
    assert int(counts.sum()) == len(kept)
    # A stable sort keeps the images of a client ascending.
    whole = kept[client_N.argsort(stable=True)].split(counts.tolist())
    unused_C = torch.bincount(labels, minlength=classes)
    unused_C -= torch.bincount(labels[kept], minlength=classes)
    pairs = [
        _hold_out(images, settings.held_out_share, about["seed"], client)
        for client, images in enumerate(whole)
    ]
    indices, held_out = zip(*pairs, strict=True)
    sizes = torch.tensor([len(own) for own in indices])
    table_MC = torch.stack([torch.bincount(labels[own], minlength=classes) for own in indices])
    global_C = table_MC.sum(0).double() / sizes.sum()
    distance_M = (table_MC.double() / sizes[:, None] - global_C).abs().sum(1) / 2
    everything = sizes.numpy().tobytes() + torch.cat([*indices, *held_out]).numpy().tobytes()
    return Partition(
        indices=indices,
        held_out=held_out,
        sizes=tuple(sizes.tolist()),
        histograms=tuple(tuple(row) for row in table_MC.tolist()),
        skew=float(distance_M.mean()),
        sha256=hashlib.sha256(everything).hexdigest(),
        dropped=tuple(unused_C.tolist()) if unused_C.any() else (),
        **about,
    )


def _hold_out(
    images: torch.Tensor, share: float, seed: int, client: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's images -> those it trains on, those of its own test set."""
    order = torch.randperm(len(images), generator=generator(seed, "held-out", client=client))
    count = int(share * len(images) + 1e-9)  # 0.29 * 100 is 28.999...
    return images[order[count:].sort().values], images[order[:count].sort().values]
