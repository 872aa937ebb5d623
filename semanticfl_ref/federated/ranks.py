"""Several processes of torchrun train a round's clients together; the result is that of one.

Each rank trains its share of a cohort on its own device and sends the trained parameters to all
others. Every rank then takes the server's turns alike, with the whole state in its memory: nothing
else has to be exchanged, and the method's state stays where it is used. Rank 0 alone writes.

Letters: R models of a cohort, P size of a flat vector.
"""

import io
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from semanticfl_ref.config.settings import Config
from semanticfl_ref.cores import rank, ranks
from semanticfl_ref.errors import RankLost, UserError
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.replicas import Item, Replicas, Result
from semanticfl_ref.federated.report import ClientReport
from semanticfl_ref.federated.state import FederatedState, require_identity
from semanticfl_ref.formatting import Say

# A dead rank is noticed at once, by its closed connections: this is for ranks that only wait, such
# as for features that another one extracts.
TIMEOUT = timedelta(days=1)
_runs = itertools.count()
PATIENCE = 3.0  # seconds in which a rank that lives says so
REMEDY = "the last checkpoint is whole: continue with --resume"


@contextmanager
def joined(config: Config) -> Iterator[dist.Store | None]:
    """The group of torchrun's ranks, for as long as the context lasts; None in a process alone.

    An error that ends one rank ends all; rank 0, or else the first that is left, says why.

    Raises:
        UserError: more ranks than clients per round, or than GPUs.
        RankLost: another rank ended.
    """
    if ranks() == 1:
        yield None
        return
    backend = _backend(config)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"run {next(_runs)}", store)  # a program may train several times
    dist.init_process_group(backend, store=store, rank=rank(), world_size=ranks(), timeout=TIMEOUT)
    store.set(f"doing/{rank()}", "killed while it loaded")
    try:
        yield store
    except BaseException as error:
        _ignore_signals()
        dist.destroy_process_group()  # the others may be waiting for this rank
        _explain(error, store)
        raise
    dist.destroy_process_group()


class AcrossRanks:
    """What `Replicas` is to one process, for all ranks together.

    Args:
        own: this rank's replicas.
        config: `federation.clients_per_round` bounds the cohort.
        store: where a rank writes what it is doing.

    Attributes:
        params_RP: float32 [R, P]: the models of a cohort, the same on every rank.
    """

    def __init__(self, own: Replicas, config: Config, store: dist.Store):
        self.own, self._store = own, store
        rows, size = own.params_RP.shape
        count = min(config.federation.clients_per_round, rows * ranks())
        self.params_RP = own.params_RP.new_zeros(count, size)

    def train(self, updates: list[LocalUpdate]) -> list[ClientReport]:
        """As `Replicas.train`; every rank gets all parameters and all reports."""
        sizes = [update.context.partition.sizes[update.client] for update in updates]
        # The largest first, in turn: each rank gets as many, and about as many images.
        order = sorted(range(len(updates)), key=lambda i: -sizes[i])
        shares = [order[first :: ranks()] for first in range(ranks())]
        mine = shares[rank()]
        clients = ", ".join(str(updates[i].client) for i in mine)
        doing = f"killed in round {updates[0].round}, with clients {clients}"
        self._store.set(f"doing/{rank()}", doing)
        reports = dict(zip(mine, self.own.train([updates[i] for i in mine]), strict=True))
        for i, row_P in zip(mine, self.own.params_RP, strict=False):
            self.params_RP[i] = row_P
        with _lost_if_broken():
            for source, share in enumerate(shares):
                for i in share:
                    dist.broadcast(self.params_RP[i], source)
        reports = {i: report for part in gathered(reports) for i, report in part.items()}
        return [reports[i] for i in range(len(updates))]

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """As `Replicas.map`; on CPUs each rank computes a share."""
        if self.params_RP.is_cuda:
            return self.own.map(function, items)
        results = list(items)
        shares = gathered(self.own.map(function, results[rank() :: ranks()]))
        for first, share in enumerate(shares):
            results[first :: ranks()] = share
        return results

    def fit(self, update: LocalUpdate, say: Say) -> None:
        """As `Replicas.fit`; the rank with the least memory decides."""
        self.own.fit(update, say)
        rows = min(gathered(len(self.own.params_RP)))
        self.params_RP = self.params_RP[: rows * ranks()]


def gathered(value: Result) -> list[Result]:
    """Every rank's value, by rank; tensors in it are on the CPU."""
    file, found = io.BytesIO(), [b""] * ranks()
    torch.save(value, file)
    with _lost_if_broken():
        dist.all_gather_object(found, file.getvalue())
    # The ranks are one program: what they send one another is trusted as their code is.
    return [torch.load(io.BytesIO(each), "cpu", weights_only=False) for each in found]


def require_agreement(document: dict) -> None:
    """Check that all ranks have the same settings, data and versions.

    Raises:
        MismatchError: names the first rank that differs from rank 0, and in what.
    """
    first, *others = gathered(document)
    for number, other in enumerate(others, 1):
        remedy = "give every machine the same versions, data and flags"
        require_identity(f"rank {number}", other, first, remedy)


def state_of_first(state: FederatedState) -> FederatedState:
    """Rank 0's state, on every rank."""
    with _lost_if_broken():
        for _, tensor in sorted(state.tensors.items()):  # a checkpoint has another order
            if tensor.numel():
                dist.broadcast(tensor, 0)
    return replace(state, round=gathered(state.round)[0])


def _backend(config: Config) -> str:
    most = config.federation.clients_per_round
    if ranks() > most:
        raise UserError(
            f"torchrun started {ranks()} ranks for {most} clients per round: a rank would have "
            f"nothing to do; use --nproc-per-node {most} at most, or raise --clients-per-round"
        )
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    place, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= devices:
        raise UserError(
            f"rank {rank()} has no GPU of its own: torch finds {devices} on this machine; use "
            f"--nproc-per-node {devices}, or --device cpu"
        )
    torch.cuda.set_device(place)
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _lost_if_broken() -> Iterator[None]:
    """Turn a broken connection inside into RankLost."""
    try:
        yield
    except RuntimeError as error:
        _ignore_signals()
        raise RankLost(REMEDY) from error


def _ignore_signals() -> None:
    """torchrun stops all ranks when one ends: that would break off the saving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _explain(error: BaseException, store: dist.Store) -> None:
    """Find out whose end ended this rank, and raise the error that says so.

    Returns if the error is to be raised as it is. A rank that has nothing to say exits.
    """
    stopped = isinstance(error, RankLost | KeyboardInterrupt)
    store.set(f"ended/{rank()}", "" if stopped else str(error) or type(error).__name__)
    causes, alive, deadline = [], [], time.monotonic() + PATIENCE
    for number in range(ranks()):
        ended = f"ended/{number}"
        while not store.check([ended]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if store.check([ended]):
            alive.append(number)
        else:
            ended = f"doing/{number}"
        words = store.get(ended).decode()
        if words:
            causes.append(f"rank {number} of {ranks()} ended: {words}")
    if rank() > alive[0] and (stopped or isinstance(error, UserError)):
        raise SystemExit(1) from None
    if stopped and causes:
        # torchrun's signal may come before the broken connection: such an interrupt has no words.
        raise RankLost(f"{'; '.join(causes)}; {str(error) or REMEDY}") from None
