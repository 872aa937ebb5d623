"""The campaign: how large it is, the table that it prints, and what its parts share.

    pytest -m heavy tests/campaign --campaign-scale 10

Every part counts its cases by what became of them. docs/reliability.md shows the table.
"""

import random
from collections import Counter
from pathlib import Path

import pytest
from campaign.children import SMALL, run

import semanticfl_ref.run.train  # noqa: F401  (forked children need not import it again)

GOOD = ("equal", "named", "harmless")
BAD = ("differs", "unnamed", "silent", "traceback", "hang")
TABLE: dict[str, Counter] = {}


class Tally:
    """A row of the table: what became of each case of a part."""

    def __init__(self, part: str):
        self.counts = TABLE.setdefault(part, Counter())
        self.bad: list[str] = []

    def add(self, outcome: str, case: str) -> None:
        """Count a case; a bad one is described when the part ends."""
        assert outcome in GOOD + BAD, outcome
        self.counts[outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{outcome}: {case}")

    def check(self, least: int) -> None:
        """Fail if a case went wrong, or if there were too few to mean anything."""
        assert not self.bad, "\n".join(self.bad[:40])
        assert self.counts.total() >= least, self.counts


@pytest.fixture
def tally(request):
    """A function: name of the part -> its row of the table."""
    return Tally


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(["train", *SMALL, "--out", str(folder)])
    assert done.code == 0, done.told
    return folder


@pytest.fixture
def scale(request) -> float:
    return request.config.getoption("--campaign-scale")


@pytest.fixture
def chance(request) -> random.Random:
    """Random numbers of the test's own, the same in every run."""
    return random.Random(request.node.name)


def pytest_terminal_summary(terminalreporter):
    if not TABLE:
        return
    write = terminalreporter.write_line
    columns = ("cases", *GOOD, *BAD)
    write("")
    write(f"| what | {' | '.join(columns)} |")
    write(f"| --- {'| ---: ' * len(columns)}|")
    for part, counts in TABLE.items():
        values = [counts.total(), *(counts[name] for name in (*GOOD, *BAD))]
        write(f"| {part} | {' | '.join(map(str, values))} |")
