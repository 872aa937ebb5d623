"""Start-up and memory as whole processes.  `pytest --benchmark-only bench/bench_start.py -s`

F6: `--help` within 0.5 s. F3: peak memory at 10, 100, 1 000 and 10 000 clients of 20 images each.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUND = """
from pathlib import Path
from bench.contexts import synthetic_context
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.context import new_state
context = synthetic_context(clients={clients}, samples=20, clients_per_round=5)
run_round(new_state(context), context)
# ru_maxrss would count what the parent held when it forked.
print(next(int(line.split()[1]) // 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def test_help(benchmark):
    benchmark.pedantic(
        subprocess.run,
        ([sys.executable, "-m", "semanticfl_ref", "--help"],),
        {"capture_output": True, "check": True},
        rounds=5,
    )


def test_memory_in_the_number_of_clients(benchmark):
    def peak(clients: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", ROUND.format(clients=clients)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        return int(done.stdout)

    peaks = {clients: peak(clients) for clients in (10, 100, 1000, 10_000)}
    benchmark.extra_info["peak MiB"] = peaks
    print(
        "\nF3: peak memory in MiB by clients (20 images each, 5 a round): "
        + ", ".join(f"{k}: {v}" for k, v in peaks.items())
    )
    benchmark.pedantic(peak, (10,), rounds=1)
