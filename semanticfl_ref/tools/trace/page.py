"""A watched round as one HTML page: source, equation and numbers side by side, with pictures.
Nothing is loaded from anywhere.
"""

from html import escape
from itertools import groupby
from pathlib import Path

import torch

from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.storage import write_atomic
from semanticfl_ref.tools.report.page import page
from semanticfl_ref.tools.trace import pictures, words

IMAGES = 4
STYLE = """<style>
.step { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 8fr) minmax(0, 11fr); gap: .25rem 1.5rem; padding: .55rem 0; border-bottom: 1px solid var(--line); }
.step > .source:has(+ .values) { grid-column: span 2; }
h3 small { font-weight: 400; } .place { color: var(--faint); font-size: .75rem; }
.equation { border-left: 2px solid var(--accent); padding-left: .75rem; } .equation pre { color: var(--accent); }
.values { display: grid; gap: .2rem; align-content: start; font-size: .85rem; } .values code { margin-right: .4rem; } .values span { color: var(--faint); overflow-wrap: anywhere; }
.pictures img { image-rendering: pixelated; height: 4rem; width: auto; object-fit: contain; object-position: left bottom; } .pictures { border-bottom: 1px solid var(--line); padding-bottom: .75rem; }
.map figure { margin: 1.25rem 0; } .map img { image-rendering: pixelated; width: 100%; height: 12rem; } nav ol { list-style: none; padding: 0; }
@media (max-width: 52rem) { .step { grid-template-columns: minmax(0, 1fr); gap: .5rem; } .step > .source:has(+ .values) { grid-column: auto; } }
</style>"""
INTRODUCTION = """The code that ran is the code of a training run: file, line and text are read from it, and the numbers are those that it held. Beside a statement that calls a
function with an equation stands that equation, with where it is from: [A] the paper's abstract, [S] a second-hand summary of the paper, [N] the nearest published system, [O] our own
reading; else the method's own publication."""


def write(path: Path, document: dict, context: RunContext, offline: bool) -> None:
    """Write the page, whole or not at all. Raises DataError where that is impossible."""
    batch = next(
        value["first"]
        for part in document["turns"]
        for step in part["steps"]
        for value in step["values"]
        if value["name"] == "index_B"
    )
    seen, anchors = (
        pictures.of_images(context, torch.tensor(batch[:IMAGES]), offline),
        pictures.of_anchors(context),
    )
    title = f"One round of {document['settings']['federation.method']}, line by line"
    write_atomic(
        path,
        page(title, STYLE + body(document, seen, anchors)),
        "choose another place for the page",
    )


def body(document: dict, seen: list[dict[str, str]], anchors: dict[str, str]) -> str:
    """Everything below the heading; pictures are data URIs by caption, `seen` of each image."""
    parts = words.parts(document)
    legend = "".join(
        f"<div><dt>{escape(letter)}</dt><dd>{escape(meaning)}</dd></div>"
        for letter, meaning in document["letters"].items()
    )
    contents = "".join(
        f'<li><a href="#turn-{p["number"]}">{escape(p["title"])}</a></li>' for p in parts
    )
    tables = "".join(
        f"<div><h3>{title}</h3>{table(heads, rows)}</div>"
        for title, heads, rows in words.books(document)
    )
    images = (
        "".join(f"<div class=pictures>{figures(one)}</div>" for one in seen)
        + f"<div class=map>{figures(anchors)}</div>"
    )
    return f"""<p class=lead>{escape(words.about(document))}</p>
<p>{INTRODUCTION}</p>
<h3>Letters that end the names of tensors</h3><dl class=legend>{legend}</dl>
<nav><h3>The round</h3><ol>{contents}</ol></nav>
<h2>What came out</h2><div class=columns>{tables}</div>
<p class=note>Gradient: the norm of the weighted term's, at the model's weights. Moved by: the norm of what a client's training changed, running averages left out.</p>
<h2>{"What the frozen model makes of the first batch" if anchors else "The first batch; without anchors, no diffusion model looks at it"}</h2>
<p class=note>Heat maps: blue is below zero, red above; full colour is the 99th percentile of each picture.</p>{images}
{"".join(turn(part, document["equations"]) for part in parts)}"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    lines = [
        (
            f"<{tag}{' class=number' if n else ''}>{escape(cell)}</{tag}>"
            for n, cell in enumerate(row)
        )
        for tag, row in [("th", heads), *(("td", row) for row in rows)]
    ]
    return (
        "<div class=wide><table>"
        + "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
        + "</table></div>"
    )


def figures(by_caption: dict[str, str]) -> str:
    """Pictures with their captions."""
    return "".join(
        f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, source in by_caption.items()
    )


def turn(part: dict, equations: dict) -> str:
    """One turn: its steps by function, each with the statement, its equations, what it made."""
    html = [f'<h2 id="turn-{part["number"]}">{escape(part["title"])}</h2>']
    for (name, file), steps in groupby(
        part["steps"], key=lambda step: (step["function"], step["file"])
    ):
        html.append(f"<h3><code>{escape(name)}</code> <small>{escape(file)}</small></h3>")
        for step in steps:
            shown = "".join(
                "<div class=equation><pre>{text}</pre><small>{tag} [{source}]</small></div>".format_map(
                    {k: escape(str(v)) for k, v in equations[tag].items()}
                )
                for tag in step["equations"]
            )
            values = "".join(
                f"<div><code>{escape(value['name'])}</code><span>{escape(words.text_of(value))}</span></div>"
                for value in step["values"]
            )
            html += [
                f"<div class=step><div class=source><span class=place>{escape(words.place(step))}</span><pre>{escape(step['source'])}</pre></div>",
                f"<div>{shown}</div>" if shown else "",
            ]
            html.append(
                f"<div class=values>{values}<span>{escape(words.more(step))}</span></div></div>"
            )
    return "".join(html)
