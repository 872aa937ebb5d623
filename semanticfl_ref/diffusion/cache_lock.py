"""Locks of processes that share a feature cache. They end with their process, however it ends."""

from pathlib import Path
from typing import IO

from semanticfl_ref.storage import LOCK_EX, LOCK_NB, LOCK_SH, flock

LOCK = ".lock"  # shared by those who build or read a cache; alone: who exchanges its files


def lock(path: Path, *, shared: bool = False, wait: bool = True) -> IO | None:
    """Lock a file until it is closed; None if another process holds it and `wait` is off.

    Args:
        path: the file, made if it is not there, unless `shared`.
        shared: with others who share it.
        wait: until it is free.

    Raises:
        OSError: it cannot be opened.
    """
    file = open(path, "r" if shared else "a")  # noqa: SIM115 (returned)
    kind = LOCK_SH if shared else LOCK_EX
    try:
        flock(file, kind if wait else kind | LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
