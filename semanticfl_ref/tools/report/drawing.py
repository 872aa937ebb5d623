"""What all figures share: matplotlib only where it is used, colours that the colour-blind can tell
apart, the same bytes every time.
"""

import importlib.util
import io
from pathlib import Path

from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import write_atomic

# Okabe and Ito's palette (2008), darkest last; a tenth line takes the first colour again, dashed.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D1F",
    "#7F7F7F",
    "#000000",
)
SUFFIXES = (".png", ".svg")


def can_draw() -> bool:
    """Whether matplotlib, the extra `plots`, is there."""
    return importlib.util.find_spec("matplotlib") is not None


def need_matplotlib(flag: str, path: Path) -> None:
    """Raise before any work is done where a figure was asked for and cannot be made.

    Raises:
        UserError: matplotlib is missing, or the file's name does not end in .png or .svg.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{flag} {path}: give the figure a name that ends in {' or '.join(SUFFIXES)}"
        )
    if not can_draw():
        raise UserError(
            f"{flag} needs matplotlib: pip install matplotlib, or leave the flag out: the table needs nothing"
        )


def new_figure(rows: int = 1, columns: int = 1, *, width: float, height: float, **options):
    """A matplotlib figure of `width` x `height` inches and its axes, an array [rows, columns];
    outside pyplot, so that nothing global is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, *paths: Path) -> None:
    """Write a figure as PNG or SVG, by the path's ending, whole or not at all; equal figures give
    equal files.

    Raises:
        DataError: a file cannot be written.
    """
    for path in paths:
        write_atomic(
            path, encoded(figure, path.suffix[1:].lower()), "choose another place for the figure"
        )


def encoded(figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or an "svg" file."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "semanticfl_ref", "svg.fonttype": "none"}):
        figure.savefig(
            buffer,
            format=kind,
            dpi=150,
            metadata={"Software": None} if kind == "png" else {"Date": None, "Creator": None},
        )
    return buffer.getvalue()
