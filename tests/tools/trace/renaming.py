"""Renames the local variables of a source file, which must change nothing outside of it."""

import ast
import re
from collections.abc import Iterator

PREFIX = "renamed_"
KEPT = {"self", "cls", "_"}


def with_renamed_locals(source: str, *, parameters: bool) -> str:
    """The source with a prefix before every local variable; no line moves.

    Args:
        source: of a module.
        parameters: rename parameters too; no function may be called with keyword arguments.
    """
    assert source.isascii(), "columns count bytes"
    places = set()
    for function in _outermost_functions(ast.parse(source)):
        nodes = list(ast.walk(function))
        arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        names = stored | arguments if parameters else stored - arguments
        places |= set(_places(function, names - KEPT, source.splitlines()))
    lines = source.splitlines(keepends=True)
    for line, column in sorted(places, reverse=True):
        text = lines[line - 1]
        lines[line - 1] = text[:column] + PREFIX + text[column:]
    return "".join(lines)


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _outermost_functions(child)


def _places(node: ast.AST, names: set[str], lines: list[str]) -> Iterator[tuple[int, int]]:
    """Line and column of every use of the names."""
    if isinstance(node, ast.JoinedStr):
        yield from _places_in_f_string(node, names, lines)
        return
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) if name in names:
            yield node.lineno, node.col_offset
    for child in ast.iter_child_nodes(node):
        yield from _places(child, names, lines)


def _places_in_f_string(
    node: ast.JoinedStr, names: set[str], lines: list[str]
) -> Iterator[tuple[int, int]]:
    """By their text: before Python 3.12 what is inside of an f-string has no positions."""
    for line in range(node.lineno, node.end_lineno + 1):
        start = node.col_offset if line == node.lineno else 0
        end = node.end_col_offset if line == node.end_lineno else len(lines[line - 1])
        for inside in re.finditer(r"\{[^{}]*\}", lines[line - 1][:end]):
            for word in re.finditer(r"(?<![\w.'\"])[A-Za-z_]\w*", inside[0]):
                column = inside.start() + word.start()
                if word[0] in names and column >= start:
                    yield line, column
