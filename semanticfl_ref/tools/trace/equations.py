"""Which function computes which equation, and which test shows it: read from the docstrings.

A docstring tags an equation so, over as many lines as it takes:

    Equation (tag) [source]: the equation as plain text
    Test: tests/file.py::test_function, tests/other.py::test_another

For SemanticFL the source is [A] the paper's abstract, [S] a second-hand summary of the paper, [N]
the nearest published system (FedDifRC), or [O] our own reading; for other methods their
publication.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
FOLDERS = ("diffusion", "federated", "kernels")  # in the order in which a run uses them
TAG = re.compile(
    r"^ *Equation \((?P<tag>[a-z0-9-]+)\) \[(?P<source>[^\]]+)\]:"
    r"(?P<text>(?:(?!Equation \().)*?)"
    r"^ *Test:\s+(?P<tests>[^\s,]+(?:,\s*[^\s,]+)*)",
    re.MULTILINE | re.DOTALL,
)
MARKDOWN_HEAD = """\
# Equations

Which function computes which equation, and which test shows it, read from the docstrings. Do not
edit this page; make it again with

    python -m semanticfl_ref trace --map --markdown > docs/equations.md

In brackets: the source. [A] the paper's abstract, [S] a second-hand summary of the paper, [N] the
nearest published system (FedDifRC), [O] our own reading; else the method's publication.

| equation | | computed by | shown by |
| --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True)
class Equation:
    """A tagged equation.

    Attributes:
        tag: its name.
        source: where it is from.
        text: the equation.
        function: qualified name of the function that computes it.
        file: of the function, relative to the package.
        line: of the function's `def`.
        tests: `tests/file.py::function`.
    """

    tag: str
    source: str
    text: str
    function: str
    file: str
    line: int
    tests: tuple[str, ...]


def sources() -> list[str]:
    """The files that may hold an equation, relative to the package."""
    return [
        path.relative_to(PACKAGE).as_posix()
        for folder in FOLDERS
        for path in sorted((PACKAGE / folder).rglob("*.py"))
    ]


def equations() -> list[Equation]:
    """Every tagged equation, in the order of files and lines."""
    return [
        Equation(
            tag=match["tag"],
            source=match["source"],
            text=inspect.cleandoc(match["text"]),
            function=name,
            file=file,
            line=node.lineno,
            tests=tuple(re.split(r",\s*", match["tests"])),
        )
        for file in sources()
        for name, node in functions(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        for match in TAG.finditer(ast.get_docstring(node) or "")
    ]


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Qualified name and node of a module's functions and of its classes' methods."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{inside}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{inside}{node.name}", node


def as_text(found: list[Equation]) -> str:
    """The map for a terminal."""
    blocks = []
    for equation in found:
        lines = [
            f"{equation.tag}  [{equation.source}]",
            textwrap.indent(equation.text, "    "),
            f"  {equation.function}  {equation.file}:{equation.line}",
            *(f"  {test}" for test in equation.tests),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(found: list[Equation]) -> str:
    """The map as docs/equations.md; without line numbers, which every edit would move."""
    return MARKDOWN_HEAD + "\n".join(_row(equation) for equation in found)


def _row(equation: Equation) -> str:
    folder = "" if equation.file.startswith("kernels/") else "semanticfl_ref/"
    lines = [re.sub(r"\s{2,}", "  ", line.strip()) for line in equation.text.splitlines()]
    text = "<br>".join(f"`` {line} ``" for line in lines if line).replace("|", "\\|")
    tests = [test.split("::") for test in equation.tests]
    cells = (
        f"{equation.tag} [{equation.source}]",
        text,
        f"[`{equation.function}`](../{folder}{equation.file})",
        "<br>".join(f"[`{name}`](../{file})" for file, name in tests),
    )
    return f"| {' | '.join(cells)} |"
