"""The processor's cores, and the ranks of torchrun. No torch in here: commands ask before it is
loaded."""

import math
import os


def cores() -> int:
    """Number of cores that this process may use: its share, beside other ranks."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, count // _from_torchrun("LOCAL_WORLD_SIZE", 1))


def memory() -> float:
    """The machine's memory in bytes; infinite where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rank() -> int:
    """This process's number among those that torchrun started; 0 in a process alone."""
    return _from_torchrun("RANK", 0)


def ranks() -> int:
    """Number of processes that torchrun started; 1 in a process alone."""
    return _from_torchrun("WORLD_SIZE", 1)


def _from_torchrun(name: str, default: int) -> int:
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default
