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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent
PACKAGE = TEMPLATES.parents[1]
FOLDERS = ("diffusion", "federated", "kernels")  # in the order in which a run uses them
TAG = re.compile(
    r"^ *Equation \((?P<tag>[a-z0-9-]+)\) \[(?P<source>[^\]]+)\]:"
    r"(?P<text>(?:(?!Equation \().)*?)"
    r"^ *Test:\s+(?P<tests>[^\s,]+(?:,\s*[^\s,]+)*)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Equation:
    """A tagged equation.

    Attributes:
        tag: its name.
        source: where it is from.
        text: the equation.
        function: qualified name of the function that computes it.
        file: the function's file, relative to the package.
        line: line of the function's `def`.
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
    """Every tagged equation, in the order of files and lines; a function has at most one."""
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
        if (match := TAG.search(ast.get_docstring(node) or ""))
    ]


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Qualified name and node of a module's functions and of its classes' methods."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{inside}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{inside}{node.name}", node
