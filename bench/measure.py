"""One case of a GPU benchmark: every contender is checked against fp64, its peak memory is read,
and then they are timed taking turns.
"""

import collections
import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from bench.record import Record
from bench.timing import interleaved, peak_extra_bytes

OURS = "ours"


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs, and whether it only rehearses: tiny shapes, a handful of samples, on
    any machine.
    """

    device: torch.device
    rehearse: bool
    seconds: float  # that the stage may take

    @property
    def impl(self) -> str:
        """Triton on a GPU; a rehearsal takes it through its interpreter if that is on, else the
        torch implementation.
        """
        from semanticfl_ref.kernels.dispatch import interpreted

        return "triton" if not self.rehearse or interpreted() else "torch"

    @property
    def sampling(self) -> dict:
        """Arguments of `interleaved`."""
        return {"seconds": 0.0, "least": 2} if self.rehearse else {}


@dataclass(frozen=True)
class Contender:
    """A call to be timed, with the bytes that it must move and the floating-point operations that
    it must do, where they are not the case's.
    """

    run: Callable
    bytes: int | None = None
    flop: int | None = None
    notes: dict = field(default_factory=dict)


def measure(
    record: Record, bench: Bench, case: dict, contenders: dict[str, Contender], check: Callable
) -> None:
    """Measure the contenders of a case and write one row for each, at once; what fails is a row
    that says why.

    Args:
        case: what all rows say: kernel, case, dtype, direction, shape, ceiling (a rate of the
            ceilings stage), bytes, flop.
        check: (a contender's name, the result of its call) -> {"errors": {...}, "correct": bool}.
    """
    ready = {}
    for name, contender in contenders.items():
        row = case | contender.notes | {"contender": name}
        row |= {
            key: value
            for key, value in (("bytes", contender.bytes), ("flop", contender.flop))
            if value is not None
        }
        try:
            row |= check(name, contender.run())
            row["peak_bytes"] = peak_extra_bytes(contender.run, bench.device)
            if name == OURS:
                row["repeatable"] = _same(contender.run(), contender.run())
            ready[name] = contender, row
        except Exception as error:
            record.add("rows", row | {"failed": explain(error)})
        _give_memory_back(bench.device)
    try:
        times = (
            interleaved(
                {name: contender.run for name, (contender, _) in ready.items()},
                bench.device,
                **bench.sampling,
            )
            if ready
            else {}
        )
    except Exception as error:
        for _, row in ready.values():
            record.add("rows", row | {"failed": f"while taking turns: {explain(error)}"})
        return
    for name, (_, row) in ready.items():
        record.add("rows", row | times[name])
        _say(record.content["rows"][-1])


@contextlib.contextmanager
def guarded(record: Record, what: str) -> Iterator[None]:
    """What fails inside is written to the record's "failures", and the run goes on."""
    try:
        yield
    except Exception as error:
        record.add("failures", {"what": what, "why": explain(error)})
        traceback.print_exc()


def captured(run: Callable, device: torch.device) -> Callable:
    """The call as a CUDA graph: what replays it costs no launch from Python. Raises RuntimeError
    off the GPU, and where the call cannot be captured.
    """
    if device.type != "cuda":
        raise RuntimeError("needs a CUDA device")
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
    """The kernels that one call starts on the device, by name, as the profiler sees them; None off
    the GPU or where it sees nothing.
    """
    if device.type != "cuda":
        return None
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return (
        dict(
            collections.Counter(
                name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1]
                for name in names
            )
        )
        or None
    )


def explain(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def _same(first, second) -> bool:
    """Whether two results are the same bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return all(_same(a, b) for a, b in zip(first, second, strict=True))


def _give_memory_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _say(row: dict) -> None:
    """One line for whoever watches."""
    rates = [f"{row['bytes'] / row['median_ms'] / 1e6:.0f} GB/s"] if row.get("bytes") else []
    rates += [f"{row['flop'] / row['median_ms'] / 1e9:.1f} TFLOP/s"] if row.get("flop") else []
    wrong = "" if row["correct"] else f"  WRONG: {row['errors']}"
    print(
        f"{row['kernel']}, {row['case']}, {row['dtype']}, {row['direction']}: {row['contender']} {row['median_ms']:.4f} ms  {', '.join(rates)}{wrong}",
        flush=True,
    )
