"""The map from equations to functions and tests: complete, unique, and true of the files that it
names.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from semanticfl_ref import cli
from semanticfl_ref.tools.trace.equations import PACKAGE, as_markdown, equations, functions, sources

ROOT = Path(__file__).parent.parent.parent


def test_every_tag_is_read_and_none_is_doubled():
    """A tag outside a function's docstring, without a source or without a test, is in the text but
    not in the map.
    """
    written = [
        tag
        for path in sources().values()
        for tag in re.findall(r"^ *Equation \(([^)]*)\)", path.read_text(encoding="utf-8"), re.M)
    ]
    assert sorted(written) == sorted(equation.tag for equation in equations())
    assert len(set(written)) == len(written) > 20


@pytest.mark.parametrize("equation", equations(), ids=lambda e: e.tag)
def test_a_tag_points_to_a_function_and_to_tests(equation):
    assert equation.text and PACKAGE.joinpath(equation.file).read_text(
        encoding="utf-8"
    ).splitlines()[equation.line - 1].lstrip().startswith(
        f"def {equation.function.split('.')[-1]}("
    )
    for test in equation.tests:
        file, _, name = test.partition("::")
        assert name.startswith("test_") and name in dict(
            functions(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        ), f"{equation.tag}: there is no {test}"


def test_every_term_and_every_method_with_an_equation_of_its_own_is_in_the_map():
    mapped = {equation.function for equation in equations()}
    tree = ast.parse((PACKAGE / "federated" / "losses.py").read_text(encoding="utf-8"))
    assert {name for name, _ in functions(tree) if not name.startswith("_")} <= mapped
    assert {
        equation.file.rpartition("/")[2] for equation in equations() if "/methods/" in equation.file
    } >= {"semanticfl.py", "scaffold.py", "feddisco.py", "fedcda.py", "fedrcl.py", "feddifrc.py"}


def test_the_readme_has_the_table():
    table = re.search(
        r"<!-- equations:begin -->\n(.*?)\n<!-- equations:end -->",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.S,
    )
    assert table and table[1] == as_markdown(equations()), (
        "put the output of `python -m semanticfl_ref trace --map --markdown` between the README's markers"
    )
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in table[1].splitlines()), (
        "a bar inside a cell is escaped"
    )
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\(([^)]+)\)", table[1]))


def test_the_map_on_the_command_line(capsys):
    assert cli.main(["trace", "--map"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"{e.file}:{e.line}" in text and all(test in text for test in e.tests) for e in equations()
    )
    assert cli.main(["trace", "--map", "--json"]) == 0
    assert [e["tag"] for e in json.loads(capsys.readouterr().out)["equations"]] == [
        e.tag for e in equations()
    ]
    assert cli.main(["trace", "--markdown"]) == 2
