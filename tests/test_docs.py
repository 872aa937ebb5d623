"""What the documents tell a reader to do is done: their files are written, their commands run, in
the order of the page.
"""

import re
import shlex
import subprocess
import sys

import pytest
from documents import blocks
from processes import ROOT, environment

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_does_what_it_says(page, tmp_path):
    done = 0
    for line in blocks(page):
        if isinstance(line, tuple):
            (tmp_path / line[0]).write_text(line[1], encoding="utf-8")
            continue
        words = shlex.split(line)
        own = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=\S*", word))
        command = [
            sys.executable if word == "python" else word
            for word in words
            if not re.fullmatch(r"[A-Z_]+=\S*", word)
        ]
        cache = {"SEMANTICFL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment(), **cache, **own},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, f"{page.name}: {line}\n{ran.stderr[-2000:]}"
        done += 1
    assert done, f"{page.name} has no command"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_commands_of_the_readme_are_commands():
    """Every `python -m semanticfl_ref ...` of the README is parsed as the command line would;
    running them is what the other tests do.
    """
    from semanticfl_ref import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"python -m semanticfl_ref ([^`\n]*)", text)
    assert len(found) > 8
    for words in found:
        arguments = shlex.split(words.split("    (")[0].split("  #")[0])
        if arguments and "--help" not in arguments and "..." not in words:
            cli.parse(cli.take_imports(arguments)[0])
