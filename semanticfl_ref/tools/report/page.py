"""The frame of every HTML page here: one file without a script or anything to load; light and dark
as the reader's system is; from 360 px up.
"""

from html import escape
from string import Template

# What a body can use: <p class=lead>, <p class=note>, <div class=wide> around what may be wider
# than the page, <dl class=legend>, <div class=pictures> of <figure>s,
# <div class=columns> of blocks side by side where there is room, <details>, <td class=number>,
# <span class=warning>. Pictures that are dark on white: <img class=paper>.
STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfa; --raised: #f3f3ef; --ink: #1d2023; --faint: #62686f; --line: #dcdcd6; --accent: #00598f; --warning: #a33c00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181b; --raised: #1e2226; --ink: #e3e5e6; --faint: #9aa2a9; --line: #343a40; --accent: #72bdea; --warning: #f0a269; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem clamp(1rem, 4vw, 3rem) 5rem; background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 1rem 0 .75rem; }
h2 { font-size: 1.25rem; line-height: 1.3; font-weight: 650; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 650; margin: 1.75rem 0 .5rem; }
p, ul, ol { max-width: 46rem; }
a { color: var(--accent); }
.lead { font-size: 1.1rem; }
.note, figcaption, dt, th, small { color: var(--faint); font-size: .85rem; }
.warning { color: var(--warning); }
code, pre, .number { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .82rem; font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
th.number, td.number { text-align: right; white-space: nowrap; }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .25rem 1.5rem; margin: .75rem 0; }
.legend div { display: flex; gap: .6rem; align-items: baseline; }
.legend dt { min-width: 1.5rem; color: var(--accent); font-family: ui-monospace, Menlo, Consolas, monospace; }
.legend dd { margin: 0; font-size: .9rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2rem; align-items: start; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: .75rem 0; }
figure { margin: 0; max-width: 100%; }
img { max-width: 100%; height: auto; display: block; border-radius: 3px; }
img.paper { background: #fff; padding: .5rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media print { body { max-width: none; padding: 0; } details, tr, figure { break-inside: avoid; } }
"""
FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")


def page(title: str, body: str) -> str:
    """A whole HTML document: `title` is plain text and the heading, `body` is HTML, which may bring
    a <style> of its own.
    """
    return FRAME.substitute(title=escape(title), style=STYLE, body=body)
