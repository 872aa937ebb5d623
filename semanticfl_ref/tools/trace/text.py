"""A watched round in words: what a terminal shows; the page shares `render_round`."""

import os
import textwrap
from typing import TextIO

from semanticfl_ref.formatting import format_bytes, format_percent
from semanticfl_ref.tools.report.page import render
from semanticfl_ref.tools.trace.equations import TEMPLATES
from semanticfl_ref.tools.trace.syntax import pieces
from semanticfl_ref.tools.trace.values import number

WIDTH = 100
PAUSE = "\f"  # between the parts of a text
ANSI = {
    "title": "1;34",
    "function": "1",
    "equation": "36",
    "note": "2",
    "keyword": "35",
    "string": "32",
    "number": "33",
    "comment": "2",
}
# Key of the document -> title of a table, and its columns.
TABLES = {
    "diffusion_pass": ("Diffusion pass of the first images", "name shape mean std norm"),
    "terms": (
        "First batch of the first client; gradients at the features",
        "name weight value weighted gradient_norm gradient_share gradient_cosine",
    ),
    "clients": ("Clients: loss per step, distance moved", "client images steps loss moved"),
    "parameters": ("Global parameters", "name shape mean std norm"),
    "communication": (
        "Communication: down to the clients, of which anchors, and up",
        "down anchors up",
    ),
}
FORMATS = {
    "gradient_share": format_percent,
    **dict.fromkeys(("down", "anchors", "up"), format_bytes),
}


def blocks(document: dict, *, everything: bool = False, colours: bool = False) -> list[str]:
    """A round for a terminal of 100 columns, in parts: what is shown, each statement, each table.

    Args:
        document: the round's document.
        everything: show the statements without an equation too.
        colours: use ANSI colours.
    """

    def paint(kind: str, text: str) -> str:
        return f"\033[{ANSI[kind]}m{text}\033[0m" if colours and kind else text

    text = render_round(
        "round.txt.jinja",
        document,
        everything=everything,
        paint=paint,
        pause=PAUSE,
        wrapped=wrapped,
    )
    return text.rstrip().split(f"\n{PAUSE}\n")


def render_round(template: str, document: dict, **context) -> str:
    """A round as text or as a page.

    Args:
        template: file name.
        document: the round's document.
        context: what else the template uses.
    """
    return render(
        TEMPLATES,
        template,
        document=document,
        turns=all_turns(document),
        tables=tables(document),
        pieces=pieces,
        **context,
    )


def wrapped(text: str, indent: int = 0) -> str:
    """Its lines wrapped at 100 columns, each with a hanging indent."""
    wrapper = textwrap.TextWrapper(
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        replace_whitespace=False,
    )
    return "\n".join(map(wrapper.fill, text.splitlines()))


def has_colours(stream: TextIO) -> bool:
    """Whether to write colours there: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def all_turns(document: dict) -> list[dict]:
    """The turns that have statements; making the anchors is number 0."""
    title = "Server, once: distil anchors. Backbone.features is shown for the first images, rerun."
    before = {"number": 0, "title": title, "steps": document["before"]}
    return [turn for turn in (before, *document["turns"]) if turn["steps"]]


def tables(document: dict) -> dict[str, list[list[str]]]:
    """The round's results: title -> a row of heads, and rows of a name and numbers."""
    rows = {
        **document,
        "terms": [*document["terms"], {"name": "loss", "weighted": document["loss"]}],
        "communication": [document["communication"]],
    }
    found = {}
    for name, (title, columns) in TABLES.items():
        keys = columns.split()
        cells = [[FORMATS.get(key, number)(row.get(key)) for key in keys] for row in rows[name]]
        if cells:
            found[title] = [[key.replace("_", " ") for key in keys], *cells]
    return found
