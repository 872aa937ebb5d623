"""A watched round in words: what a terminal shows, and the texts and tables that the page shares.
No torch in here.
"""

import os
import textwrap
from collections.abc import Iterator
from math import prod

from semanticfl_ref.formatting import format_bytes as size

WIDTH = 100
COLOURS = {"turn": "1;34", "function": "1", "equation": "36", "note": "2"}


def colourful(stream) -> bool:
    """Whether to write colours there: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def blocks(document: dict, colours: bool) -> Iterator[str]:
    """The round as texts of at most 100 columns: what is shown, each step, the books at the end."""

    def paint(kind: str, text: str, indent: int = 0, head: str = "") -> str:
        lines = [
            part
            for line in text.splitlines()
            for part in textwrap.wrap(
                line, WIDTH - indent, subsequent_indent="    ", replace_whitespace=False
            )
        ]
        lines = [
            f"\033[{COLOURS[kind]}m{line}\033[0m" if colours and kind in COLOURS else line
            for line in lines
        ]
        return "\n".join(
            ("" if place else head).ljust(indent) + line for place, line in enumerate(lines)
        )

    yield paint(
        "note",
        f"{about(document)}\nLetters: {', '.join(' '.join(pair) for pair in document['letters'].items())}.",
    )
    for turn in parts(document):
        yield "\n" + paint("turn", turn["title"])
        function = None
        for step in turn["steps"]:
            again = f", first of {step['calls']} calls" if step["calls"] > 1 else ""
            lines = (
                []
                if step["function"] == function
                else ["\n" + paint("function", f"{step['function']}  ({step['file']}{again})", 2)]
            )
            function = step["function"]
            lines += [paint("source", step["source"], 22, "  " + place(step))]
            for equation in (document["equations"][tag] for tag in step["equations"]):
                lines += [
                    paint(
                        "equation",
                        f"({equation['tag']}) [{equation['source']}]\n{textwrap.indent(equation['text'], '    ')}",
                        8,
                    )
                ]
            lines += [
                paint("values", f"{value['name']:<12}  {text_of(value)}", 8)
                for value in step["values"]
            ]
            yield "\n".join(lines + [paint("note", more(step), 8)] * bool(more(step)))
    for title, heads, rows in books(document):
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        yield (
            "\n"
            + paint("turn", title)
            + "".join(
                "\n  "
                + "  ".join(
                    cell.ljust(w) if not n else cell.rjust(w)
                    for n, (cell, w) in enumerate(zip(row, widths, strict=True))
                )
                for row in (heads, *rows)
            )
        )


def parts(document: dict) -> list[dict]:
    """The turns with their numbers in their titles, after what the server did once before."""
    first = [
        {
            "number": 0,
            "title": "Before. Server, once: anchors from the frozen diffusion model's features.",
            "steps": document["before"],
        }
    ]
    return (first if document["before"] else []) + [
        turn | {"title": f"{turn['number']}. {turn['title']}"} for turn in document["turns"]
    ]


def about(document: dict) -> str:
    """What is shown."""
    s = document["settings"]
    return (
        f"Round {s['round']} of {s['federation.method']} on {s['data.name']}, seed {s['run.seed']}: {len(document['clients'])} clients with at most {s['images']} images each. Every statement is "
        "shown the first time that it runs, with what it made: of a loop the first pass, of the clients the first."
    )


def books(document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """What the round came to, as tables: title, heads, rows. The gradient's norm is that of the
    weighted term at the model's weights.
    """
    terms = [
        [t["name"], *(number(t[key]) for key in ("weight", "value", "weighted", "gradient_norm"))]
        for t in document["terms"]
    ] + [["loss", "", "", number(document["loss"]), ""]]
    clients = [
        [number(c[key]) for key in ("client", "images", "steps", "loss", "moved")]
        for c in document["clients"]
    ]
    rows = [
        [row["name"], number(row["norm"]), ", ".join(map(number, row["first"][:3]))]
        for row in document["rows"]
    ]
    return [
        (
            "First batch of the first client",
            ["term", "weight", "value", "weighted", "gradient"],
            terms,
        ),
        ("Clients", ["client", "images", "steps", "loss a step", "moved by"], clients),
        ("The global row", ["", "norm", "first entries"], rows),
        (
            "Over the network",
            ["to the clients", "of which anchors", "back"],
            [[size(document["bytes"][key]) for key in ("down", "anchors", "up")]],
        ),
    ]


def place(step: dict) -> str:
    """file:line, without the folder."""
    return f"{step['file'].rpartition('/')[2]}:{step['line']}"


def more(step: dict) -> str:
    """How a loop goes on after its first pass, which is the one shown; empty for one that ends
    there, and for what is no loop.
    """
    passes = step.get("iterations", 1)
    return (
        f"... and {passes - 1} more in this call" if passes > 1 else "" if passes else "not entered"
    )


def text_of(value: dict) -> str:
    """A value of `values.describe`, but for its name."""
    gradient = (
        "" if value.get("gradient_norm") is None else f", gradient {number(value['gradient_norm'])}"
    )
    if "weight" in value:
        return f"{number(value['weight'])} x {number(value['value'])} = {number(value['weighted'])}{gradient}"
    if "entries" in value:
        return f"{value['is']}, {value['entries']:,} weights of norm {number(value['norm'])}{gradient or ', no gradient'}"
    if "is" in value:
        return value["is"] + (
            f"({', '.join(f'{name}={number(v)}' for name, v in list(value['fields'].items())[:6])})"
            if value["fields"]
            else ""
        )
    if "shape" in value:
        head, numbers = (
            f"{value['dtype']} {value['shape'] or ''}".strip(),
            ", ".join(map(number, value["first"])),
        )
        if prod(value["shape"]) > len(value["first"]):  # too many to write out
            spread = (
                f"mean {number(value['mean'])} ± {number(value['std'])}, norm {number(value['norm'])}, "
                if "mean" in value
                else ""
            )
            numbers = f"{spread}{number(value['min'])} to {number(value['max'])}"
        return f"{head}  {numbers}"
    if "length" in value:
        return (", ".join(map(number, value["value"])) or "empty") + ", ..." * (
            value["length"] > len(value["value"])
        )
    return number(value["value"])


def number(value) -> str:
    """Four digits of a float; a long text cut short."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else text[:29] + "..."
