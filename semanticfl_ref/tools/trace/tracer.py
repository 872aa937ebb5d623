"""Watches functions run and notes each statement the first time: where it stands, its text, what it
made, and the equations behind the functions that it calls.

Everything is read from the files that are running; nothing of the algorithm is written down here.
"""

import ast
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import nn

from semanticfl_ref.tools.trace.equations import Equation, functions, sources
from semanticfl_ref.tools.trace.values import describe


class Source:
    """A file's statements by the lines on which they stand; of a compound statement its head.
    `shown` are the public functions that have a docstring.
    """

    def __init__(self, path: Path):
        self.lines = path.read_text(encoding="utf-8").splitlines()
        tree = ast.parse("\n".join(self.lines))
        self.docstring = ast.get_docstring(tree) or ""
        self.shown = {
            name: node
            for name, node in functions(tree)
            if ast.get_docstring(node) and not node.name.startswith("_")
        }
        inside = [
            node
            for function in self.shown.values()
            for part in function.body[1:]
            for node in ast.walk(part)
            if isinstance(node, ast.stmt)
        ]
        self.statements = {
            line: node for node in inside for line in range(node.lineno, _last_line(node) + 1)
        }

    def text(self, statement: ast.stmt) -> str:
        """As it is written, without its indentation."""
        return textwrap.dedent("\n".join(self.lines[statement.lineno - 1 : _last_line(statement)]))


class Tracer:
    """While it is open as a context, notes the statements of the given files in the order in which
    they begin.

    Args:
        files: paths as `equations.sources` has them.
        equations: what is shown beside a statement that calls their functions.
        on_return: called with a watched function's qualified name, what it returns and its local
            variables, whenever one ends.

    Attributes:
        steps: one dict a statement: file, line, function, calls (of the function, in all), source,
            values, equations (tags), and of a loop its iterations in the call that is shown.
    """

    def __init__(
        self,
        files: list[str],
        equations: list[Equation],
        on_return: Callable[[str, object, dict], None] = lambda name, value, known: None,
    ):
        names = {path.resolve(): file for file, path in sources().items()}
        self.sources = {file: Source(path) for path, file in names.items() if file in files}
        self.steps: list[dict] = []
        self.on_return, self.calls, self.noted = on_return, [], set()
        self._equations, self._count = equations, Counter()
        self._file = cache(lambda name: names.get(Path(name).resolve()))

    def __enter__(self) -> "Tracer":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_error) -> None:
        sys.settrace(self._before)
        for step in self.steps:
            step["calls"] = self._count[step["file"], step["function"]]

    def _enter(self, frame, _event, _argument):
        file, name = self._file(frame.f_code.co_filename), frame.f_code.co_qualname
        tags = (
            [e.tag for e in self._equations if (e.file, e.function) == (file, name)] if file else []
        )
        if self.calls and self.calls[-1].step:
            noted = self.calls[-1].step["equations"]
            noted += [tag for tag in tags if tag not in noted]
            tags = []
        if file not in self.sources or name not in self.sources[file].shown:
            return None
        self._count[file, name] += 1
        self.calls.append(_Call(self, file, name, tags))
        return self.calls[-1].follow


class _Call:
    """One call of a watched function."""

    def __init__(self, tracer: Tracer, file: str, name: str, tags: list[str]):
        self.tracer, self.file, self.name, self.tags = tracer, file, name, tags
        self.statement = self.step = None
        self.runs: Counter = Counter()
        self.loops: list[tuple[dict, ast.stmt]] = []

    def follow(self, frame, event, argument):
        """Python calls this before each line and when the function returns: what the line before
        made is there by then.
        """
        source = self.tracer.sources[self.file]
        statement = source.statements.get(frame.f_lineno) if event == "line" else None
        if event == "return" or statement not in (
            None,
            self.statement,
        ):  # a statement over several lines comes once for each
            if self.step is not None:
                self.step["values"] = list(self._made(frame, argument))
            self.statement, self.step = statement, None
            self.runs[statement] += 1
        if event == "return":
            self.tracer.calls.remove(self)
            self.tracer.on_return(self.name, argument, frame.f_locals)
            for step, first in self.loops:
                step["iterations"] = self.runs[first]
        elif statement and (self.file, statement.lineno) not in self.tracer.noted:
            self.tracer.noted.add((self.file, statement.lineno))
            self.step = {
                "file": self.file,
                "line": statement.lineno,
                "function": self.name,
                "source": source.text(statement),
                "values": [],
                "equations": self.tags,
            }
            self.tags = []
            self.tracer.steps.append(self.step)
            if isinstance(statement, ast.For):
                self.loops.append((self.step, statement.body[0]))
        return self.follow

    def _made(self, frame, returned):
        known = frame.f_locals
        model = known.get("model") if isinstance(known.get("model"), nn.Module) else None
        if isinstance(self.statement, ast.Return):
            yield from describe("return", returned, model)
            return
        for node in _written(self.statement):
            if next(n.id for n in ast.walk(node) if isinstance(n, ast.Name)) in known:
                value = eval(ast.unparse(node), frame.f_globals, known)
                yield from describe(ast.unparse(node), value, model)
                if (
                    isinstance(self.statement, ast.Expr)
                    and getattr(value, "grad_fn", None) is not None
                    and model is not None
                ):  # backward: the model has gradients now
                    yield from describe("model", model)


def _last_line(node: ast.stmt) -> int:
    if isinstance(node, ast.With):
        return node.items[-1].context_expr.end_lineno
    head = getattr(node, "iter", getattr(node, "test", None)) if hasattr(node, "body") else node
    return head.end_lineno if head else node.lineno


def _written(node: ast.stmt) -> list[ast.expr]:
    """What a statement assigns; of a bare call what it was called on and with, which it may have
    changed. Names, attributes and items only.
    """
    found = getattr(node, "targets", [getattr(node, "target", None)])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        found = [getattr(node.value.func, "value", None), *node.value.args]
    return [
        part
        for part in _flat(found)
        if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript))
        and not any(isinstance(n, ast.Call) or getattr(n, "id", "") == "_" for n in ast.walk(part))
    ]


def _flat(nodes: list) -> list:
    return [
        part
        for node in nodes
        for part in (_flat(node.elts) if isinstance(node, ast.Tuple) else [node])
    ]
