"""Clients side by side: the same bits however many there are, and steps that can be captured.

No GPU is needed: a captured step is emulated by a recording of its operations, which a replay runs
again on the same tensors.
"""

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT
from quadratic import run_rounds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.federated import replicas as replicas_module
from semanticfl_ref.federated.round import received, run_round
from semanticfl_ref.federated.state import initial_state, load_checkpoint, save_checkpoint

# Method -> settings with which all of it is at work.
SETTINGS = {name: {} for name in METHODS} | {
    "moon": {"moon__projection": 4},
    "fedcda": {"fedcda__warm_up": 0},
}

ROUND_OF = """
import resource
from bench.contexts import synthetic_context
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state

context = synthetic_context(clients={clients}, samples=2, width=8, federation__batch_size=2)
state, line = run_round(initial_state(context), context)
assert line["steps"] == {clients}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def five_clients(small_context, name, modalities=(), **settings):
    """Five clients in every round."""
    context = small_context(
        federation__method=name,
        partition__clients=5,
        federation__clients_per_round=5,
        data__augment=True,
        **SETTINGS[name],
        **settings,
    )
    return replace(context, partition=replace(context.partition, modalities=modalities))


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_replicas_does_not_matter(small_context, name, device):
    """1, 2, 3 or 5, and another number in every round."""

    def replicas(count):
        return five_clients(small_context, name, run__replicas=count, run__device=device)

    alone, lines = run_rounds(replicas(1), 3)
    for count in (2, 3, 5):
        state, again = run_rounds(replicas(count), 3)
        assert all(map(torch.equal, state.tensors.values(), alone.tensors.values()))
        assert again == lines
    contexts = [replicas(count) for count in (3, 1, 5)]
    state = initial_state(contexts[0])
    for context, line in zip(contexts, lines, strict=True):
        state, again = run_round(state, context)
        assert again == line
    assert torch.equal(state.params, alone.params)


def test_a_run_continues_with_another_number_of_replicas(small_context, tmp_path):
    whole, _ = run_rounds(five_clients(small_context, "scaffold", run__replicas=2), 2)
    half, _ = run_rounds(five_clients(small_context, "scaffold", run__replicas=5), 1)
    save_checkpoint(tmp_path / "c", half, {})
    context = five_clients(small_context, "scaffold", run__replicas=3)
    resumed, _ = run_round(load_checkpoint(tmp_path / "c", {}), context)
    assert torch.equal(resumed.params, whole.params)


def test_more_clients_than_rows(small_context, monkeypatch):
    whole, lines = run_rounds(five_clients(small_context, "semanticfl"))
    monkeypatch.setattr(replicas_module, "COHORT", 2)
    context = five_clients(small_context, "semanticfl")
    assert context.replicas.params_RP.shape == (2, context.layout.size)
    state, again = run_rounds(context)
    assert torch.equal(state.params, whole.params)
    assert again == lines


@pytest.mark.heavy
def test_memory_is_flat_in_the_clients_of_a_round():
    """In MiB: the models of 10 000 clients would take 3 000; their images take 59, and what each
    reports a few KiB."""
    peaks = {}
    for clients in (10, 100, 1_000, 10_000):
        command = [sys.executable, "-c", ROUND_OF.format(clients=clients)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks[clients] = int(done.stdout)
    assert peaks[10_000] < peaks[10] + 200, peaks


def test_the_automatic_number(small_context, monkeypatch):
    def count(cores, **settings):
        monkeypatch.setattr(replicas_module, "cores", lambda: cores)
        context = five_clients(small_context, "fedavg", **settings)
        return len(context.replicas.replicas)

    assert count(1) == 1
    assert count(3) == 3
    assert count(64) == 5  # the clients of a round
    assert count(6, run__threads=2) == 3
    assert count(1, run__threads=4) == 1
    assert count(1, run__replicas=4) == 4


def test_a_replica_has_the_threads_of_the_run(small_context, tamper):
    seen = []
    tamper(lambda *_: seen.append((threading.get_ident(), torch.get_num_threads())))
    torch.set_num_threads(2)
    run_rounds(five_clients(small_context, "fedavg", run__replicas=2), 1)
    assert {threads for _, threads in seen} == {2}
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_parameters_are_aligned_whatever_the_size_of_the_model(small_context):
    """Views of the rows would be no multiples of 16 bytes apart."""
    context = five_clients(small_context, "fedavg", run__replicas=5)
    run_rounds(context, 1)
    assert context.layout.size % 4
    for replica in context.replicas.replicas:
        assert all(tensor.data_ptr() % 16 == 0 for tensor in replica.model.state_dict().values())
        convolution = replica.model.stem.weight
        assert convolution.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_exception_ends_all_replicas(small_context, monkeypatch, error):
    """The others stop at their next step, and the replicas are ready for another round."""
    context = five_clients(small_context, "fedavg", run__replicas=2, federation__local_epochs=50)
    state, honest = initial_state(context), replicas_module.train_client
    ended = []

    def train(update, replica):
        if update.client == 1:
            raise error
        try:
            return honest(update, replica)
        except CancelledError:
            ended.append(update.client)
            raise

    with monkeypatch.context() as patch:
        patch.setattr(replicas_module, "train_client", train)
        with pytest.raises(type(error)):
            run_round(state, context)
    assert len(ended) == 1
    _, line = run_round(state, context)
    assert line["steps"] == 5 * 50


class Recording(TorchDispatchMode):
    """A CUDA graph's stand-in: records operations with their tensors, and repeats them.

    As a graph does, it refuses operations that wait for the device or whose results' shapes depend
    on values.
    """

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.calls = []

    def pool(self):
        return None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [t for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t)]
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        if name in self.REFUSED or by_mask:
            raise RuntimeError(f"{name} cannot be captured")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = tree_flatten(function(*args, **kwargs))[0]
                for old, new in zip(tree_flatten(result)[0], again, strict=True):
                    if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def emulated(monkeypatch):
    """Captures on the CPU: what `Replica.capture` calls of torch.cuda is replaced."""

    @contextmanager
    def graph(recording, pool, stream):
        with recording:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: None)

    def capture(context):
        """A single replica that can only replay."""
        replicas, state = context.replicas, initial_state(context)
        replicas.params_RP = replicas.params_RP[:1]
        (replica,) = replicas.replicas
        replica.stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
        for client in range(context.config.partition.clients):
            replica.capture(received(state, context, client))
        monkeypatch.delattr(replicas_module, "local_step")
        return context

    return capture


# In the second of two rounds the rate is another one than when the step was captured.
HALVED = {"federation__schedule": "exponential", "federation__decay": 0.5}
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("semanticfl", {"semanticfl__consistency": "cosine"}),
    ("semanticfl", {"modalities": ("visual", "neither", "text", "visual and text", "text")}),
    ("moon", {"federation__momentum": 0.0}),
    ("feddifrc", {"feddifrc__keys": "per-image", "feddifrc__consistency": "l2"}),
    ("scaffold", {"scaffold__place": "step"}),
    ("scaffold", {"scaffold__place": "step", "federation__momentum": 0.0}),
    ("scaffold", {"scaffold__place": "step", **HALVED}),
    ("scaffold", HALVED),
    ("fedavg", HALVED),
    ("fedavg", {"federation__optimizer": "nesterov"}),
    ("fedavg", {"federation__optimizer": "nesterov", **HALVED}),
    ("moon", {"federation__optimizer": "adam"}),
    ("semanticfl", {"federation__optimizer": "adamw", **HALVED}),
    ("fedavg", {"run__precision": "bf16"}),
    ("semanticfl", {"model__norm": "group"}),
    ("fedrcl", {"model__name": "resnet18", "model__norm": "none"}),
    ("semanticfl", {"model__name": "cnn", "model__norm": "group"}),
    ("fedavg", {"model__name": "mobilenet"}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_captured_step_is_the_plain_one(small_context, emulated, name, settings):
    """For all batch sizes, clients and rounds: what differs between them is in static tensors."""
    settings = {"run__replicas": 1, "federation__batch_size": 4, **settings}
    plain, lines = run_rounds(five_clients(small_context, name, **settings))
    context = emulated(five_clients(small_context, name, **settings))
    state, again = run_rounds(context)
    assert torch.equal(state.params, plain.params)
    assert all(map(torch.equal, state.tensors.values(), plain.tensors.values()))
    assert again == lines


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_what_cannot_be_captured_is_refused(operation):
    with pytest.raises(RuntimeError, match="cannot be captured"), Recording():
        operation(torch.ones(3))


def test_memory_decides_how_many_replicas_there_are_on_cuda(small_context, monkeypatch):
    replicas = five_clients(small_context, "fedavg", run__replicas=5).replicas
    said, captured, limit = [], [], 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 10))

    class OnCuda:
        is_cuda = True

        def __getitem__(self, rows):
            return rows

    replicas.params_RP = OnCuda()

    def capture(replica, update):
        if len(captured) == limit:
            raise torch.OutOfMemoryError
        captured.append(replica)

    monkeypatch.setattr(replicas_module.Replica, "capture", capture)
    replicas.fit(None, said.append)
    assert replicas.params_RP == slice(3)
    assert replicas.replicas == captured
    assert said == ["memory suffices for 3 clients side by side (run.replicas)"]
    replicas.params_RP = OnCuda()
    with pytest.raises(torch.OutOfMemoryError):
        replicas.fit(None, said.append)
