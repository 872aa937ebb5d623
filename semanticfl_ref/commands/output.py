"""Output of the commands: progress on stderr, the result on stdout."""

import json
import os
import sys
from collections.abc import Callable

from semanticfl_ref import formatting


class Stream:
    """A text stream that is given up quietly when it fails: telling may fail, training may not.

    What is written after a failure (the reader is gone, the disk is full, it was closed) is lost.
    """

    def __init__(self, descriptor: int):
        how = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
        self._file = open(descriptor, "w", **how)  # noqa: SIM115 (for the life of the process)

    def write(self, text: str) -> int:
        """Write and flush."""
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def replace_streams() -> None:
    """Make stdout and stderr streams that are given up quietly."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take its place
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = Stream(1), Stream(2)


def say(text: str, always: bool = False) -> None:
    """Print a line of progress, or with --quiet only what is `always` printed."""
    if formatting.quiet and not always:
        return
    print(f"semanticfl_ref: {text}", file=sys.stderr, flush=True)


def show(document: dict, as_json: bool, to_text: Callable[[dict], str]) -> int:
    """Print the result as one line of JSON or as text; returns exit code 0."""
    print(json.dumps(document, sort_keys=True) if as_json else to_text(document))
    return 0
