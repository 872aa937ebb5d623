"""Flower's processes on loopback, for tests that need them; all end with the test."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
APP = ROOT / "flower"


def flower_environment(home: Path) -> dict[str, str]:
    """Neither telemetry nor a look for updates; settings and apps of the test's own."""
    bin_folder = Path(sys.executable).parent
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def started(home: Path, *command: str) -> Iterator[subprocess.Popen]:
    """A process and its children, for as long as the context lasts; its output is a file."""
    with open(home / f"{command[0]}-{time.monotonic_ns()}.log", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=flower_environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def superlink(home: Path, *flags: str) -> Iterator[str]:
    """A SuperLink on a free port, which `flwr run` finds as "here"; its address."""
    address = f"127.0.0.1:{free_port()}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n'
        f"insecure = true\n"
    )
    port = address.partition(":")[2]
    offline = "--disable-runtime-dependency-installation"
    with started(home, "flower-superlink", "--insecure", offline, "--port", port, *flags) as link:
        wait_for(f"http://{address}/health", link)
        yield address


def flwr_run(home: Path, flags: list[str], out: Path, *options: str, timeout: int = 60) -> str:
    """Run the app to its end; returns what it logs."""
    settings = f'flags="{" ".join(flags)}" out="{out}" timeout={timeout}'
    done = subprocess.run(
        ["flwr", "run", str(APP), "--stream", "--run-config", settings, *options],
        cwd=home,
        env=flower_environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the SuperLink ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url}")
