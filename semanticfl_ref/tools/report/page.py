"""The frame of every HTML page: one file without scripts that loads nothing; light or dark as the
reader's system is; from 360 px up.

A page is a jinja template with the line {% extends "base.html.jinja" %} and a block `body`; CSS
rules of its own go into a block `style`. parts.html.jinja has macros for figures, bars and tables
of pairs. Classes for a body:

    <p class=lead>, <p class=note>, <p class="notice warning">, <span class=warning>
    <div class=wide> around what may be wider than the page; <div class="wide scroll"> if long
    <th class=number>, <td class=number>, <td class=name>
    <dl class=legend> and <dl class=cards> of <div><dt>...</dt><dd>...</dd></div>
    <div class=pictures> of <figure>s with images; <img class=paper> if dark on white
    <div class=figures> of <figure>s with SVG
    <div class=columns> of blocks side by side where there is room; <details>

Markdown is rendered by the same function, from templates that end in .md.jinja.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

from semanticfl_ref.formatting import format_bytes, format_percent, format_seconds
from semanticfl_ref.tools.report.drawing import COLOURS


def render(folder: Path, template: str, title: str = "", **context) -> str:
    """A whole document: HTML, in which text is escaped, or Markdown.

    Args:
        folder: the template's folder; base.html.jinja and parts.html.jinja are found from any.
        template: file name.
        title: plain text; also the heading.
        context: what the template uses. Filters beside jinja's own: `bytes` (1536 is "1.5 KiB"),
            `percent` (a share in 0 ... 1), `seconds`, `number` (4 digits, None is empty).
    """
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes,
        percent=format_percent,
        seconds=format_seconds,
        number=lambda value: "" if value is None else f"{value:.4g}",
    )
    return environment.get_template(template).render(title=title, colours=COLOURS, **context)
