"""For `python -m bench.gpu`: the rates to compare with, the kernels' tests run natively,
compute-sanitizer, the compiler's report, diffusion features.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.measure import Bench, explain
from bench.record import ROOT, Record
from bench.timing import interleaved

CALLS = """
import torch
from bench.gpu_checks import small_calls
small_calls(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
"""


def ceilings_stage(record: Record, bench: Bench) -> None:
    """The rates that the device reaches: a plain copy, and the matrix library on square matrices of
    random numbers. Written as "ceilings".
    """
    found = {}
    entries = (1 << 12) if bench.rehearse else (1 << 30)  # 4 GiB of fp32
    source, target = torch.empty(2, entries, device=bench.device).unbind()
    source.normal_()
    taken = interleaved({"copy": lambda: target.copy_(source)}, bench.device, **bench.sampling)[
        "copy"
    ]
    found["copy"] = taken | {
        "gb_s": 2 * entries * 4 / taken["median_ms"] / 1e6,
        "what": f"{entries * 4} bytes copied on the device, read and written",
    }
    del source, target
    size = 64 if bench.rehearse else 8192
    for name, dtype in (
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("tf32", torch.float32),
        ("fp32", torch.float32),
    ):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        taken = interleaved({name: lambda a=a, b=b: a @ b}, bench.device, **bench.sampling)[name]
        found[name] = taken | {
            "tflop_s": 2 * size**3 / taken["median_ms"] / 1e9,
            "what": f"{size} x {size} x {size} matrix product",
        }
        record.set("ceilings", found)
    torch.set_float32_matmul_precision("highest")


def tests_stage(record: Record, bench: Bench) -> None:
    """The kernels' tests. Written as "tests": the last line of pytest, and every failure by name."""
    # Without the options of setup.cfg, which need pytest-benchmark.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-m",
        "not heavy",
    ]
    command += (
        ["tests/kernels/test_weighted_average.py", "-k", "on_paper"]
        if bench.rehearse
        else ["tests/kernels", "--ignore=tests/kernels/test_compile_report.py"]
    )
    if not bench.rehearse and importlib.util.find_spec(
        "xdist"
    ):  # most of the time goes into compiling, which other cores can do
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    code, output = run(command, bench.seconds)
    lines = output.strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    record.set(
        "tests",
        {
            "command": " ".join(command[1:]),
            "exit": code,
            "last": lines[-1] if lines else "",
            "failures": failures[:50],
        },
    )
    if code != 0:
        raise RuntimeError(f"pytest: {lines[-1] if lines else code}")


def diffusion_stage(record: Record, bench: Bench) -> None:
    """bench/bench_diffusion.py on Stable Diffusion 1.5's architecture. Written as "diffusion": its
    table, or why there is none.
    """
    if importlib.util.find_spec("diffusers") is None:
        record.set("diffusion", {"skipped": "diffusers is not installed here"})
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--benchmark-only",
        "-s",
        "-q",
        "-p",
        "no:cacheprovider",
        "bench/bench_diffusion.py",
        "-k",
        "cache_hit" if bench.rehearse else "step_by_step",
    ]
    code, output = run(command, bench.seconds, SEMANTICFL_BENCH_MODEL="sd15")
    lines = [line for line in output.splitlines() if re.match(r"D\d: |\| ", line)]
    record.set("diffusion", {"command": " ".join(command[1:]), "exit": code, "lines": lines})
    if code != 0 or not lines:
        raise RuntimeError(f"bench_diffusion: {(output.strip().splitlines() or [code])[-1]}")


def sanitizer_stage(record: Record, bench: Bench) -> None:
    """compute-sanitizer over small, ragged calls of every kernel. Written as "sanitizer": its
    summary per tool, or that it is not here.
    """
    tool = shutil.which(
        "compute-sanitizer",
        path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]),
    )
    if tool is None or bench.rehearse:
        code, output = run([sys.executable, "-c", CALLS], bench.seconds)
        record.set(
            "sanitizer",
            {
                "compute-sanitizer": "not found" if tool is None else "not used in a rehearsal",
                "calls without it": summary_of(code, output),
            },
        )
        if code != 0:
            raise RuntimeError(summary_of(code, output))
        return
    found, began = {}, time.monotonic()
    for number, kind in enumerate(("memcheck", "racecheck")):
        left = bench.seconds - (time.monotonic() - began)
        # Without torch's own pool every tensor is an allocation, so a read beyond it is seen. Calls
        # that probe for what a driver has may fail, which is no fault.
        code, output = run(
            [
                tool,
                "--tool",
                kind,
                "--report-api-errors",
                "no",
                "--error-exitcode",
                "86",
                sys.executable,
                "-c",
                CALLS,
            ],
            left / (2 - number),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        found[kind] = {"exit": code, "summary": summary_of(code, output)}
        record.set("sanitizer", found)
    if any(one["exit"] != 0 for one in found.values()):
        raise RuntimeError("; ".join(f"{kind}: {one['summary']}" for kind, one in found.items()))


def compiled_stage(record: Record, bench: Bench) -> None:
    """The compiler's report with this machine's Triton, for the device's own architecture. Written
    as "compiled".
    """
    architecture = (
        90
        if bench.device.type != "cuda"
        else {8: 80, 9: 90, 10: 100}.get(torch.cuda.get_device_capability()[0], 90)
    )
    if bench.rehearse:
        variants = ["--modules", "compiled_examples", "--only", "scale"]
    else:
        variants = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        environment = {
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH")])
            )
        }
        code, output = run(
            [
                sys.executable,
                "-m",
                "bench.compile_report",
                "--arch",
                str(architecture),
                "--json",
                str(path),
                *variants,
            ],
            bench.seconds,
            **environment,
        )
        if path.exists():
            record.set("compiled", json.loads(path.read_text(encoding="utf-8")))
    if code != 0:
        raise RuntimeError(summary_of(code, output))


def small_calls(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> None:
    """Every kernel once or twice on small and ragged shapes, forward and backward; for a tool that
    watches each access, so results are not compared here.
    """
    from semanticfl_ref.kernels.dispatch import interpreted
    from semanticfl_ref.kernels.info_nce import info_nce
    from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average

    impl = "triton" if device.type == "cuda" or interpreted() else "torch"
    source = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=source, device=device).to(dtype)

    for dtype in (torch.bfloat16,) if interpreted() else dtypes:  # the interpreter is slow
        rows_KP, weights_K = (
            draw(3, 1_001, dtype=dtype),
            torch.tensor([1.0, 2.0, 3.0], device=device),
        )
        weighted_average(rows_KP, weights_K, impl=impl)
        weighted_average([params_P.clone() for params_P in rows_KP], weights_K, impl=impl)
        weighted_average(rows_KP, weights_K.repeat(2, 1), impl=impl)
        weighted_average(
            rows_KP, weights_K, reference=rows_KP[0].clone(), diagnostics=True, impl=impl
        )
        streaming = RunningAverage(1_001, device, impl=impl)
        for params_P in rows_KP:
            streaming.add(params_P, 1.0)
        streaming.finish(dtype)
        for clients, queries, keys, width in (
            (2, 37, 11, 70),
            (1, 131, 301, 96),
        ):  # the second does not fit on chip
            queries_GBD = draw(clients, queries, width, dtype=dtype).requires_grad_()
            keys_ND = draw(keys, width, dtype=dtype)
            labels_GB = torch.randint(0, keys, (clients, queries), generator=source, device=device)
            info_nce(queries_GBD, keys_ND, labels_GB, 0.05, impl=impl).sum().backward()
            info_nce(
                queries_GBD,
                keys_ND.requires_grad_(),
                labels_GB,
                torch.tensor(0.05, device=device, requires_grad=True),
                impl=impl,
            ).sum().backward()
        pair_BD = draw(67, 48, dtype=dtype).requires_grad_()
        info_nce(
            pair_BD,
            draw(67, 48, dtype=dtype).requires_grad_(),
            None,
            0.05,
            symmetric=True,
            impl=impl,
        ).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command at the repository's root; 124 if it had to be ended."""
    with (
        tempfile.TemporaryFile() as output
    ):  # a pipe would be held open by what the command started itself, and waited for
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
    lines = output.strip().splitlines()
    return counted[-1] if counted else f"exit {code}" + (f": {lines[-1]}" if lines else "")
