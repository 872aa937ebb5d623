"""What all figures share: matplotlib imported only where it is used, the same bytes every time, and
SVG in the colours of the page around it.
"""

import functools
import importlib.util
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import write_atomic

# The palette of Okabe and Ito (2008), which the colour-blind can tell apart; darkest last.
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
LONGEST = 28  # letters of a name beside a figure
# Fonts with Chinese, Japanese, Korean and other letters, as systems have them.
OTHER_SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Source Han Sans SC", "Droid Sans Fallback"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo"),
    *("Malgun Gothic", "Yu Gothic", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Arial Unicode MS", "Unifont"),
)
STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))  # of lines
# matplotlib's colour -> the page's, which is light or dark.
PAGE_COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--ground)",
    "#b0b0b0": "var(--line)",
    **{colour.lower(): f"var(--line-{n})" for n, colour in enumerate(COLOURS[:-1])},
}
# Of matplotlib's SVG, what a page has itself or must not contain.
UNWANTED = (
    r"<metadata>.*?</metadata>",
    r"<style.*?</style>",
    r' xmlns(:\w+)?="[^"]*"',
    r'(?<=<g) id="[^"]*"',
    r' (width|height)="[\d.]+pt"',
)


def can_draw() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def need_matplotlib(path: Path) -> None:
    """Check before any work is done that --figure can be made.

    Raises:
        UserError: matplotlib is missing, or the file's name does not end in .png or .svg.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(
            f"--figure {path}: unknown kind of figure; give it a name that ends in .png or .svg"
        )
    if not can_draw():
        raise UserError(
            f"--figure {path}: matplotlib is not installed; pip install matplotlib, or leave "
            f"--figure out (the table does not need it)"
        )


def method_colour(entry: str) -> str:
    """The colour of a method in every figure: the palette's, in the order of registration, over and
    over.

    Args:
        entry: a method's name, with or without settings in brackets, and a name before "=".
    """
    name = entry.partition("[")[0].rpartition("=")[2]
    order = list(dict.fromkeys((*METHODS, name)))
    return COLOURS[order.index(name) % len(COLOURS)]


def new_figure(panels: int = 1, *, width: float, height: float, **options):
    """A matplotlib figure of `width` x `height` inches and the axes of its panels, side by side.

    It is made outside of pyplot, so that nothing global changes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **options)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=COLOURS)
    return figure, axes


def save_figure(figure, *paths: Path) -> None:
    """Write a figure as PNG or SVG, by the path's ending; equal figures give equal files.

    Raises:
        DataError: a file cannot be written; the old one stays.
    """
    for path in paths:
        content = encoded(figure, path.suffix[1:].lower())
        write_atomic(path, content, "choose another place for the figure")


def encoded(figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "svg" file."""
    import matplotlib

    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    for text in figure.findobj(_is_text):
        text.set_fontfamily(font_families())
    buffer = io.BytesIO()
    settings = {"svg.hashsalt": "semanticfl_ref", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def plain(name: str) -> str:
    """A name that fits beside a figure, and that matplotlib does not read as a formula."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    return short.replace("$", r"\$")


def readable_names(names: Sequence[str], numbered: bool = False) -> list[str]:
    """Names that fit beside a figure; all are numbered where two would look the same, or a font
    lacks a letter, or if asked for.
    """
    short = [plain(name) for name in names]
    unique = len(set(short)) == len(short)
    if unique and not numbered and letters().issuperset(map(ord, "".join(short))):
        return short
    return [f"{number} {name}" for number, name in enumerate(short)]


@functools.cache
def font_families() -> list[str]:
    """matplotlib's own font, and those of this machine that have other scripts."""
    from matplotlib.font_manager import get_font_names

    known = set(get_font_names())
    return ["DejaVu Sans", *(family for family in OTHER_SCRIPTS if family in known)]


@functools.cache
def letters() -> set[int]:
    """Code points that the fonts have."""
    from matplotlib.font_manager import findfont, get_font

    fonts = (get_font(findfont(family)) for family in font_families())
    return {*map(ord, " …"), *(code for font in fonts for code in font.get_charmap())}


def _is_text(artist) -> bool:
    return hasattr(artist, "set_fontfamily")


def inline_svg(svg: bytes) -> str:
    """matplotlib's SVG as an element of a page, in the page's colours."""
    text = svg.decode()
    text = re.sub("|".join(UNWANTED), "", text[text.index("<svg") :], flags=re.DOTALL)
    # A style can refer to the page's colours, an attribute cannot.
    text = re.sub(r'fill="(#[0-9a-f]{6})"', r'style="fill: \1"', text)
    return re.sub(
        r"(?<=: )#[0-9a-f]{6}\b", lambda found: PAGE_COLOURS.get(found[0], found[0]), text
    )
