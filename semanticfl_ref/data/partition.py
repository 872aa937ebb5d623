"""Training images partitioned across clients, by a scenario or a file.

Every client gets a minimum of images; a partition that is impossible is refused with the reason.

Letters: M clients in all, C classes, N images.
"""

import hashlib
import json
from dataclasses import dataclass, replace

import torch

from semanticfl_ref.config.registry import SCENARIOS
from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.partition_file import read_assignment
from semanticfl_ref.data.scenarios import Assignment, long_tail
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator
from semanticfl_ref.storage import user_path

CORRUPTIONS = ("grey", "blur", "noise", "colour cast", "low resolution")
MODALITIES = ("visual and text", "text", "visual", "neither")  # which anchors a client receives


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which client holds which training images, and how clients differ otherwise.

    Attributes:
        scenario, seed, alpha: how it was made; alpha is None where the scenario has none.
        indices: M ascending int64 tensors, the images that each client trains on.
        held_out: M ascending int64 tensors, the images of each client's own test set. All these
            tensors are disjoint; together they are all images but the `dropped` ones.
        sizes: M image counts, of `indices`.
        histograms: M rows of C image counts, of `indices`.
        skew: mean over clients of the total-variation distance between the client's and the global
            label distribution, 0 ... 1.
        kl: mean over clients of KL(client's label distribution || global one), in nats.
        sha256: of the indices.
        dropped: C counts of unused images (outside the long tail, or in no list of a file); empty
            if there are none.
        corruptions, modalities: M names, of CORRUPTIONS and of MODALITIES; empty where clients do
            not differ in them.
        client_names: M names of the data set's own clients, with the scenario natural.
    """

    scenario: str
    seed: int
    alpha: float | None
    indices: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]
    sizes: tuple[int, ...]
    histograms: tuple[tuple[int, ...], ...]
    skew: float
    kl: float
    sha256: str
    dropped: tuple[int, ...] = ()
    corruptions: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()

    @property
    def trained(self) -> torch.Tensor:
        """The images that some client trains on, ascending int64."""
        return torch.cat(self.indices).sort().values

    @property
    def used(self) -> torch.Tensor:
        """The images that some client holds, ascending int64."""
        return torch.cat([*self.indices, *self.held_out]).sort().values

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
        held_out_sizes = [len(own) for own in self.held_out]
        values = {**vars(self), "clients": len(self.indices), "held_out_sizes": held_out_sizes}
        del values["indices"], values["held_out"]
        return json.loads(json.dumps(values))  # tuples become lists


def make_partition(
    labels: torch.Tensor,
    settings: PartitionSettings,
    *,
    classes: int,
    seed: int,
    data_sha256: str = "",
    natural_N: torch.Tensor | None = None,
    client_names: tuple[str, ...] = (),
) -> Partition:
    """Partition the training images.

    Args:
        labels: int64 [N], 0 ... C - 1.
        settings: the section `partition`; every client gets at least `minimum` images, which the
            largest clients give (the data set's own clients give none).
        classes: C.
        seed: the run's seed.
        data_sha256: of the data set; a partition file may record it.
        natural_N, client_names: int64 [N], the clients that the data set itself has, and their
            names; None and () without.

    Raises:
        UserError: too few images for so many clients, or what a scenario does not allow.
        DataError, MismatchError: the file is damaged, gives a client too few images, or belongs to
            another data set.
    """
    labels = labels.cpu()
    kept = long_tail(labels, classes, settings.imbalance, generator(seed, "long-tail"))
    client_N = torch.full_like(labels, -1)  # unused
    if settings.file:
        listed_N = read_assignment(
            user_path(settings.file), len(labels), settings.clients, data_sha256
        )
        client_N[kept] = listed_N[kept]
    else:
        assignment = Assignment(
            labels=labels[kept],
            classes=classes,
            settings=settings,
            minimum=settings.minimum,
            generator=generator(seed, f"partition-{settings.scenario}"),
            natural_N=None if natural_N is None else natural_N.cpu()[kept],
            client_names=client_names,
        )
        client_N[kept] = _assign(assignment)
    partition = _partition(client_N, labels, settings, classes=classes, seed=seed)
    natural = partition.scenario == "natural"
    return replace(partition, client_names=client_names) if natural else partition


def _assign(a: Assignment) -> torch.Tensor:
    """The client of every image, int64 [N], by the scenario; every client gets its minimum."""
    name, images, needed = a.settings.scenario, len(a.labels), a.clients * a.minimum
    if images < needed:
        raise UserError(
            f"{a.clients} clients need at least {needed} training images ({a.minimum} each), there "
            f"are {images}: lower --clients"
        )
    client_N = SCENARIOS[name](a)
    valid = client_N.dtype == torch.int64 and client_N.shape == a.labels.shape
    if not valid or client_N.min() < 0 or client_N.max() >= a.clients:
        raise UserError(
            f"scenario {name!r} must return the client of every image, int64 [{images}] in 0 ... "
            f"{a.clients - 1}; it returns {client_N.dtype} {list(client_N.shape)}"
        )
    return _repair(client_N, a)


def _repair(client_N: torch.Tensor, a: Assignment) -> torch.Tensor:
    """Every client its minimum: one image at a time from the largest, at most M * minimum moves."""
    sizes_M = torch.bincount(client_N, minlength=a.clients).numpy()
    order_N = torch.randperm(len(client_N), generator=a.generator)
    images_M = order_N[client_N[order_N].argsort(stable=True)].split(sizes_M.tolist())
    for m in range(a.clients):
        while sizes_M[m] < a.minimum:
            largest = sizes_M.argmax()
            sizes_M[largest] -= 1
            client_N[images_M[largest][sizes_M[largest]]] = m
            sizes_M[m] += 1
    return client_N


def _partition(
    client_N: torch.Tensor,
    labels: torch.Tensor,
    settings: PartitionSettings,
    *,
    classes: int,
    seed: int,
) -> Partition:
    """The partition that gives every image to this client, or to none (-1)."""
    counts = torch.bincount(client_N + 1, minlength=settings.clients + 1).tolist()
    totals = counts[1:]
    if min(totals) < settings.minimum:  # by a file only, since scenarios are repaired
        left = ", of those that partition.imbalance leaves" if settings.imbalance > 1 else ""
        raise DataError(
            f"partition.file = {settings.file}: client {totals.index(min(totals))} has "
            f"{min(totals)} images{left}; at least {settings.minimum} are needed"
        )
    # A stable sort keeps the images of a client ascending.
    unused, *whole = client_N.argsort(stable=True).split(counts)
    pairs = [_hold_out(own, settings, seed, client) for client, own in enumerate(whole)]
    indices, held_out = zip(*pairs, strict=True)
    table_MC = torch.stack([torch.bincount(labels[own], minlength=classes) for own in indices])
    sizes_M = table_MC.sum(1)
    client_MC = table_MC.double() / sizes_M[:, None]
    global_C = table_MC.sum(0).double() / sizes_M.sum()
    distance_M = (client_MC - global_C).abs().sum(1) / 2
    kl_M = torch.xlogy(client_MC, client_MC / global_C.clamp(min=1e-300)).sum(1)
    unused_C = torch.bincount(labels[unused], minlength=classes)
    everything = sizes_M.numpy().tobytes() + torch.cat([*indices, *held_out]).numpy().tobytes()
    corruptions = modalities = ()
    if settings.feature_shift == "corruption":
        # "cameras" is an earlier name: another one would change published results.
        corruptions = _in_turn(CORRUPTIONS, settings.clients, generator(seed, "cameras"))
    if settings.modality == "mixed":
        modalities = _in_turn(MODALITIES, settings.clients, generator(seed, "modalities"))
    scenario = "file" if settings.file else settings.scenario
    return Partition(
        scenario=scenario,
        seed=seed,
        alpha=settings.alpha if scenario in ("nid1", "extended", "quantity") else None,
        indices=indices,
        held_out=held_out,
        sizes=tuple(sizes_M.tolist()),
        histograms=tuple(tuple(row) for row in table_MC.tolist()),
        skew=float(distance_M.mean()),
        kl=float(kl_M.mean()),
        sha256=hashlib.sha256(everything).hexdigest(),
        dropped=tuple(unused_C.tolist()) if len(unused) else (),
        corruptions=corruptions,
        modalities=modalities,
    )


def _hold_out(
    images: torch.Tensor, settings: PartitionSettings, seed: int, client: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's images -> those it trains on, those of its own test set; both ascending."""
    order = torch.randperm(len(images), generator=generator(seed, "held-out", client=client))
    count = int(settings.held_out_share * len(images) + 1e-9)  # 0.29 * 100 is 28.999...
    return images[order[count:].sort().values], images[order[:count].sort().values]


def _in_turn(names: tuple[str, ...], clients: int, source: torch.Generator) -> tuple[str, ...]:
    """A name for each client: in turn, over a seeded shuffle of the clients."""
    order = torch.randperm(clients, generator=source).tolist()
    return tuple(names[position % len(names)] for position in order)
