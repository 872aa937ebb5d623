"""Output of the commands: progress on stderr, the result on stdout."""

import json
import sys
from collections.abc import Callable


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"semanticfl_ref: {text}", file=sys.stderr, flush=True)


def show(document: dict, as_json: bool, to_text: Callable[[dict], str]) -> int:
    """Print the result as one line of JSON or as text; returns exit code 0."""
    print(json.dumps(document, sort_keys=True) if as_json else to_text(document))
    return 0
