"""Which function computes which equation, and which test shows it: read from the docstrings in the
sources. No torch in here.

A docstring tags an equation so, over as many lines as it takes:

    Equation (name) [where it is from]: the equation as plain text
    Test: tests/file.py::test_function, tests/other.py::test_another

Where it is from: for SemanticFL [A] the paper's abstract, [S] a second-hand summary of the paper,
[N] the nearest published system (FedDifRC), [O] our own reading; for the other methods their
publication."""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = ("diffusion", "federated", "kernels")  # in the order in which a run passes them
TAG = re.compile(
    r"^ *Equation \((?P<tag>[a-z0-9-]+)\) \[(?P<source>[^\]]+)\]:(?P<text>(?:(?!Equation \().)*?)^ *Test: (?P<tests>[^\n]+)",
    re.M | re.S,
)


@dataclass(frozen=True)
class Equation:
    """One tagged equation. file: relative to the package; line: of the function's `def`; tests:
    `tests/file.py::function`.
    """

    tag: str
    source: str
    text: str
    function: str
    file: str
    line: int
    tests: tuple[str, ...]


def sources() -> dict[str, Path]:
    """Path relative to the package -> path, of every file that may hold an equation."""
    return {
        f"{folder}/{path.relative_to(PACKAGE / folder)}": path
        for folder in FOLDERS
        for path in sorted((PACKAGE / folder).rglob("*.py"))
    }


def equations() -> list[Equation]:
    """Every tagged equation, in the order of files and lines."""
    found = []
    for file, path in sources().items():
        for name, node in functions(ast.parse(path.read_text(encoding="utf-8"))):
            for match in TAG.finditer(ast.get_docstring(node) or ""):
                text = textwrap.dedent(match["text"].strip(" ").strip("\n")).strip()
                found.append(
                    Equation(
                        match["tag"],
                        match["source"],
                        text,
                        name,
                        file,
                        node.lineno,
                        tuple(re.split(r",\s*", match["tests"].strip())),
                    )
                )
    return found


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of a module's functions and of its classes' methods."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{inside}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{inside}{node.name}", node


def as_text(found: list[Equation]) -> str:
    """The map for a terminal."""
    blocks = (
        f"{e.tag}  [{e.source}]\n{textwrap.indent(e.text, '    ')}\n  {e.function}  {e.file}:{e.line}\n"
        + "\n".join(f"  {test}" for test in e.tests)
        for e in found
    )
    return "\n\n".join(blocks)


def as_markdown(found: list[Equation]) -> str:
    """The map as the README's table; without line numbers, which every edit would move."""
    rows = ["| equation | | computed by | shown by |", "| --- | --- | --- | --- |"]
    for e in found:
        text = "<br>".join(
            "`` {} ``".format(re.sub(r"\s{2,}", "  ", line.strip()).replace("|", "\\|"))
            for line in e.text.splitlines()
            if line.strip()
        )
        tests = "<br>".join(f"[`{test.split('::')[1]}`]({test.split('::')[0]})" for test in e.tests)
        path = e.file if e.file.startswith("kernels/") else f"semanticfl_ref/{e.file}"
        rows.append(f"| {e.tag} [{e.source}] | {text} | [`{e.function}`]({path}) | {tests} |")
    return "\n".join(rows)
