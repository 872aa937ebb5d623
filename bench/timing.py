"""Clocks for the benchmarks: contenders take turns, so that whatever else the machine does meets
all of them alike.
"""

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # larger than the level-2 cache of any GPU of today
CUDA_TIMER = "CUDA events around one call, the level-2 cache overwritten (256 MiB zeroed) before each; contenders take turns; median, 20 % and 80 % quantiles"
CPU_TIMER = (
    "time.perf_counter around one call; contenders take turns; median, 20 % and 80 % quantiles"
)


def fastest(*contenders: Callable, repeats: int = 5) -> list[float]:
    """Seconds of each contender: the fastest of interleaved repeats, after one warm-up each."""
    for contender in contenders:
        contender()
    times = [[] for _ in contenders]
    for _ in range(repeats):
        for contender, taken in zip(contenders, times, strict=True):
            taken.append(_on_cpu(contender) / 1e3)
    return [min(taken) for taken in times]


def interleaved(
    contenders: dict[str, Callable],
    device: torch.device,
    *,
    seconds: float = 0.4,
    least: int = 5,
    most: int = 100,
) -> dict[str, dict]:
    """Milliseconds of each contender, launches from Python included.

    Args:
        contenders: name -> a call without arguments, already known to run (compiled, its memory at
            hand).
        device: where the work is done: CUDA events there, the processor's clock elsewhere.
        seconds: of the whole measurement per contender, about.
        least, most: samples of each.

    Returns:
        name -> {"median_ms", "low_ms" (20 %), "high_ms" (80 %), "samples"}.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _on_cpu
    for contender in contenders.values():
        contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began, rounds = time.perf_counter(), 0
    while rounds < least or (
        rounds < most and time.perf_counter() - began < seconds * len(contenders)
    ):
        for name, contender in contenders.items():
            times[name].append(clock(contender))
        rounds += 1
    return {name: summary(taken) for name, taken in times.items()}


def summary(milliseconds: list[float]) -> dict:
    """Median, spread and count of samples."""
    ordered = sorted(milliseconds)

    def quantile(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {
        "median_ms": statistics.median(ordered),
        "low_ms": quantile(0.2),
        "high_ms": quantile(0.8),
        "samples": len(ordered),
    }


def peak_extra_bytes(contender: Callable, device: torch.device) -> int | None:
    """Device memory that one call takes at its peak beyond what was allocated before and beyond its
    result; None off the GPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = contender()
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(
        device
    )  # what is held now is what was, and the result
    del result
    return extra


class _CudaClock:
    """Times one call on the device. The flush also gives Python a head start over the device, as in
    a training loop.
    """

    def __init__(self, device: torch.device):
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.device = device

    def __call__(self, contender: Callable) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        result = contender()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return start.elapsed_time(end)


def _on_cpu(contender: Callable) -> float:
    began = time.perf_counter()
    contender()
    return (time.perf_counter() - began) * 1e3
