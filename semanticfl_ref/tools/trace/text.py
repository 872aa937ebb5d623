"""A watched round in words: what a terminal shows; the page shares its texts and tables."""

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from semanticfl_ref.formatting import format_bytes, format_percent
from semanticfl_ref.tools.trace.syntax import pieces
from semanticfl_ref.tools.trace.values import number

WIDTH = 100
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
TENSOR_COLUMNS = ("name", "shape", "mean", "std", "norm")
TABLES = {
    "diffusion_pass": ("Diffusion pass of the first images", TENSOR_COLUMNS),
    "terms": (
        "First batch of the first client; gradients at the features",
        (
            *("name", "weight", "value", "weighted"),
            *("gradient_norm", "gradient_share", "gradient_cosine"),
        ),
    ),
    "clients": (
        "Clients: loss per step, distance moved",
        ("client", "images", "steps", "loss", "moved"),
    ),
    "parameters": ("Global parameters", TENSOR_COLUMNS),
    "communication": (
        "Communication: down to the clients, of which anchors, and up",
        ("down", "anchors", "up"),
    ),
}
FORMATS = {
    "gradient_share": format_percent,
    "down": format_bytes,
    "anchors": format_bytes,
    "up": format_bytes,
}


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """Writes a round for a terminal of 100 columns.

    Attributes:
        everything: show the statements without an equation too.
        colours: use ANSI colours.
    """

    everything: bool = False
    colours: bool = False

    def blocks(self, document: dict) -> Iterator[str]:
        """What is shown, each statement, tables at the end."""
        yield self._wrapped("note", f"{about(document)}\n{letters(document)}")
        for turn in numbered_turns(document):
            steps = [step for step in turn["steps"] if self.everything or step["equations"]]
            heading = f"\n{self._paint('title', turn['title'])}"
            hidden = len(turn["steps"]) - len(steps)
            if hidden:
                note = f"({hidden} more statements: --all shows them)"
                heading += f"\n{self._paint('note', note)}"
            texts = [self._step(step, document["equations"]) for step in steps]
            yield "\n".join([heading, *texts[:1]])
            yield from texts[1:]
        for title, rows in tables(document).items():
            yield self._table(title, rows)

    def _step(self, step: dict, equations: dict) -> str:
        code = "".join(self._paint(kind, text) for kind, text in pieces(step["source"]))
        texts = [
            "",
            self._paint("function", step["function"]) + self._paint("note", f"  {place(step)}"),
            textwrap.indent(code, "    "),
        ]
        for equation in (equations[tag] for tag in step["equations"]):
            text = textwrap.indent(equation["text"], "    ")
            head = f"({equation['tag']}) [{equation['source']}]"
            texts.append(self._wrapped("equation", f"{head}\n{text}", 8))
        for value in step["values"]:
            texts.append(self._wrapped("", f"{value['name']:<12}  {value['text']}", 8))
        texts += [self._wrapped("note", more, 8) for more in iterations(step)]
        return "\n".join(texts)

    def _table(self, title: str, rows: list[list[str]]) -> str:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"\n{self._paint('title', title)}"]
        for row in rows:
            cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append(f"  {'  '.join(cells)}")
        return "\n".join(lines)

    def _wrapped(self, kind: str, text: str, indent: int = 0) -> str:
        wrapper = textwrap.TextWrapper(
            WIDTH,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + 4),
            replace_whitespace=False,
        )
        return self._paint(kind, "\n".join(map(wrapper.fill, text.splitlines())))

    def _paint(self, kind: str, text: str) -> str:
        return f"\033[{ANSI[kind]}m{text}\033[0m" if self.colours and kind else text


def has_colours(stream: TextIO) -> bool:
    """Whether to write colours there: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def about(document: dict) -> str:
    """What is shown."""
    settings, clients = document["settings"], len(document["clients"])
    return (
        f"Round {settings['round']} of {settings['federation.method']} on {settings['data.name']}, "
        f"seed {settings['run.seed']}: {clients} clients with at most {settings['images']} images "
        f"each. A statement is shown the first time that it runs, with the values that it made."
    )


def letters(document: dict) -> str:
    """The letters that end the names of tensors."""
    return f"Letters: {', '.join(' '.join(pair) for pair in document['letters'].items())}."


def numbered_turns(document: dict) -> list[dict]:
    """The turns that have statements, with their numbers in their titles; anchors are number 0."""
    before = {
        "number": 0,
        "title": "Server, once: distil anchors from the features of the frozen diffusion model.",
        "steps": document["before"],
    }
    return [
        {**turn, "title": f"{turn['number']}. {turn['title']}"}
        for turn in (before, *document["turns"])
        if turn["steps"]
    ]


def tables(document: dict) -> dict[str, list[list[str]]]:
    """What the round came to: title -> a row of heads, and rows of a name and numbers."""
    rows = {
        **document,
        "terms": [*document["terms"], {"name": "loss", "weighted": document["loss"]}],
        "communication": [document["communication"]],
    }
    return {
        title: [
            [column.replace("_", " ") for column in columns],
            *([FORMATS.get(key, number)(row.get(key)) for key in columns] for row in rows[name]),
        ]
        for name, (title, columns) in TABLES.items()
        if rows[name]
    }


def place(step: dict) -> str:
    """file:line, relative to the package."""
    return f"{step['file']}:{step['line']}"


def iterations(step: dict) -> list[str]:
    """How a loop continues after its first iteration, which is the one shown: a line or nothing."""
    count = step["iterations"]
    if count == 0:
        return ["not entered"]
    return [f"... and {count - 1} more in this call"] if count and count > 1 else []
