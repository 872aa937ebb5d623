"""Locks on files and folders, where the platform has them: Linux and macOS.

On Windows nothing is locked: there, one process at a time may write into a run folder or a cache.
"""

try:
    from fcntl import LOCK_EX, LOCK_NB, flock

    LOCKS = True
except ImportError:
    LOCK_EX = LOCK_NB = 0
    LOCKS = False

    def flock(file, kind: int) -> None:
        """Lock nothing."""
