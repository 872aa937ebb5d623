"""Where and when a run runs: versions, machine, command, commit.

torch is imported only where its version is asked, since `compare` writes commands without it.
"""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from semanticfl_ref import __version__
from semanticfl_ref.cores import ranks

if TYPE_CHECKING:
    from semanticfl_ref.config.settings import Config
    from semanticfl_ref.federated.context import RunContext

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "safetensors", "triton")
# What a resumed run's last bits may depend on.
NUMERIC = ("semanticfl_ref", "versions", "threads", "device", "precision", "platform", "processor")


def environment_of(context: "RunContext") -> dict:
    """Versions and machine of a run; JSON values."""
    return environment_here(context.config)


def environment_here(config: "Config") -> dict:
    """Versions and machine, as a run of this configuration has them here; JSON values."""
    import torch

    from semanticfl_ref.device import resolve_device, resolve_precision

    device = resolve_device(config.run.device)
    on_cuda = device.type == "cuda"
    return {
        "semanticfl_ref": __version__,
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "versions": {name: _version(name) for name in PACKAGES},
        "threads": config.run.threads or torch.get_num_threads(),
        "ranks": ranks(),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "precision": resolve_precision(config.run.precision, device),
    }


def changes(before: dict, now: dict) -> list[str]:
    """The entries that differ and that results may depend on in their last bits."""
    return [key for key in NUMERIC if before.get(key) != now.get(key)]


def command_line() -> str:
    """The command that started this process, as it can be typed again."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout that runs, with "+changes" if files differ; None if installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    # With every tag excluded, the whole hash names the commit.
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
