"""The federated loop on a GPU: G1 and G3.

G1: at most 1.0 ms per client-step at width 64 and 0.45 ms at width 16 (batch 64, bf16, five
clients), and at least 10x a bare eager loop in the same run; replayed and eager steps give the same
bits. G3: the device works at least 70 % of a round.
"""

import dataclasses
import time
from collections.abc import Callable

import torch

from bench.claims import BARE, REPLAYED
from bench.contexts import bare_steps, synthetic_context
from bench.harness import Bench, guarded, interleaved
from bench.record import Record
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import FederatedState, initial_state

CLIENTS, BATCH = 5, 64
# Width -> methods; FedAvg first, whose steps are the bare loop's.
CASES = {64: ("fedavg", "semanticfl", "scaffold", "moon", "fedrcl"), 16: ("fedavg", "semanticfl")}
STEPS = 20  # of each client


def stage(record: Record, bench: Bench) -> None:
    """Record a row per method, width and contender under "loop", and the large round under
    "round"."""
    cases = {2: ("fedavg", "semanticfl")} if bench.rehearse else CASES
    for width, methods in cases.items():
        for method in methods:
            with guarded(record, f"loop, {method}, width {width}"):
                measure_method(record, bench, method, width)
    with guarded(record, "a round of CIFAR-10's size"):
        measure_round(record, bench)


def measure_method(record: Record, bench: Bench, method: str, width: int) -> None:
    """Milliseconds per client-step: replayed with one replica and with five, eager, and bare."""
    counts = zip(REPLAYED, (1, CLIENTS), strict=True)
    contexts = {name: context_of(bench, method, width, count) for name, count in counts}
    eager = context_of(bench, method, width, 1)
    uncaptured = dataclasses.replace(eager.method, capturable=False)
    contexts["ours, eager"] = dataclasses.replace(eager, method=uncaptured)
    start = initial_state(eager)
    results = {name: run_round(start, context) for name, context in contexts.items()}
    after, line = results["ours, eager"]
    calls = {name: round_of(start, context) for name, context in contexts.items()}
    if method == "fedavg":
        calls[BARE] = lambda: bare_steps(eager, list(range(CLIENTS)))
    elif method != "semanticfl":
        del calls["ours, eager"]  # takes most of the time, and says no more of these
    sampling = {"least": 3} | bench.sampling
    for name, times in interleaved(calls, bench.device, **sampling).items():
        row = {"method": method, "width": width, "contender": name, **times}
        row["ms_per_client_step"] = times["median_ms"] / line["steps"]
        if name in results:
            row["equals_eager"] = torch.equal(results[name][0].params, after.params)
        record.add("loop", row)
        print(f"{method}, width {width}, {name}: {row['ms_per_client_step']:.3f} ms", flush=True)


def measure_round(record: Record, bench: Bench) -> None:
    """A round of CIFAR-10's size: five of ten clients, ten epochs; and the device's share of it."""
    samples, epochs = (8, 1) if bench.rehearse else (5_000, 10)
    width = 2 if bench.rehearse else 64
    settings = {"federation__local_epochs": epochs, "federation__clients_per_round": CLIENTS}
    settings["federation__batch_size"] = BATCH
    context = synthetic_context(
        10, samples, width, run__device=bench.device.type, data__augment=True, **settings
    )
    start = initial_state(context)
    run_round(start, context)  # captures
    began = time.perf_counter()
    _, line = run_round(start, context)
    seconds = time.perf_counter() - began
    found = {"steps": line["steps"], "seconds": seconds, "batch": BATCH}
    found["ms_per_client_step"] = 1e3 * seconds / line["steps"]
    short = context_of(bench, "semanticfl", width, CLIENTS)
    state = initial_state(short)
    run_round(state, short)
    found["device_share"] = device_share(round_of(state, short), bench.device)
    record.set("round", found)
    print(f"a round: {found}", flush=True)


def context_of(bench: Bench, method: str, width: int, replicas: int) -> RunContext:
    """Five equal clients with augmentation."""
    return synthetic_context(
        CLIENTS,
        8 if bench.rehearse else BATCH * STEPS,
        width,
        federation__method=method,
        data__augment=True,
        run__device=bench.device.type,
        run__replicas=replicas,
        federation__batch_size=4 if bench.rehearse else BATCH,
    )


def round_of(state: FederatedState, context: RunContext) -> Callable[[], object]:
    """The first round as a call."""
    return lambda: run_round(state, context)


def device_share(call: Callable, device: torch.device) -> float | None:
    """The share of a call's time in which the device works, on any stream; None off the GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, last = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy / 1e6 / seconds
