"""Watches functions while they run, and notes every statement the first time: where it stands, what
it made, the equations behind the functions that it calls.

Everything is read from the source files and from the values that the statements hold. Nothing here
knows a variable's name: a model, for example, is recognised by its type.
"""

import ast
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

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

    Shown are functions with a docstring that are public or compute an equation.

    Attributes:
        lines: of the text.
        docstring: of the module.
        shown: qualified names of these functions.
        statements: line number -> statement, for every line of a statement or of its head.
        steps: statement -> its step, until it is taken from here.
    """

    def __init__(self, file: str):
        text = (PACKAGE / file).read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.lines, self.docstring = text.splitlines(), ast.get_docstring(tree) or ""
        self.shown: set[str] = set()
        self.statements: dict[int, ast.stmt] = {}
        self.steps: dict[ast.stmt, Step] = {}
        for name, function in functions(tree):
            docstring = ast.get_docstring(function) or ""
            if not docstring or (function.name.startswith("_") and not TAG.search(docstring)):
                continue
            self.shown.add(name)
            for node in (node for part in function.body[1:] for node in ast.walk(part)):
                if isinstance(node, ast.stmt):
                    last = self._last_line(node)
                    source = textwrap.dedent("\n".join(self.lines[node.lineno - 1 : last]))
                    step = Step(file=file, line=node.lineno, function=name, source=source)
                    self.steps[node] = step
                    self.statements |= dict.fromkeys(range(node.lineno, last + 1), node)

    def _last_line(self, statement: ast.stmt) -> int:
        """Of the statement; of its head if it is a compound statement."""
        if not hasattr(statement, "body"):
            return statement.end_lineno
        last = statement.lineno
        while not self.lines[last - 1].partition("  #")[0].endswith(":"):
            last += 1
        return last


class Tracer:
    """A context manager that notes the statements of some files in the order in which they begin.

    Args:
        files: paths relative to the package. Their equations and those of the kernels are shown
            beside the first statement that calls the function.

    Attributes:
        sources: file -> its source.
        steps: the statements that ran.
        arguments: function with an equation -> the arguments of its first call.
    """

    def __init__(self, files: Iterable[str]):
        self.sources = {file: Source(file) for file in files}
        self.steps: list[Step] = []
        self.arguments: dict[str, tuple] = {}
        self.calls: list[_Call] = []
        self._tags: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for equation in equations():
            if equation.file in self.sources or equation.file.startswith("kernels/"):
                self._tags[equation.file, equation.function].append(equation.tag)

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
        if (file, name) in self._tags:
            self.arguments.setdefault(name, tuple(frame.f_locals.values()))
            if self.calls and self.calls[-1].step:
                self.calls[-1].step.equations += self._tags.pop((file, name))
        if file not in self.sources or name not in self.sources[file].shown:
            return None
        self.calls.append(_Call(self, self.sources[file]))
        return self.calls[-1].follow


class _Call:
    """A call of a watched function."""

    def __init__(self, tracer: Tracer, source: Source):
        self.tracer, self.source = tracer, source
        self.statement: ast.stmt | None = None
        self.step: Step | None = None  # of the statement that runs, if it runs for the first time
        self.loops: dict[ast.stmt, Step] = {}  # first statement inside -> the loop's step

    def follow(self, frame, event, argument):
        """Python calls this before every line and at the end: the statement before has run."""
        statement = self.source.statements.get(frame.f_lineno) if event == "line" else None
        # A statement of several lines comes once for each of them.
        if event != "return" and statement in (None, self.statement):
            return self.follow
        if self.step:
            self.step.values = list(_made(self.statement, frame, argument))
        self.statement, self.step = statement, self.source.steps.pop(statement, None)
        if event == "return":
            self.tracer.calls.remove(self)
        if statement in self.loops:
            self.loops[statement].iterations += 1
        if self.step:
            self.tracer.steps.append(self.step)
            if isinstance(statement, ast.For):
                self.step.iterations = 0
                self.loops[statement.body[0]] = self.step
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
