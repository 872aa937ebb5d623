"""The other stages of `bench/gpu.sh`.

The copy rate to compare with, the kernels' tests, compute-sanitizer, and diffusion features.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

import torch

from bench.harness import Bench, explain, interleaved
from bench.record import ROOT, Record
from semanticfl_ref.kernels.dispatch import interpreted
from semanticfl_ref.kernels.group_norm_silu import group_norm_silu
from semanticfl_ref.kernels.info_nce import info_nce
from semanticfl_ref.kernels.weighted_average import weighted_average

SMALL_CALLS = """
import torch
from bench.gpu.checks import small_calls
small_calls(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
"""
ERROR_FOUND = "86"  # exit status of compute-sanitizer


def copy_stage(record: Record, bench: Bench) -> None:
    """Record as "copy" the rate at which the device copies 4 GiB."""
    entries = 1 << (12 if bench.rehearse else 30)
    source, target = torch.empty(2, entries, device=bench.device).unbind()
    source.normal_()
    times = interleaved({"copy": lambda: target.copy_(source)}, bench.device, **bench.sampling)
    taken = times["copy"]
    gb_s = 2 * source.nbytes / taken["median_ms"] / 1e6  # read and written
    record.set("copy", {"bytes": source.nbytes, "gb_s": gb_s, **taken})


def tests_stage(record: Record, bench: Bench) -> None:
    """Run the tests of the kernels and of replicas; record as "tests" the last line of pytest, and
    failures by name."""
    # Without the options in setup.cfg, which need pytest-benchmark.
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-m", "not heavy"]
    if bench.rehearse:
        command += ["tests/kernels/test_weighted_average.py", "-k", "on_paper"]
    else:
        replicas = "test_the_number_of_replicas_does_not_matter"
        command += ["tests/kernels", f"tests/federated/test_replicas.py::{replicas}"]
    environment = {} if bench.rehearse else {"SEMANTICFL_TESTS": "cuda"}
    # Most of the time is spent compiling, which other cores can do.
    if not bench.rehearse and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    code, output = run(command, bench.seconds, **environment)
    lines = output.strip().splitlines()
    found = {
        "exit": code,
        "last": lines[-1] if lines else "",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50],
    }
    record.set("tests", found)
    if code != 0:
        raise RuntimeError(f"pytest: {found['last'] or code}")


def diffusion_stage(record: Record, bench: Bench) -> None:
    """Run bench_diffusion.py, by default on Stable Diffusion 1.5's architecture; record its tables
    as "diffusion"."""
    if importlib.util.find_spec("diffusers") is None:
        record.set("diffusion", {"skipped": "diffusers is not installed"})
        return
    chosen = ["the_vae_encoder", "features_step_by_step"]
    if bench.rehearse:
        chosen = ["a_cache_hit_against_the_extraction"]
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "-s", "-q"]
    command += ["-p", "no:cacheprovider"]
    command += [f"bench/bench_diffusion.py::test_{name}" for name in chosen]
    model = os.environ.get("SEMANTICFL_BENCH_MODEL", "sd15")
    code, output = run(command, bench.seconds, SEMANTICFL_BENCH_MODEL=model)
    lines = [line for line in output.splitlines() if re.match(r"[DN]\d: |\| ", line)]
    record.set("diffusion", {"exit": code, "lines": lines})
    if code != 0 or not lines:
        raise RuntimeError(f"bench_diffusion: {summary_of(code, output)}")


def sanitizer_stage(record: Record, bench: Bench) -> None:
    """Run compute-sanitizer over small, ragged calls of every kernel; record its summaries as
    "sanitizer"."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    tool, calls = (
        shutil.which("compute-sanitizer", path=places),
        [sys.executable, "-c", SMALL_CALLS],
    )
    if tool is None or bench.rehearse:
        code, output = run(calls, bench.seconds)
        why = "not found" if tool is None else "not used in a rehearsal"
        summary = summary_of(code, output)
        record.set("sanitizer", {"compute-sanitizer": why, "calls without it": summary})
        if code != 0:
            raise RuntimeError(summary)
        return
    found, began = {}, time.monotonic()
    for number, kind in enumerate(("memcheck", "racecheck")):
        left = bench.seconds - (time.monotonic() - began)
        # Calls that probe what a driver supports may fail, which is no error.
        command = [tool, "--tool", kind, "--report-api-errors", "no"]
        command += ["--error-exitcode", ERROR_FOUND, *calls]
        # Without torch's caching allocator, a read beyond any tensor is seen.
        code, output = run(command, left / (2 - number), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[kind] = {"exit": code, "summary": summary_of(code, output)}
        record.set("sanitizer", found)
    if any(one["exit"] != 0 for one in found.values()):
        raise RuntimeError("; ".join(f"{kind}: {one['summary']}" for kind, one in found.items()))


def small_calls(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> None:
    """Every kernel on small and ragged shapes, forward and backward.

    For a tool that watches each access: results are not compared.
    """
    impl = "triton" if device.type == "cuda" or interpreted() else "torch"
    source = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=source, device=device).to(dtype)

    for dtype in (torch.bfloat16,) if interpreted() else dtypes:  # the interpreter is slow
        params_SP = normal(3, 1_001, dtype=dtype)
        weights_S = torch.tensor([1.0, 2.0, 3.0], device=device)
        start_P = params_SP[0].clone()
        part = weighted_average(params_SP, weights_S, start_P, final=False, impl=impl)
        weighted_average(params_SP, weights_S, start_P, part, impl=impl)
        weighted_average(params_SP, weights_S, impl=impl)
        for side, channels, groups in ((5, 66, 11), (19, 24, 4)):
            maps = normal(2, side, side, channels, dtype=dtype).movedim(-1, 1)
            shift_C = normal(channels, dtype=dtype)
            group_norm_silu(maps, groups, shift_C, shift_C, shift_C=shift_C, impl=impl)
        for clients, queries, keys, width in ((2, 37, 11, 70), (1, 131, 301, 96)):
            queries_GBD = normal(clients, queries, width, dtype=dtype).requires_grad_()
            labels_GB = torch.randint(0, keys, (clients, queries), generator=source, device=device)
            keys_ND = normal(keys, width, dtype=dtype)
            info_nce(queries_GBD, keys_ND, labels_GB, 0.05, impl=impl).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command at the repository's root; 124 if it ran out of time."""
    # A file: a pipe would be held open by the processes that the command starts, and waited for.
    with tempfile.TemporaryFile() as output:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        except OSError as error:
            return 127, explain(error)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def summary_of(code: int, output: str) -> str:
    """The line of compute-sanitizer that counts errors, else the last line."""
    counted = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    if counted:
        return counted[-1]
    last_line = output.strip().splitlines()[-1:]
    return ": ".join([f"exit {code}", *last_line])
