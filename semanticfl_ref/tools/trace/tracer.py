"""Watches functions while they run, and notes every statement the first time: where it stands, what
it made, the equations behind the functions that it calls.

Everything is read from the source files and from the values that the statements hold. Nothing here
knows a variable's name: a model, for example, is recognised by its type.
"""

import ast
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from semanticfl_ref.tools.trace.equations import PACKAGE, TAG, equations, functions
from semanticfl_ref.tools.trace.values import describe


@dataclass(kw_only=True)
class Step:
    """A statement, the first time that it ran.

    Attributes:
        file, line, function: where it stands; the file relative to the package.
        source: its text; of a compound statement its head.
        equations: tags of the equations of functions that it called.
        values: what it made, see `values.describe`.
        iterations: of a loop, in the call that is shown; None for other statements.
    """

    file: str
    line: int
    function: str
    source: str
    equations: list[str] = field(default_factory=list)
    values: list[dict] = field(default_factory=list)
    iterations: int | None = None


class Source:
    """A source file: its text, and the statements of its functions that are shown.

    Attributes:
        lines: of the text.
        docstring: of the module.
        shown: qualified names of the functions that have a docstring and are public or compute an
            equation.
        statements: line number -> statement, for every line of a statement or of its head.
    """

    def __init__(self, path: Path):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.lines, self.docstring = text.splitlines(), ast.get_docstring(tree) or ""
        self.shown, self.statements = set(), {}
        for name, function in functions(tree):
            docstring = ast.get_docstring(function) or ""
            if not docstring or (function.name.startswith("_") and not TAG.search(docstring)):
                continue
            self.shown.add(name)
            for node in (node for part in function.body[1:] for node in ast.walk(part)):
                if isinstance(node, ast.stmt):
                    self.statements |= dict.fromkeys(self._lines_of(node), node)

    def text(self, statement: ast.stmt) -> str:
        """A statement as it is written, without its indentation."""
        lines = [self.lines[n - 1] for n in self._lines_of(statement)]
        return textwrap.dedent("\n".join(lines))

    def _lines_of(self, statement: ast.stmt) -> range:
        """Its line numbers; those of its head if it is a compound statement."""
        first, last = statement.lineno, statement.end_lineno
        if hasattr(statement, "body"):
            last = first
            while not self.lines[last - 1].partition("  #")[0].endswith(":"):
                last += 1
        return range(first, last + 1)


class Tracer:
    """A context manager that notes the statements of some files in the order in which they begin.

    Args:
        files: paths relative to the package. An equation of any file is shown beside the first
            statement that calls its function.

    Attributes:
        sources: file -> its source.
        steps: the statements.
        arguments: function with an equation -> the arguments of its first call.
    """

    def __init__(self, files: Iterable[str]):
        self.sources = {file: Source(PACKAGE / file) for file in files}
        self.steps: list[Step] = []
        self.arguments: dict[str, tuple] = {}
        self.calls: list[_Call] = []
        self.noted: set[ast.stmt] = set()
        self._tags: dict[tuple[str, str], list[str]] = {}
        for equation in equations():
            self._tags.setdefault((equation.file, equation.function), []).append(equation.tag)

    def __enter__(self) -> "Tracer":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *error) -> None:
        sys.settrace(self._before)

    def _enter(self, frame, event, argument):
        """Python calls this at the start of every function."""
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        file = module.removeprefix(f"{PACKAGE.name}.").replace(".", "/") + ".py"
        place = (file, name)
        if place in self._tags:
            self.arguments.setdefault(name, tuple(frame.f_locals.values()))
            if self.calls and self.calls[-1].step:
                self.calls[-1].step.equations += self._tags.pop(place)
        if file not in self.sources or name not in self.sources[file].shown:
            return None
        self.calls.append(_Call(self, file, name))
        return self.calls[-1].follow


class _Call:
    """A call of a watched function."""

    def __init__(self, tracer: Tracer, file: str, name: str):
        self.tracer, self.file, self.name = tracer, file, name
        self.statement: ast.stmt | None = None
        self.step: Step | None = None  # of the statement that runs, if it runs for the first time
        self.runs: Counter[ast.stmt | None] = Counter()
        self.loops: list[tuple[Step, ast.stmt]] = []  # with the first statement inside

    def follow(self, frame, event, argument):
        """Python calls this before every line and at the end: the statement before has run."""
        source = self.tracer.sources[self.file]
        statement = source.statements.get(frame.f_lineno) if event == "line" else None
        # A statement of several lines comes once for each of them.
        if event == "return" or statement not in (None, self.statement):
            if self.step:
                self.step.values = list(_made(self.statement, frame, argument))
            self.statement, self.step = statement, None
            self.runs[statement] += 1
        if event == "return":
            self.tracer.calls.remove(self)
            for step, inside in self.loops:
                step.iterations = self.runs[inside]
        elif statement and statement not in self.tracer.noted:
            self.tracer.noted.add(statement)
            self.step = Step(
                file=self.file,
                line=statement.lineno,
                function=self.name,
                source=source.text(statement),
            )
            self.tracer.steps.append(self.step)
            if isinstance(statement, ast.For):
                self.loops.append((self.step, statement.body[0]))
        return self.follow


def _made(statement: ast.stmt, frame, returned) -> Iterator[dict]:
    """What a statement that has just run assigned, changed or returned."""
    if isinstance(statement, ast.Return):
        yield from describe("return", returned)
        return
    known = frame.f_locals
    for expression in _targets(statement):
        text = ast.unparse(expression)
        variable = re.match(r"\w+", text)[0]
        if variable not in known or variable == "_" or "(" in text:  # nothing is called again
            continue
        value = eval(text, frame.f_globals, known)
        yield from describe(text, value)
        if isinstance(statement, ast.Expr) and getattr(value, "grad_fn", None):
            # A backward pass: models have gradients now.
            for name, model in known.items():
                if isinstance(model, nn.Module):
                    yield from describe(name, model)


def _targets(statement: ast.stmt) -> list[ast.expr]:
    """Names, attributes and items that a statement assigns; of a bare call those that it was called
    on and with, since it may have changed them.
    """
    call = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(call, ast.Call):
        found = [getattr(call.func, "value", None), *call.args]
    else:
        targets = getattr(statement, "targets", [getattr(statement, "target", ast.Pass())])
        nodes = [node for target in targets for node in ast.walk(target)]
        found = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    return [node for node in found if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))]
