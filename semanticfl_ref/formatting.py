"""Numbers and messages for readers."""

from collections.abc import Callable

Say = Callable[[str], None]  # takes one line of progress


quiet = False  # whether progress is shown nowhere, as `--quiet` asks


def progress_bar(**options):
    """A bar of tqdm on stderr, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(disable=quiet or None, **options)


def format_bytes(count: float) -> str:
    """A number of bytes: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration: 90 is "90 s", 5400 is "90 min"."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def format_percent(share: float | None) -> str:
    """A share in 0 ... 1 as per cent with one decimal; empty for None."""
    return "" if share is None else f"{share:.1%}"
