"""Client models side by side: each trains, and leaves a row of the matrix that the server averages.

Each replica has a Python thread, since torch's operations release the interpreter's lock. On CUDA
it also has a stream: each batch size's training step is captured as a graph, then replayed, so that
the device does not wait for Python. Its parameters are no views of the row, where they would lie at
any address: on an H200, fp32 training of narrow models then ended in "misaligned address".

What a client trains does not depend on how many replicas there are.

Letters: R models of a cohort, P size of a flat vector, B batch.
"""

import copy
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from semanticfl_ref.config.settings import Config
from semanticfl_ref.cores import cores, ranks
from semanticfl_ref.data.batches import batch_sizes
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.client import local_step, train_client
from semanticfl_ref.federated.flat import flatten_params, load_params, with_parameters
from semanticfl_ref.federated.local_optimizer import learning_rate, make_optimizer, reset_optimizer
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.report import ClientReport, FirstBatch
from semanticfl_ref.formatting import Say

COHORT = 16  # models that are in memory at a time, beside those that a method keeps
WARM_UP = 2  # calls of a step before its capture, in which libraries choose their algorithms

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CapturedStep:
    """A training step as a CUDA graph.

    Attributes:
        graph: the graph; a replay overwrites the tensors of `first`.
        index_B, crop_3B: what it reads, to be written before a replay; crop_3B may be None.
        first: what the step returned.
    """

    graph: "torch.cuda.CUDAGraph"
    index_B: torch.Tensor
    crop_3B: torch.Tensor | None
    first: FirstBatch | None


class Replica:
    """A client model in training, and what a local update needs beside it.

    All tensors stay where they are from one client to the next, since a captured step knows their
    addresses.

    Args:
        model: is copied.
        config: `federation` has the optimizer's settings.
        stopped: set when the other replicas should stop.

    Attributes:
        model: in training.
        optimizer: starts afresh with every client.
        rate: learning rate of the round, scalar tensor.
        parameters: the model's parameters, each with the value received.
        corrections: the model's parameters, each with what is added to its gradient, or to its
            step after momentum; or empty.
        references: name -> frozen model, see `Method.reference_models`.
        loss, epoch_loss: the objective summed over all steps and over the epoch's, scalar tensors.
        terms: name -> unweighted term summed over all steps, scalar tensor.
    """

    def __init__(self, model: nn.Module, config: Config, stopped: threading.Event):
        self.model, self.stopped = copy.deepcopy(model), stopped
        self._start_P = torch.zeros_like(flatten_params(model))
        self._correction_P = torch.zeros_like(self._start_P)
        self.rate, self.loss, self.epoch_loss = (self._start_P.new_zeros(()) for _ in range(3))
        self.optimizer = make_optimizer(self.model.parameters(), config.federation, self.rate)
        self.parameters = with_parameters(self.model, self._start_P)
        self._corrections = with_parameters(self.model, self._correction_P)
        self.corrections: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.references: dict[str, nn.Module] = {}
        self.terms: dict[str, torch.Tensor] = {}
        on_cuda = self._start_P.is_cuda
        self.stream = torch.cuda.Stream(self._start_P.device) if on_cuda else None
        self._captured: dict[tuple, CapturedStep] = {}

    def train(self, update: LocalUpdate, row_P: torch.Tensor) -> ClientReport:
        """Train a client on the replica's stream; its parameters are then in a row of the matrix.

        Raises:
            CancelledError: another replica failed.
        """
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(self.stream):  # None changes nothing
            self.receive(update)
            report = train_client(update, self)
            row_P.copy_(flatten_params(self.model))
        if self.stream is not None:
            self.stream.synchronize()
        return report

    def receive(self, update: LocalUpdate) -> None:
        """Take over a client: its parameters, reference models and correction; sums are zero."""
        method = update.context.method
        self._start_P.copy_(update.start_P)
        load_params(self.model, self._start_P)
        for name, params_P in method.reference_models(update).items():
            if name not in self.references:
                reference = copy.deepcopy(update.context.model)
                self.references[name] = reference.requires_grad_(False).eval()
            load_params(self.references[name], params_P)
        correction_P = method.correction(update)
        self.corrections = []
        if correction_P is not None:
            self._correction_P.copy_(correction_P)
            self.corrections = self._corrections
        self.rate.fill_(learning_rate(update.config.federation, update.round))
        reset_optimizer(self.optimizer)
        for tensor in (self.loss, *self.terms.values()):
            tensor.zero_()

    def add_term(self, name: str, value: torch.Tensor) -> None:
        """Add an unweighted term of a step to its sum."""
        if name not in self.terms:
            self.terms[name] = torch.zeros_like(value)
        self.terms[name] += value

    def step(
        self,
        update: LocalUpdate,
        index_B: torch.Tensor,
        crop_3B: torch.Tensor | None,
        is_first: bool,
    ) -> FirstBatch | None:
        """`local_step` with these arguments, replayed if it was captured.

        Raises:
            CancelledError: another replica failed.
        """
        if self.stopped.is_set():
            raise CancelledError
        captured = self._captured.get(_key(update, len(index_B), is_first))
        if captured is None:
            return local_step(update, self, index_B, crop_3B, is_first)
        captured.index_B.copy_(index_B)
        if crop_3B is not None:
            captured.crop_3B.copy_(crop_3B)
        captured.graph.replay()
        return captured.first

    def capture(self, update: LocalUpdate) -> None:
        """Capture `local_step` for every batch size of a client, as far as it is not captured.

        To be called from the main thread while no replica trains.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
            UserError: a term of the method waits for the device.
        """
        context = update.context
        count = len(context.partition.indices[update.client])
        sizes = set(batch_sizes(count, context.config.federation.batch_size))
        wanted = {_key(update, size, is_first) for size in sizes for is_first in (True, False)}
        if not context.method.capturable or wanted <= self._captured.keys():
            return
        self.model.train()
        self.receive(update)
        for key in sorted(wanted - self._captured.keys(), reverse=True):  # large batches first
            index_B = torch.zeros(key[0], dtype=torch.int64, device=context.device)
            crop_3B = index_B.repeat(3, 1) if context.config.data.augment else None
            inputs = (update, self, index_B, crop_3B, key[1])
            self.stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    local_step(*inputs)
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next((other.graph.pool() for other in self._captured.values()), None)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                    first = local_step(*inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                name = context.config.federation.method
                raise UserError(
                    f"a training step of {name} cannot be captured as a CUDA graph ({error}): make "
                    f"its Method with capturable=False"
                ) from error
            self._captured[key] = CapturedStep(graph, index_B, crop_3B, first)


class Replicas:
    """The replicas of a run.

    Args:
        model: is copied for each.
        config: `run.replicas`: how many train side by side; 0: as many as the processor's cores
            bear with `run.threads` each, on CUDA as many as the memory bears.
        device: where they are.

    Attributes:
        params_RP: float32 [R, P]: the models of a cohort, which has at most R clients.
    """

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        rows = min(-(-config.federation.clients_per_round // ranks()), COHORT)
        threads = config.run.threads or torch.get_num_threads()
        count, on_cuda = config.run.replicas, device.type == "cuda"
        if count == 0:
            count = rows if on_cuda else max(1, cores() // threads)
        count = min(count, rows)
        # On CUDA a cohort trains at once.
        rows = count if on_cuda else rows
        self._is_automatic = config.run.replicas == 0
        self._stopped = threading.Event()
        self.params_RP = torch.zeros(rows, len(flatten_params(model)), device=device)
        self.replicas = [Replica(model, config, self._stopped) for _ in range(count)]
        self._pool = None
        if count > 1:
            self._pool = ThreadPoolExecutor(
                count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
            )

    def train(self, updates: list[LocalUpdate]) -> list[ClientReport]:
        """Train a cohort; the clients' parameters are then the first rows of `params_RP`.

        The first exception in a replica, or Ctrl-C, ends all.
        """
        rows_RP, order = self.params_RP, list(range(len(updates)))
        reports: dict[int, ClientReport] = {}

        def work(replica: Replica, clients: Iterable[int]) -> None:
            for i in clients:
                reports[i] = replica.train(updates[i], rows_RP[i])

        if rows_RP.is_cuda:
            shares = [[i] for i in order]
            for replica, update in zip(self.replicas, updates, strict=False):
                replica.capture(update)
        else:
            # The client with the most images first; a free replica takes the next one.
            sizes = [update.context.partition.sizes[update.client] for update in updates]
            shares = [iter(sorted(order, key=lambda i: -sizes[i]))] * len(self.replicas)
        if self._pool is None:
            work(self.replicas[0], order)
        else:
            self._side_by_side(work, shares)
        return [reports[i] for i in order]

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of a function without side effects, computed side by side on a CPU."""
        spread = map if self._pool is None or self.params_RP.is_cuda else self._pool.map
        return list(spread(function, items))

    def fit(self, update: LocalUpdate, say: Say) -> None:
        """On CUDA, capture a client's steps with every replica that memory suffices for.

        Raises:
            torch.OutOfMemoryError: it does not suffice for one.
        """
        if not self.params_RP.is_cuda:
            return
        kept = 0
        for replica in self.replicas:
            free, _ = torch.cuda.mem_get_info()
            try:
                replica.capture(update)
            except torch.OutOfMemoryError:
                if kept == 0:
                    raise
                break
            kept += 1
            left, _ = torch.cuda.mem_get_info()
            if self._is_automatic and left < 2 * (free - left):
                break
        if kept < len(self.replicas):
            say(f"memory suffices for {kept} clients side by side (run.replicas)")
            del self.replicas[kept:]
            self.params_RP = self.params_RP[:kept]

    def _side_by_side(self, work: Callable, shares: list[Iterable[int]]) -> None:
        futures = [
            self._pool.submit(work, *each) for each in zip(self.replicas, shares, strict=False)
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        except BaseException:
            self._stopped.set()
            raise
        finally:
            wait(futures)
            self._stopped.clear()


def _key(update: LocalUpdate, size: int, is_first: bool) -> tuple:
    """What a captured step depends on besides the tensors that it reads."""
    receives = update.context.partition.receives
    modalities = (receives(update.client, kind) for kind in ("visual", "text"))
    return (size, is_first, *modalities)
