"""Names from outside the package."""

import dataclasses
import subprocess
import sys

import pytest

from semanticfl_ref import cli
from semanticfl_ref.config.registry import METHODS, SECTIONS, register_method
from semanticfl_ref.config.schema import Section, option
from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.methods.method import Method


def test_the_sections_are_those_of_a_configuration():
    assert {*SECTIONS, "methods"} == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", ["data", "run", "fed half", "fed.half", "", "fedavg"])
def test_a_method_cannot_have_every_name(name):
    with pytest.raises(UserError, match=repr(name)):
        register_method(name, None)
    assert METHODS.entries.get(name) is None or name == "fedavg"


OUTSIDE = """
from __future__ import annotations
from dataclasses import dataclass
from semanticfl_ref.config.registry import register_method
from semanticfl_ref.config.schema import Section, option

@dataclass(frozen=True, kw_only=True)
class OwnSettings(Section):
    nu: float = option(0.5, "a number", low=0.0)

register_method("fedhalf", "semanticfl_ref.federated.methods.fedavg:FEDAVG", OwnSettings)
"""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--set", "fedhalf.nu=0.25"], 0, "nu = 0.25"),
        (["--set", "fedhalf.nu=x"], 2, "fedhalf.nu = 'x': expected a number"),
        (["--set", "fedhalf.nu=-1"], 2, "fedhalf.nu = -1.0: must be at least 0.0"),
    ],
)
def test_settings_of_an_imported_file(tmp_path, flags, code, words):
    """Their annotations may be strings, and their section is the method's name."""
    file = tmp_path / "own.py"
    file.write_text(OUTSIDE)
    command = ["-m", "semanticfl_ref", "config", "show", "--method", "fedhalf", "--import"]
    done = subprocess.run([sys.executable, *command, file, *flags], capture_output=True, text=True)
    assert done.returncode == code
    assert words in done.stdout + done.stderr


class Plain(Section):
    """Its @dataclass was forgotten."""

    nu: float = option(0.5, "a number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOption(Section):
    nu: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSection:
    nu: float = option(0.5, "a number")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (len, None, r"expected a Method, such as Method\(local_terms="),
        (Method(), Plain, "has @dataclass"),
        (Method(), NoSection, "derives from Section"),
        (Method(), {"nu": 0.5}, "must be a class"),
        (Method(), NoOption, "the setting nu is not made by option"),
    ],
)
def test_the_usual_mistakes_in_a_method_of_ones_own(method, settings, message):
    with pytest.raises(UserError, match=message):
        register_method("own", method, settings)
    assert "own" not in METHODS


def test_a_file_imports_its_neighbour_and_is_named_in_its_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "a_neighbour.py").write_text("NAME = 'fedavg'")
    file = tmp_path / "own.py"
    file.write_text(
        "from a_neighbour import NAME\n"
        "from semanticfl_ref import register_method\n"
        "register_method(NAME, 'a:b')"
    )
    assert cli.main(["config", "show", "--import", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--import {file}: method 'fedavg' is already registered" in error
