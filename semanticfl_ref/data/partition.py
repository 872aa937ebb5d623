"""Who holds what: the training images spread over clients by a scenario or a file, drawn once,
repaired within a bound, or refused by name.

Letters: M clients in all, C classes, N images.
"""

import hashlib
import heapq
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from semanticfl_ref.config import SCENARIOS
from semanticfl_ref.data import scenarios
from semanticfl_ref.data.partition_file import read_owners
from semanticfl_ref.errors import DataError, UserError, unknown
from semanticfl_ref.randomness import generator

ALPHA_RANGE = (1e-6, 1e6)  # outside, Gamma draws leave float64's range in logarithms too
CAMERAS = ("grey", "blur", "noise", "colour cast", "low resolution")
MODALITIES = ("visual and text", "text", "visual", "neither")  # which anchors a client gets


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which images are whose, and what else tells clients apart.

    indices: M ascending int64 tensors into the training images: what each client trains on.
    held_out: M ascending int64 tensors: what each client keeps for a test of its own; empty at
        share 0. All of these tensors are disjoint, together all images but those `dropped`.
    sizes: M image counts, of `indices`. histograms: M rows of C image counts, of `indices`.
    skew: mean over clients of the total-variation distance between a client's and the global label
        distribution, 0 ... 1.
    sha256: of the indices.
    dropped: C counts of the images that belong to nobody: outside the long tail, or in no list of
        the file; empty = none.
    cameras, modalities: M names, of CAMERAS and of MODALITIES; empty where clients do not differ in
        them.
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
    cameras: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()

    @property
    def owned(self) -> torch.Tensor:
        """The images that somebody holds, ascending int64."""
        return torch.cat([*self.indices, *self.held_out]).sort().values

    @property
    def kl(self) -> float:
        """Mean over clients of KL(client's || global label distribution), in nats."""
        table_MC = torch.tensor(self.histograms, dtype=torch.float64)
        own_MC, global_C = (
            table_MC / table_MC.sum(1, keepdim=True),
            table_MC.sum(0) / table_MC.sum(),
        )
        return float(torch.xlogy(own_MC, own_MC / global_C.clamp(min=1e-300)).sum(1).mean())

    def among_owned(self) -> "Partition":
        """The same partition of a data set that has the owned images alone."""
        owned = self.owned
        places = {
            name: tuple(torch.searchsorted(owned, i) for i in getattr(self, name))
            for name in ("indices", "held_out")
        }
        return replace(self, **places)

    def gets(self, client: int, anchors: str) -> bool:
        """Whether the client is sent these anchors, "visual" or "text"."""
        return not self.modalities or anchors in self.modalities[client]

    def manifest(self) -> dict:
        """Everything but the indices, which the hash stands for; ready for JSON."""
        return {
            "scenario": self.scenario,
            "seed": self.seed,
            "alpha": self.alpha if self.scenario in ("nid1", "quantity") else None,
            "clients": len(self.indices),
            "sizes": list(self.sizes),
            "held_out_sizes": [len(i) for i in self.held_out],
            "histograms": [list(row) for row in self.histograms],
            "dropped": list(self.dropped),
            "cameras": list(self.cameras),
            "modalities": list(self.modalities),
            "skew": self.skew,
            "kl": self.kl,
            "sha256": self.sha256,
        }


def make_partition(
    labels: torch.Tensor,
    *,
    scenario: str,
    clients: int,
    classes: int,
    alpha: float,
    seed: int,
    minimum: int = 2,
    held_out_share: float = 0.0,
    classes_per_client: int = 2,
    imbalance: float = 1.0,
    features: str = "none",
    modality: str = "none",
    file: Path | None = None,
    data_sha256: str = "",
) -> Partition:
    """Split the training images over clients.

    Args:
        labels: int64 [N], 0 ... C - 1.
        scenario: one of SCENARIOS.
        clients: M.
        classes: C.
        alpha: Dirichlet concentration of nid1 and quantity, 1e-6 ... 1e6; small = skewed.
        seed: the run's seed.
        minimum: images that every client gets at least; the largest clients give what is missing.
        held_out_share: of each client's images, 0 ... 0.5, rounded down: it keeps them for a test
            of its own.
        classes_per_client: k of pathological.
        imbalance: factor >= 1 of the long tail over classes, made before the split; 1 = none.
        features: "none", or "camera": a camera for each client, which `cameras.py` applies.
        modality: "none", or "mixed": clients differ in the anchors that they get.
        file: lists of indices in the scenario's place, see `partition_file.py`; data_sha256: of the
            data set, which the file may record.

    Raises:
        UserError: an unknown scenario; alpha out of range; more clients than images (times
            `minimum`); a nid2 of other than six clients; shards that do not come out. DataError,
            MismatchError: the file is damaged, gives a client too little, or is of another data
            set.
    """
    N, labels = len(labels), labels.cpu()
    assert N == 0 or (int(labels.min()) >= 0 and int(labels.max()) < classes)
    if scenario not in SCENARIOS:
        raise unknown("scenario", scenario, SCENARIOS)
    if clients < 1:
        raise UserError(f"partition.clients = {clients}: at least one client is needed")
    if not ALPHA_RANGE[0] <= alpha <= ALPHA_RANGE[1]:  # NaN fails this too
        raise UserError(
            f"partition.alpha = {alpha}: must lie in {ALPHA_RANGE[0]:g} ... {ALPHA_RANGE[1]:g} (small = skewed, large = even)"
        )
    kept = scenarios.long_tail(labels, classes, imbalance, generator(seed, "long-tail"))
    if file is not None:
        scenario, owner_N = "file", read_owners(file, N, clients, data_sha256)
        kept = kept[owner_N[kept] >= 0]
        owner_N = owner_N[kept]
        _refuse_short(
            owner_N,
            clients,
            minimum,
            f"partition.file = {file}",
            ", of those that partition.imbalance leaves" if imbalance > 1 else "",
        )
    else:
        if len(kept) < clients * minimum:
            raise UserError(
                f"{clients} clients need at least {clients * minimum} training images ({minimum} each), there are {len(kept)}: lower --clients"
            )
        source, seen = generator(seed, f"partition-{scenario}"), labels[kept]
        owner_N = {
            "iid": lambda: scenarios.iid(seen, clients, source),
            "nid1": lambda: scenarios.nid1(seen, clients, classes, alpha, source),
            "nid2": lambda: scenarios.nid2(seen, clients, classes, source),
            "pathological": lambda: scenarios.pathological(
                seen, clients, classes, classes_per_client, minimum, source
            ),
            "quantity": lambda: scenarios.quantity(seen, clients, alpha, source),
        }[scenario]()
        owner_N = _repair(owner_N, clients, minimum, source)
    cameras = _dealt(CAMERAS, clients, seed, "cameras") if features == "camera" else ()
    modalities = _dealt(MODALITIES, clients, seed, "modalities") if modality == "mixed" else ()
    about = {
        "scenario": scenario,
        "seed": seed,
        "alpha": float(alpha),
        "cameras": cameras,
        "modalities": modalities,
    }
    return _finish(owner_N, kept, labels, classes, held_out_share, clients=clients, **about)


def describe(partition: Partition, class_names: tuple[str, ...]) -> str:
    """A table for a reader: a line per client with its size, its number of classes and the classes
    it holds most of.
    """
    alpha = f", alpha {partition.alpha:g}" if partition.scenario in ("nid1", "quantity") else ""
    dropped = f" ({sum(partition.dropped)} more belong to nobody)" if partition.dropped else ""
    head = f"{partition.scenario}{alpha}, seed {partition.seed}: {sum(partition.sizes)} images{dropped}, {len(partition.sizes)} clients, "
    columns = [
        (name, values)
        for name, values in (("camera", partition.cameras), ("anchors", partition.modalities))
        if values
    ]
    titles = "".join(f"{name:<17}" for name, _ in columns)
    lines = [
        head + f"skew {partition.skew:.3f}, KL {partition.kl:.3f}, sha256 {partition.sha256[:16]}",
        f"client  images  classes  {titles}most of",
    ]
    for client, (n, counts) in enumerate(zip(partition.sizes, partition.histograms, strict=True)):
        held = sorted((c for c in range(len(counts)) if counts[c]), key=lambda c: -counts[c])
        most = ", ".join(f"{class_names[c]} {counts[c]}" for c in held[:5]) + (
            ", ..." if len(held) > 5 else ""
        )
        lines.append(
            f"{client:>6}  {n:>6}  {len(held):>7}  {''.join(f'{values[client]:<17}' for _, values in columns)}{most}"
        )
    return "\n".join(lines)


def _dealt(names: tuple[str, ...], clients: int, seed: int, purpose: str) -> tuple[str, ...]:
    """A name for each client: in turn, over a seeded shuffle of the clients."""
    return tuple(
        names[place % len(names)]
        for place in torch.randperm(clients, generator=generator(seed, purpose)).tolist()
    )


def _refuse_short(
    owner_N: torch.Tensor, clients: int, minimum: int, where: str, of_what: str
) -> None:
    """Raise DataError where a file leaves a client below its minimum: what a user wrote is not
    repaired.
    """
    fewest = torch.bincount(owner_N, minlength=clients).min(0)
    if fewest.values < minimum:
        raise DataError(
            f"{where}: client {int(fewest.indices)} has {int(fewest.values)} images{of_what}; at least {minimum} are needed"
        )


def _repair(
    owner_N: torch.Tensor, clients: int, minimum: int, source: torch.Generator
) -> torch.Tensor:
    """Give every client its minimum: one image at a time from whoever is largest, at most M *
    minimum moves.
    """
    sizes = torch.bincount(owner_N, minlength=clients).tolist()
    poor = [m for m in range(clients) if sizes[m] < minimum]
    if not poor:
        return owner_N
    order = torch.randperm(len(owner_N), generator=source)
    stock = {m: order[owner_N[order] == m].tolist() for m in range(clients) if sizes[m] > minimum}
    largest = [(-len(images), m) for m, images in stock.items()]
    heapq.heapify(largest)
    for m in poor:
        for _ in range(minimum - sizes[m]):
            size, giver = heapq.heappop(largest)
            owner_N[stock[giver].pop()] = m
            if -size - 1 > minimum:
                heapq.heappush(largest, (size + 1, giver))
    return owner_N


def _finish(
    owner_N: torch.Tensor,
    kept: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    held_out_share: float,
    *,
    clients: int,
    **about,
) -> Partition:
    """Owners of the kept images -> Partition, with the invariants asserted."""
    counts = torch.bincount(owner_N, minlength=clients)
    whole = kept[owner_N.argsort(stable=True)].split(
        counts.tolist()
    )  # stable: ascending inside a client
    assert len(counts) == clients and int(counts.min()) > 0 and int(counts.sum()) == len(kept)
    lost_C = torch.bincount(labels, minlength=classes) - torch.bincount(
        labels[kept], minlength=classes
    )
    about["dropped"] = tuple(lost_C.tolist()) if lost_C.any() else ()
    indices, held_out = zip(
        *(
            _hold_out(images, held_out_share, about["seed"], client)
            for client, images in enumerate(whole)
        ),
        strict=True,
    )
    sizes = torch.tensor([len(i) for i in indices])
    table_MC = torch.stack([torch.bincount(labels[i], minlength=classes) for i in indices])
    global_C = table_MC.sum(0).double() / sizes.sum()
    skew = float((table_MC.double() / sizes[:, None] - global_C).abs().sum(1).mean() / 2)
    digest = hashlib.sha256(
        sizes.numpy().tobytes() + torch.cat([*indices, *held_out]).numpy().tobytes()
    ).hexdigest()
    histograms = tuple(tuple(row) for row in table_MC.tolist())
    return Partition(
        indices=indices,
        held_out=held_out,
        sizes=tuple(sizes.tolist()),
        histograms=histograms,
        skew=skew,
        sha256=digest,
        **about,
    )


def _hold_out(
    images: torch.Tensor, share: float, seed: int, client: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One client's images -> those it trains on, those of its own test."""
    order = torch.randperm(len(images), generator=generator(seed, "held-out", client=client))
    kept = int(share * len(images) + 1e-9)  # 0.29 * 100 is 28.999...
    return images[order[kept:].sort().values], images[order[:kept].sort().values]
