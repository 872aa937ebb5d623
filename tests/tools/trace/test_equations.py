"""The map from equations to functions and tests: complete, unique, true of the files it names."""

import ast
import json
import re
from pathlib import Path

import pytest

from semanticfl_ref import cli
from semanticfl_ref.tools.trace.equations import (
    PACKAGE,
    TAG,
    equations,
    functions,
    sources,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "equations.md"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_every_tag_is_read_and_none_is_doubled():
    """A tag outside of a function's docstring, without a source or without a test, is in the text
    but not in the map.
    """
    written = [
        tag
        for file in sources()
        for tag in re.findall(r"^ *Equation \(([^)]*)\)", text_of(PACKAGE / file), re.MULTILINE)
    ]
    assert sorted(written) == sorted(equation.tag for equation in equations())
    assert len(set(written)) == len(written) > 20


@pytest.mark.parametrize("equation", equations(), ids=lambda equation: equation.tag)
def test_a_tag_points_to_a_function_and_to_tests(equation):
    assert equation.text
    line = text_of(PACKAGE / equation.file).splitlines()[equation.line - 1]
    assert line.lstrip().startswith(f"def {equation.function.split('.')[-1]}(")
    for test in equation.tests:
        file, _, name = test.partition("::")
        found = dict(functions(ast.parse(text_of(ROOT / file))))
        assert name.startswith("test_") and name in found, f"{equation.tag}: there is no {test}"


def test_texts_and_lists_of_tests_span_lines():
    docstring = """A sentence.

Equation (name) [Eq. 2]:
    a = b
        + c
Test: tests/a.py::test_one,
    tests/b.py::test_two, tests/c.py::test_three

Args:
    x: not a test, tests/d.py::test_four
"""
    (match,) = TAG.finditer(docstring)
    assert (match["tag"], match["source"]) == ("name", "Eq. 2")
    assert match["text"].strip() == "a = b\n        + c"
    tests = ["tests/a.py::test_one", "tests/b.py::test_two", "tests/c.py::test_three"]
    assert re.split(r",\s*", match["tests"]) == tests
    (scaffold,) = (e for e in equations() if e.tag == "local-step")
    assert len(scaffold.tests) == 3 and len(scaffold.text.splitlines()) == 3


def test_every_term_and_every_method_with_an_equation_of_its_own_is_in_the_map():
    mapped = {equation.function for equation in equations()}
    tree = ast.parse(text_of(PACKAGE / "federated" / "losses.py"))
    assert {name for name, _ in functions(tree) if not name.startswith("_")} <= mapped
    files = {Path(equation.file).name for equation in equations() if "/methods/" in equation.file}
    own = {"semanticfl.py", "scaffold.py", "feddisco.py", "fedcda.py", "fedrcl.py", "feddifrc.py"}
    assert files >= own


def test_the_page_is_current(capsys):
    command = "python -m semanticfl_ref trace --map --markdown"
    assert cli.main(command.split()[3:]) == 0
    assert text_of(PAGE) == capsys.readouterr().out, f"stale: {command} > docs/equations.md"
    assert command in text_of(PAGE)
    rows = [line for line in text_of(PAGE).splitlines() if line.startswith("|")]
    assert len(rows) == len(equations()) + 2
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, "a bar inside of a cell is escaped"
    links = re.findall(r"\]\(([^)]+)\)", text_of(PAGE))
    assert links and all((PAGE.parent / link).is_file() for link in links)


def test_the_map_on_the_command_line(capsys):
    assert cli.main(["trace", "--map"]) == 0
    text = capsys.readouterr().out
    for equation in equations():
        assert f"{equation.file}:{equation.line}" in text
        assert all(test in text for test in equation.tests)
    assert cli.main(["trace", "--map", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["equations"]
    assert [e["tag"] for e in found] == [e.tag for e in equations()]
    assert cli.main(["trace", "--markdown"]) == 2
