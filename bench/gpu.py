"""Everything that needs a GPU, in one call of under nine minutes.  `bench/gpu.sh`, or `python -m
bench.gpu`

Stages, each in a process of its own, so that one that fails, hangs or loses the device costs the
others nothing: the device's copy and matrix rates; the average; InfoNCE at the training shape and
at 64k x 64k; the kernels' tests; compute-sanitizer; the compiler's report; diffusion features. Each
result is on the disk as soon as it is
there: bench/results/<device>.json. Ends with 1 if a stage failed or a kernel of ours gave a wrong
    result.
`--rehearse` goes the same ways on a CPU with tiny shapes. Its numbers mean nothing, and its file
says so."""

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

from bench.record import RESULTS, ROOT, Record, versions

STAGES = {  # name: the function, and the seconds that it may take
    "ceilings": ("bench.gpu_checks:ceilings_stage", 45),
    "info_nce, training shape": ("bench.gpu_info_nce:training_stage", 110),
    "weighted_average": ("bench.gpu_average:stage", 100),
    "info_nce, large": ("bench.gpu_info_nce:large_stage", 150),
    "tests": ("bench.gpu_checks:tests_stage", 150),
    "sanitizer": ("bench.gpu_checks:sanitizer_stage", 90),
    "compiled": ("bench.gpu_checks:compiled_stage", 120),
    "diffusion": ("bench.gpu_checks:diffusion_stage", 150),
}
LEAST_SECONDS = 15  # with less left, a stage is not begun
START_SECONDS = (
    8  # of a stage's time, for Python and torch to start and for the last results to be written
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="the results' file (default: bench/results/<device>.json)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        metavar="STAGE",
        help=f"of {', '.join(STAGES)}",
    )
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes, on a CPU; needs --out"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="all stages in this process: quicker to start, and one that crashes ends all",
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse and not options.out:
        parser.error("--rehearse needs --out: its numbers are not results")
    if options.only != list(STAGES) and not options.out:
        parser.error("--only needs --out: what is in bench/results/ is of a whole run")
    if options.stage:
        one_stage(options.stage, options.out, options.seconds, options.rehearse)
    else:
        all_stages(options)


def all_stages(options: argparse.Namespace) -> None:
    """Run the stages one after another and say how each went."""
    deadline = time.monotonic() + options.seconds
    described = describe(options.rehearse)
    path = options.out or RESULTS / f"{slug(described['device'])}.json"
    if path.exists():
        path.unlink()
    record = Record(path)
    record.content |= described
    record.set("stages", {})
    for name in options.only:
        _, limit = STAGES[name]
        seconds = min(limit, deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            Record(path).stage(name, status="not begun", why="no time left")
            continue
        print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
        began = time.monotonic()
        code = (in_this_process if options.together else in_its_own_process)(
            name, path, seconds, options.rehearse
        )
        record, took = Record(path), round(time.monotonic() - began, 1)
        if code == 0:
            record.stage(name, status="done", seconds=took)
        elif code == 124:
            record.stage(
                name,
                status="ended",
                seconds=took,
                why=f"it took more than {seconds:.0f} s; what it had measured is kept",
            )
        elif (
            record.content["stages"].get(name, {}).get("status") != "failed"
        ):  # a crash leaves no word of its own
            record.stage(name, status="failed", seconds=took, why=f"the process ended with {code}")
    finish(Record(path))


def finish(record: Record) -> None:
    """The last lines: how each stage went, and what of ours is wrong."""
    stages = record.content["stages"]
    ours = [
        row
        for row in record.content.get("rows", [])
        if row["contender"].startswith("ours") and "skipped" not in row
    ]
    wrong = [row for row in ours if not (row.get("correct") and row.get("repeatable", True))]
    print(
        "\n"
        + "\n".join(
            f"{name}: {how['status']}, {how.get('seconds', 0)} s {how.get('why', '')}".rstrip()
            for name, how in stages.items()
        )
    )
    for failure in record.content.get("failures", []):
        print(f"{failure['what']}: {failure['why']}")
    for row in wrong:
        said = row.get("failed") or (
            f"wrong, {row['errors']}" if not row["correct"] else "not the same twice"
        )
        print(
            f"{row['kernel']}, {row['case']}, {row['dtype']}, {row['direction']}, {row['contender']}: {said}"
        )
    print(f"results: {record.path}")
    sys.exit(
        bool(wrong or record.content.get("failures"))
        or any(how["status"] != "done" for how in stages.values())
    )


def one_stage(name: str, path: Path, seconds: float, rehearse: bool) -> None:
    """One stage in this process; an error is written down before it is raised."""
    import torch

    from bench.measure import Bench, explain

    module, function = STAGES[name][0].split(":")
    record = Record(path)
    began = time.monotonic()
    try:
        bench = Bench(torch.device("cpu" if rehearse else "cuda"), rehearse, seconds)
        getattr(importlib.import_module(module), function)(record, bench)
    except Exception as error:
        record.stage(
            name, status="failed", seconds=round(time.monotonic() - began, 1), why=explain(error)
        )
        raise


def in_this_process(name: str, path: Path, seconds: float, rehearse: bool) -> int:
    """As `in_its_own_process`, with nothing that ends a stage which takes too long."""
    try:
        one_stage(name, path, seconds, rehearse)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def in_its_own_process(name: str, path: Path, seconds: float, rehearse: bool) -> int:
    """The exit status of a stage; 124 if it was ended for its time, together with everything that
    it had started.
    """
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--stage",
        name,
        "--out",
        str(path.resolve()),
        "--seconds",
        f"{seconds - START_SECONDS:.0f}",
    ]
    command += ["--rehearse"] if rehearse else []
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def describe(rehearse: bool) -> dict:
    """What the results were made with."""
    import torch

    from bench.timing import CPU_TIMER, CUDA_TIMER

    command = "python -m bench.gpu" + (" --rehearse" if rehearse else "")
    if rehearse:
        return {
            "kind": "rehearsal",
            "device": "CPU, rehearsal: the numbers mean nothing",
            "command": command,
            "timer": CPU_TIMER,
        } | versions()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; `--rehearse --out FILE` goes through the same code on a CPU")
    of = torch.cuda.get_device_properties(0)
    return {
        "kind": "gpu",
        "device": of.name,
        "capability": f"{of.major}.{of.minor}",
        "multiprocessors": of.multi_processor_count,
        "memory_gib": round(of.total_memory / 2**30),
        "driver": driver(),
        "command": command,
        "timer": CUDA_TIMER,
    } | versions()


def driver() -> str:
    """The driver's version as nvidia-smi tells it."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        return asked.stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def slug(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")


if __name__ == "__main__":
    main()
