"""Start-up and memory of whole processes.

    pytest --benchmark-only bench/bench_start.py -s

F6: `--help` takes at most 0.5 s; beside it, an empty Python process.
F3: memory is flat in the number of clients: 10, 100, 1 000 and 10 000 clients of 20 images each.
"""

import subprocess
import sys

from bench.harness import fastest
from bench.record import ROOT

ROUND = """
from pathlib import Path
from bench.contexts import synthetic_context
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state

context = synthetic_context(clients={clients}, samples=20, clients_per_round=5)
state, line = run_round(initial_state(context), context)
assert state.round == 1 and len(line["clients"]) == 5
# ru_maxrss would count what the parent held when it forked.
for entry in Path("/proc/self/status").read_text().splitlines():
    if entry.startswith("VmHWM"):
        print(int(entry.split()[1]) // 1024)
"""


def python(*arguments: str) -> str:
    """What a Python process prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_help(benchmark):
    assert "train" in python("-m", "semanticfl_ref", "--help")
    ours, empty = fastest(
        lambda: python("-m", "semanticfl_ref", "--help"), lambda: python("-c", "")
    )
    benchmark.extra_info["F6 --help, s"] = round(ours, 2)
    print(
        f"\nF6: --help takes {ours:.2f} s (target 0.5), {ours / empty:.1f}x an empty Python process"
    )
    benchmark.pedantic(python, ("-m", "semanticfl_ref", "--help"), rounds=1)


def test_memory_in_the_number_of_clients(benchmark):
    def peak(clients: int) -> int:
        return int(python("-c", ROUND.format(clients=clients)))

    peaks = {clients: peak(clients) for clients in (10, 100, 1000, 10_000)}
    benchmark.extra_info["F3 peak MiB"] = peaks
    listed = ", ".join(f"{clients}: {mib}" for clients, mib in peaks.items())
    print(
        f"\nF3: peak memory in MiB by clients (20 images each, 5 a round): {listed}; "
        f"{peaks[10_000] / peaks[10]:.2f}x from 10 to 10 000 (target: flat but for the images, "
        f"which take 586 MiB)"
    )
    benchmark.pedantic(peak, (10,), rounds=1)
