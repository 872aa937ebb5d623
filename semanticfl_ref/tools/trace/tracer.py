"""Watches functions while they run, and notes every statement the first time: where it is, what
it assigned or returned, the equations behind the functions that it calls.

Everything is read from the source files and from the values that the statements hold. Nothing here
knows a variable's name: a model, for example, is recognised by its type.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from semanticfl_ref.tools.trace.equations import PACKAGE, equations, functions
from semanticfl_ref.tools.trace.values import describe


@dataclass
class Step:
    """A statement, the first time that it ran.

    Attributes:
        file, line, function: where it is; the file relative to the package.
        source: its text; of a compound statement its head.
        equations: tags of the equations of functions that it called.
        values: what it assigned or returned, see `values.describe`.
        iterations: how often a loop ran in the call that is shown; None for other statements.
    """

    file: str
    line: int
    function: str
    source: str
    equations: list[str] = field(default_factory=list)
    values: list[dict] = field(default_factory=list)
    iterations: int | None = None


class Source:
    """A source file: its text, and the statements of its public functions with a docstring.

    Attributes:
        lines: lines of the text.
        docstring: the module's.
        shown: qualified names of these functions.
        statements: line number -> statement, for every line of a statement or of its head.
        steps: statement -> its step, until it is taken from here.
    """

    def __init__(self, file: str):
        text = (PACKAGE / file).read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.lines, self.docstring = text.splitlines(), ast.get_docstring(tree) or ""
        self.shown, self.statements, self.steps = set(), {}, {}
        for name, function in functions(tree):
            if function.name.startswith("_") or not ast.get_docstring(function):
                continue
            self.shown.add(name)
            for node in ast.walk(function):
                if isinstance(node, ast.stmt):
                    lines = self._lines_of(node)
                    source = textwrap.dedent("\n".join(lines))
                    self.steps[node] = Step(file, node.lineno, name, source)
                    self.statements |= {node.lineno + n: node for n in range(len(lines))}

    def _lines_of(self, statement: ast.stmt) -> list[str]:
        """The statement; its head if it is a compound statement."""
        lines = self.lines[statement.lineno - 1 : statement.end_lineno]
        if not hasattr(statement, "body"):
            return lines
        is_end = [line.partition("  #")[0].endswith(":") for line in lines]
        return lines[: is_end.index(True) + 1]


class Tracer:
    """A context manager that notes the statements of some files in the order in which they begin.

    Args:
        files: paths relative to the package. Their equations and those of the kernels are shown
            beside the first statement that calls the function.

    Attributes:
        sources: file -> its source.
        steps: the statements that ran.
        arguments: function with an equation -> the arguments of its first call.
        calls: those of watched functions that have not returned.
    """

    def __init__(self, files: Iterable[str]):
        self.sources = {file: Source(file) for file in files}
        self.steps, self.arguments, self.calls = [], {}, []
        self._tags = {
            (equation.file, equation.function): equation.tag
            for equation in equations()
            if equation.file in self.sources or equation.file.startswith("kernels/")
        }

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
                self.calls[-1].step.equations.append(self._tags.pop((file, name)))
        source = self.sources.get(file)
        if source is None or name not in source.shown:
            return None
        self.calls.append(_Call(self, source))
        return self.calls[-1].follow


class _Call:
    """A call of a watched function."""

    def __init__(self, tracer: Tracer, source: Source):
        self.tracer, self.source = tracer, source
        self.statement = None  # that runs
        self.step = None  # its step, if it runs for the first time
        self.loops = {}  # first statement inside -> the loop's step

    def follow(self, frame, event, argument):
        """Python calls this before every line and at the end: the statement before has run."""
        statement = self.source.statements.get(frame.f_lineno) if event == "line" else None
        # A statement of several lines comes once for each of them.
        if event != "return" and statement in (None, self.statement):
            return self.follow
        if self.step:
            self.step.values = describe(_made(self.statement, frame, argument))
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


def _made(statement: ast.stmt, frame, returned) -> dict[str, object]:
    """What a statement that has just run assigned, changed or returned."""
    if isinstance(statement, ast.Return):
        return {"return": returned}
    known, made = frame.f_locals, {}
    for text in map(ast.unparse, _targets(statement)):
        variable = re.match(r"\w*", text)[0]
        if variable not in known or variable == "_" or "(" in text:  # nothing is called again
            continue
        made[text] = value = eval(text, frame.f_globals, known)
        if isinstance(statement, ast.Expr) and getattr(value, "grad_fn", None):
            # A backward pass: models have gradients now.
            made |= {name: held for name, held in known.items() if isinstance(held, nn.Module)}
    return made


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
