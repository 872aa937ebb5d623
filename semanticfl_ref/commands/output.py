"""Where a command speaks: progress on stderr, its result on stdout."""

import json
import sys
from collections.abc import Callable


def say(text: str) -> None:
    """A line of progress."""
    print(f"semanticfl_ref: {text}", file=sys.stderr, flush=True)


def show(document: dict, as_json: bool, words: Callable[[dict], str]) -> int:
    """Print the result, as one line of JSON or in words; returns exit code 0."""
    print(json.dumps(document, sort_keys=True) if as_json else words(document))
    return 0
