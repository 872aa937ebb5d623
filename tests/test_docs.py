"""What the documents tell a reader to do is done: their files are written, their commands run, in
the order of the page.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks
from processes import JOB, ROOT, environment

from semanticfl_ref import cli

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
README = ROOT / "README.md"
WITH_COMMANDS = {"api.md", "backbone.md", "data.md", "kernels.md", "methods.md"}
WITH_COMMANDS |= {"scale.md", "scenarios.md"}


def test_which_pages_have_commands():
    assert {page.name for page in PAGES if blocks(page)} == WITH_COMMANDS


@pytest.mark.heavy
@pytest.mark.parametrize("name", sorted(WITH_COMMANDS))
def test_the_page_does_what_it_says(name, tmp_path):
    for block in blocks(ROOT / "docs" / name):
        if isinstance(block, tuple):
            file, text = block
            (tmp_path / file).write_text(text, encoding="utf-8")
        else:
            run_line(block, tmp_path)
    assert_ignored_by_git(tmp_path)


def test_the_readmes_method_trains(tmp_path):
    ((file, text),) = blocks(README)
    (tmp_path / file).write_text(text, encoding="utf-8")
    flags = ["--import", file, *JOB, "--method", "mine", "--out", "runs/mine"]
    run_line(shlex.join(["python", "-m", "semanticfl_ref", "train", *flags]), tmp_path)
    metrics = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(metrics.splitlines()[0])["terms"]["distance"] >= 0
    assert_ignored_by_git(tmp_path)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_commands_of_the_readme_are_commands():
    """Each is parsed as the command line would; other tests run them."""
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"python -m semanticfl_ref ([^`\n]*)", text)
    assert len(found) > 5
    for words in found:
        if words != "..." and "--import" not in words:
            assert cli.parse(shlex.split(words)).command == words.split()[0]


def run_line(line: str, folder: Path) -> None:
    """Run a command of a page in a folder; KEY=VALUE in front of it sets its environment."""
    words = shlex.split(line)
    own = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=\S*", word))
    program, *arguments = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if program == "python":
        program = sys.executable
    cache = {"SEMANTICFL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *arguments],
        cwd=folder,
        env={**environment(), **cache, **own},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def assert_ignored_by_git(folder: Path) -> None:
    """What a reader's commands leave in a clone does not appear as a change of it."""
    if not (ROOT / ".git").exists():
        return
    left = [path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name != "cache"]
    checked = ["git", "check-ignore", "--no-index", *left]
    done = subprocess.run(checked, cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == set(left)
