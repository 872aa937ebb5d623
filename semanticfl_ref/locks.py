"""Locks on files and folders, where the platform has them: Linux and macOS.

On Windows nothing is locked: there, one process at a time may write into a run folder or a cache.
"""

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock

    LOCKS = True
except ImportError:
    LOCK_EX = LOCK_NB = LOCK_SH = 0
    LOCKS = False

    def flock(file, kind: int) -> None:
        """Lock nothing."""
