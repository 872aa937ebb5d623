"""The harness of the benchmarks: contenders are checked, and timed taking turns.

Turns matter on a shared machine: whatever else it does meets all contenders alike.
"""

import collections
import contextlib
import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from bench.record import Record
from semanticfl_ref.kernels.dispatch import interpreted

OURS = "ours"
FORWARD, BOTH = "forward", "forward and backward"
FLUSH_BYTES = 256 << 20  # larger than the level-2 cache of today's GPUs
CUDA_TIMER = (
    "CUDA events around one call, the level-2 cache overwritten (256 MiB zeroed) before each; "
    "contenders take turns; median, 20 % and 80 % quantiles"
)
CPU_TIMER = (
    "time.perf_counter around one call; contenders take turns; median, 20 % and 80 % quantiles"
)


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs.

    Attributes:
        device: of the tensors.
        rehearse: tiny shapes and a few samples, on any machine.
        seconds: that the stage may take.
    """

    device: torch.device
    rehearse: bool = False
    seconds: float = 0.0

    @property
    def impl(self) -> str:
        """Triton on a GPU. A rehearsal runs it through Triton's interpreter if that is on, else it
        runs the torch implementation."""
        return "triton" if not self.rehearse or interpreted() else "torch"

    @property
    def sampling(self) -> dict:
        """Keyword arguments of `interleaved`."""
        return {"seconds": 0.0, "least": 2} if self.rehearse else {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all contenders compute.

    Attributes:
        kernel, case, dtype, direction: names, for the reader.
        shape: letter -> size.
        bytes: least number that must be moved on the device: each input read once, each output
            written once.
    """

    kernel: str
    case: str
    dtype: str
    direction: str = FORWARD
    shape: dict[str, int] = field(default_factory=dict)
    bytes: int


@dataclass(frozen=True)
class Contender:
    """A call to be timed.

    Attributes:
        run: the call, without arguments.
        row: entries of its row that differ from the case's or are added to them.
    """

    run: Callable
    row: dict = field(default_factory=dict)


def measure(
    record: Record, bench: Bench, case: Case, contenders: dict[str, Contender], check: Callable
) -> None:
    """Measure the contenders of a case; each gives one row of the record, at once.

    A contender that fails is a row that says why.

    Args:
        record: receives the rows.
        bench: where it runs.
        case: what they compute.
        contenders: by name.
        check: (name, result of the call) -> {"errors": {...}, "correct": bool}.
    """
    ready = {}
    for name, contender in contenders.items():
        row = dataclasses.asdict(case) | {"contender": name} | contender.row
        try:
            row |= check(name, contender.run())
            row["peak_bytes"] = peak_extra_bytes(contender.run, bench.device)
            if name == OURS:
                row["repeatable"] = _equal(contender.run(), contender.run())
                row["launches"] = launches(contender.run, bench.device)
            ready[name] = row
        except Exception as error:
            record.add("rows", row | {"failed": explain(error)})
        _free_memory(bench.device)
    calls = {name: contenders[name].run for name in ready}
    times = interleaved(calls, bench.device, **bench.sampling)
    for name, row in ready.items():
        record.add("rows", row | times[name])
        place = ", ".join((case.kernel, case.case, case.dtype, case.direction, name))
        print(f"{place}: {times[name]['median_ms']:.4f} ms", flush=True)


def interleaved(
    contenders: dict[str, Callable],
    device: torch.device,
    *,
    seconds: float = 0.4,
    least: int = 5,
) -> dict[str, dict]:
    """Milliseconds of each contender, launches from Python included.

    Args:
        contenders: name -> a call without arguments.
        device: where the work is done: timed by CUDA events there, by the processor's clock
            elsewhere.
        seconds: of the whole measurement per contender, about.
        least: samples of each, after one warm-up; there are at most 100.

    Returns:
        name -> {"median_ms", "low_ms" (20 %), "high_ms" (80 %), "samples"}.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _milliseconds
    for contender in contenders.values():
        contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began, rounds = time.perf_counter(), 0
    while rounds < least or (
        rounds < 100 and time.perf_counter() - began < seconds * len(contenders)
    ):
        for name, contender in contenders.items():
            times[name].append(clock(contender))
        rounds += 1
    return {name: summary(taken) for name, taken in times.items()}


def fastest(*contenders: Callable, repeats: int = 5) -> list[float]:
    """Seconds of each contender on the CPU: the fastest of interleaved repeats, after a warm-up."""
    return [min(taken) for taken in _taking_turns(contenders, repeats)]


def medians(*contenders: Callable, repeats: int = 9) -> list[float]:
    """Seconds of each contender on the CPU: the median of interleaved repeats, after a warm-up."""
    return [statistics.median(taken) for taken in _taking_turns(contenders, repeats)]


def summary(milliseconds: list[float]) -> dict:
    """Median, spread and number of samples."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "low_ms": ordered[round(0.2 * last)],
        "high_ms": ordered[round(0.8 * last)],
        "samples": len(ordered),
    }


def peak_extra_bytes(contender: Callable, device: torch.device) -> int | None:
    """Device memory that a call takes at its peak beside its inputs and its result; None off the
    GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = contender()
    torch.cuda.synchronize(device)
    # What is allocated now is what was before, and the result.
    extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del result
    return extra


@contextlib.contextmanager
def guarded(record: Record, what: str) -> Iterator[None]:
    """Record an error inside under "failures", and continue."""
    try:
        yield
    except Exception as error:
        record.add("failures", {"what": what, "why": explain(error)})
        traceback.print_exc()


def as_graph(contender: str) -> str:
    """The name of a contender that is replayed as a CUDA graph."""
    return f"{contender}, as a CUDA graph"


def captured(run: Callable) -> Callable:
    """The call as a CUDA graph, which is replayed without launches from Python.

    Raises:
        RuntimeError: a call that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay():
        graph.replay()
        return result

    return replay


def launches(run: Callable, device: torch.device) -> dict[str, int] | None:
    """The kernels that a call launches, by name, as the profiler sees them.

    None off the GPU and where the profiler sees nothing.
    """
    if device.type != "cuda":
        return None
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    names = [
        event.name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1]
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return dict(collections.Counter(names)) or None


def explain(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:300]


def name_of(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


class _CudaClock:
    """Times a call on the device.

    The flush also gives Python a head start over the device, as in a training loop.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, contender: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        result = contender()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return start.elapsed_time(end)


def _taking_turns(contenders: tuple[Callable, ...], repeats: int) -> list[tuple[float, ...]]:
    for contender in contenders:
        contender()
    times = [[_milliseconds(contender) / 1e3 for contender in contenders] for _ in range(repeats)]
    return list(zip(*times, strict=True))


def _milliseconds(contender: Callable) -> float:
    began = time.perf_counter()
    contender()
    return (time.perf_counter() - began) * 1e3


def _equal(first, second) -> bool:
    """Whether two results are bitwise the same."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if first is None or isinstance(first, bool):
        return first == second
    return all(_equal(a, b) for a, b in zip(first, second, strict=True))


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
