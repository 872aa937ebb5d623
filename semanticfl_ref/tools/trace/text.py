"""A watched round in words: what a terminal shows, and the texts and tables that the page shares.

No torch in here.
"""

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TextIO

from semanticfl_ref.formatting import format_bytes, format_percent
from semanticfl_ref.tools.trace.syntax import pieces

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


# Key of the document -> title, and name in a row -> head of the column.
COLUMNS = {
    "diffusion_pass": (
        "Diffusion pass of the first images",
        {"name": "stage", "shape": "shape", "mean": "mean", "std": "std"},
    ),
    "terms": (
        "First batch of the first client (gradients at the features)",
        {
            "name": "term",
            "weight": "weight",
            "value": "value",
            "weighted": "weighted",
            "gradient_norm": "gradient",
            "gradient_share": "share",
            "gradient_cosine": "cosine",
        },
    ),
    "clients": (
        "Clients",
        {
            "client": "client",
            "images": "images",
            "steps": "steps",
            "loss": "loss per step",
            "moved": "distance moved",
        },
    ),
    "parameters": ("Global parameters", {"name": "", "norm": "norm", "first": "first entries"}),
    "communication": (
        "Communication",
        {"down": "to the clients", "anchors": "of which anchors", "up": "from the clients"},
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
            texts = [self._step(step, document["equations"]) for step in steps]
            hidden = len(turn["steps"]) - len(steps)
            if hidden:
                texts.append(self._paint("note", f"({hidden} more statements: --all shows them)"))
            texts[0] = f"{self._paint('title', turn['title'])}\n\n{texts[0]}"
            yield from (f"\n{text}" for text in texts)
        for title, rows in tables(document).items():
            yield self._table(title, rows)

    def _step(self, step: dict, equations: dict) -> str:
        code = "".join(self._paint(kind, text) for kind, text in pieces(step["source"]))
        lines = [
            self._paint("function", step["function"]) + self._paint("note", f"  {place(step)}"),
            textwrap.indent(code, "    "),
        ]
        for tag in step["equations"]:
            equation = equations[tag]
            lines.append(self._wrapped("equation", f"({tag}) [{equation['source']}]", 8))
            lines.append(self._wrapped("equation", equation["text"], 12))
        for value in step["values"]:
            lines.append(self._wrapped("", f"{value['name']:<12}  {text_of(value)}", 8))
        if step["iterations"] is not None:
            lines.append(self._wrapped("note", iterations(step), 8))
        return "\n".join(lines)

    def _table(self, title: str, rows: list[list[str]]) -> str:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"\n{self._paint('title', title)}"]
        for row in rows:
            cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append(f"  {'  '.join(cells)}")
        return "\n".join(lines)

    def _wrapped(self, kind: str, text: str, indent: int = 0) -> str:
        lines = [
            part
            for line in text.splitlines()
            for part in textwrap.wrap(
                line,
                WIDTH,
                initial_indent=" " * indent,
                subsequent_indent=" " * (indent + 4),
                replace_whitespace=False,
            )
        ]
        return "\n".join(self._paint(kind, line) for line in lines)

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
            list(columns.values()),
            *([FORMATS.get(key, number)(row.get(key)) for key in columns] for row in rows[name]),
        ]
        for name, (title, columns) in COLUMNS.items()
        if rows[name]
    }


def place(step: dict) -> str:
    """file:line, relative to the package."""
    return f"{step['file']}:{step['line']}"


def iterations(step: dict) -> str:
    """How a loop continues after its first iteration, which is the one shown."""
    count = step["iterations"]
    return f"... and {count - 1} more iterations in this call" if count else "not entered"


def text_of(value: dict) -> str:
    """A value of `values.describe`, without its name."""
    gradient = value.get("gradient_norm")
    match value:
        case {"weight": weight, "value": term, "weighted": weighted}:
            return f"{number(weight)} x {number(term)} = {number(weighted)}"
        case {"parameters": count, "is": kind, "norm": norm}:
            end = "no gradient" if gradient is None else f"gradient norm {number(gradient)}"
            return f"{kind}, {count:,} parameters of norm {number(norm)}, {end}"
        case {"is": kind, "fields": fields}:
            inside = ", ".join(f"{name}={number(v)}" for name, v in list(fields.items())[:6])
            return f"{kind}({inside})"
        case {"shape": shape, "dtype": dtype}:
            return f"{dtype} {shape or ''}".strip() + f"  {_numbers(value)}"
        case {"value": [*first], "length": length}:
            end = ", ..." if length > len(first) else ""
            return (", ".join(map(number, first)) or "empty") + end
    return number(value["value"])


def number(value: object) -> str:
    """Four digits of a float; a long text or list is shortened; nothing for None."""
    if isinstance(value, list):
        return ", ".join(map(number, value[:4]))
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else f"{text[:29]}..."


def _numbers(tensor: dict) -> str:
    if prod(tensor["shape"]) <= len(tensor["first"]):
        return ", ".join(map(number, tensor["first"]))
    extremes = f"{number(tensor['min'])} to {number(tensor['max'])}"
    if "mean" not in tensor:
        return extremes
    spread = f"mean {number(tensor['mean'])} ± {number(tensor['std'])}"
    return f"{spread}, norm {number(tensor['norm'])}, {extremes}"
