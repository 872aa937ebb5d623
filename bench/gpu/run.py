"""Everything that needs a GPU, in one call of under nine minutes.

    bench/gpu.sh, or python -m bench.gpu.run

Each stage is a process of its own, so that one that fails, hangs or loses the device costs the
others nothing. Each result is written at once, to bench/results/<device>.json. The exit status is 1
if a stage failed or a kernel of ours gave a wrong result. `--rehearse` runs the same code on a CPU
with tiny shapes; its numbers mean nothing, and its file says so.
"""

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from bench.harness import CPU_TIMER, CUDA_TIMER, OURS, Bench, explain
from bench.record import RESULTS, ROOT, Record, versions

# Name -> the function, and the seconds that it may take.
STAGES = {
    "copy": ("bench.gpu.checks:copy_stage", 30),
    "loop": ("bench.gpu.loop:stage", 180),
    "info_nce": ("bench.gpu.info_nce:stage", 150),
    "weighted_average": ("bench.gpu.average:stage", 100),
    "group_norm_silu": ("bench.gpu.norm:stage", 60),
    "tests": ("bench.gpu.checks:tests_stage", 150),
    "sanitizer": ("bench.gpu.checks:sanitizer_stage", 90),
    "diffusion": ("bench.gpu.checks:diffusion_stage", 200),
}
LEAST_SECONDS = 15  # with less left, a stage is not started
START_SECONDS = 8  # of a stage's time, to start Python and torch and to write the last results
OUT_OF_TIME = 124
ENDED = "out of time; what it had measured is kept"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="file for the results (default: bench/results/<device>.json)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        metavar="STAGE",
        help=f"stages to run: {', '.join(STAGES)} (default: all)",
    )
    parser.add_argument(
        "--seconds", type=float, default=520, help="time for all stages (default: 520)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument(
        "--together",
        action="store_true",
        help="all stages in this process: starts faster, but a crash ends all",
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse and not options.out:
        parser.error("--rehearse without --out: its numbers are no results; add --out FILE")
    if options.only != list(STAGES) and not options.out:
        parser.error("--only without --out: bench/results/ is for complete runs; add --out FILE")
    if options.stage:
        run_stage(options.stage, options.out, options.seconds, options.rehearse)
    else:
        run_stages(options)


def run_stages(options: argparse.Namespace) -> None:
    """Run the stages one after another, and report how each went."""
    deadline = time.monotonic() + options.seconds
    described = describe(options.rehearse)
    path = options.out or RESULTS / f"{slug(described['device'])}.json"
    path.unlink(missing_ok=True)
    record = Record(path)
    record.content |= described
    record.set("stages", {})
    run = in_this_process if options.together else in_its_own_process
    for name in options.only:
        _, limit = STAGES[name]
        seconds = min(limit, deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            Record(path).stage(name, status="not started", why="no time left")
            continue
        print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
        began = time.monotonic()
        code = run(name, path, seconds, options.rehearse)
        record_status(Record(path), name, code, time.monotonic() - began)
    finish(Record(path))


def record_status(record: Record, name: str, code: int, seconds: float) -> None:
    """Record how a stage went, by its exit status."""
    seconds = round(seconds, 1)
    failed = record.content["stages"].get(name, {}).get("status") == "failed"
    if code == 0:
        record.stage(name, status="done", seconds=seconds)
    elif code == OUT_OF_TIME:
        record.stage(name, status="ended", seconds=seconds, why=ENDED)
    elif not failed:  # a crash leaves no word of its own
        record.stage(name, status="failed", seconds=seconds, why=f"exit status {code}")


def finish(record: Record) -> None:
    """Print how each stage went and what is wrong with our kernels, and exit."""
    content = record.content
    stages, failures = content["stages"], content.get("failures", [])
    wrong = [row for row in content.get("rows", []) if is_wrong(row)]
    print()
    for name, status in stages.items():
        seconds, why = status.get("seconds", 0), status.get("why", "")
        print(f"{name}: {status['status']}, {seconds} s {why}".rstrip())
    for failure in failures:
        print(f"{failure['what']}: {failure['why']}")
    for row in wrong:
        place = ", ".join(row[key] for key in ("kernel", "case", "dtype", "direction", "contender"))
        print(f"{place}: {what_is_wrong(row)}")
    print(f"results: {record.path}")
    unfinished = any(status["status"] != "done" for status in stages.values())
    sys.exit(bool(wrong or failures or unfinished))


def is_wrong(row: dict) -> bool:
    """Whether a row of ours failed, is incorrect, or differs when repeated; a peer's failure is a
    finding."""
    is_ours = row["contender"].startswith(OURS)
    return is_ours and not (row.get("correct") and row.get("repeatable", True))


def what_is_wrong(row: dict) -> str:
    if "failed" in row:
        return row["failed"]
    return "not the same twice" if row["correct"] else f"wrong, {row['errors']}"


def run_stage(name: str, path: Path, seconds: float, rehearse: bool) -> None:
    """Run a stage in this process; an error is recorded before it is raised."""
    module, function = STAGES[name][0].split(":")
    record = Record(path)
    began = time.monotonic()
    try:
        bench = Bench(torch.device("cpu" if rehearse else "cuda"), rehearse, seconds)
        getattr(importlib.import_module(module), function)(record, bench)
    except Exception as error:
        took = round(time.monotonic() - began, 1)
        record.stage(name, status="failed", seconds=took, why=explain(error))
        raise


def in_this_process(name: str, path: Path, seconds: float, rehearse: bool) -> int:
    """As `in_its_own_process`, but nothing ends a stage that takes too long."""
    try:
        run_stage(name, path, seconds, rehearse)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def in_its_own_process(name: str, path: Path, seconds: float, rehearse: bool) -> int:
    """The exit status of a stage.

    124 if it ran out of time: then it is ended, with every process that it started.
    """
    command = [sys.executable, "-m", "bench.gpu.run", "--stage", name]
    command += ["--out", str(path.resolve()), "--seconds", f"{seconds - START_SECONDS:.0f}"]
    if rehearse:
        command.append("--rehearse")
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def describe(rehearse: bool) -> dict:
    """What the results are made with."""
    if rehearse:
        return {
            "kind": "rehearsal",
            "device": "CPU, rehearsal: the numbers mean nothing",
            "command": "bench/gpu.sh --rehearse",
            "timer": CPU_TIMER,
            **versions(),
        }
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; run the same code on a CPU with: --rehearse --out FILE")
    return {
        "kind": "gpu",
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "command": "bench/gpu.sh",
        "timer": CUDA_TIMER,
        **versions(),
    }


def driver() -> str:
    """The driver's version, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def slug(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")


if __name__ == "__main__":
    main()
