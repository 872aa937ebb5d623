"""Two of everything at the same time: one does the work, the other waits or is refused."""

import json
import shutil

import pytest
from campaign.children import SMALL, Child, classified, run, same_files

pytestmark = pytest.mark.heavy

GRID = [flag for flag in SMALL if flag not in ("--method", "fedavg")]


def both(first: list[str], second: list[str]):
    children = [Child(first), Child(second)]
    return [child.end() for child in children]


def outcomes(row, found, names: str, same: bool) -> None:
    """At least one works; what the other is told names the folder."""
    assert any(done.code == 0 for done in found), found
    for done in found:
        kind = classified(done, same, names)
        row.add("equal" if kind == "harmless" else kind, str(done)[-400:])


def test_two_runs_in_one_folder(tmp_path, whole, tally, scale):
    row = tally("two `train --out` in one folder")
    for trial in range(int(6 * scale)):
        path = tmp_path / str(trial) / "run"
        path.parent.mkdir()
        command = ["train", *SMALL, "--out", str(path)]
        found = both(command, command)
        outcomes(row, found, str(path), same_files(path, whole))
    row.check(12)


def test_two_resumes_of_one_run(tmp_path, whole, tally, scale):
    row = tally("two `train --resume` of one run")
    first = tmp_path / "begun"
    assert run(["train", *SMALL, "--rounds", "1", "--out", str(first)]).code == 0
    for trial in range(int(6 * scale)):
        path = tmp_path / str(trial)
        shutil.copytree(first, path)
        command = ["train", "--resume", str(path), "--rounds", "3"]
        found = both(command, command)
        outcomes(row, found, str(path), same_files(path, whole))
    row.check(12)


def test_two_comparisons_in_one_folder(tmp_path, tally, scale):
    """Of different numbers of seeds."""
    row = tally("two `compare` in one folder")
    flags = ["compare", "--methods", "fedavg", *GRID, "--rounds", "1", "--json"]
    alone = json.loads(run([*flags, "--seeds", "1", "--out", str(tmp_path / "alone")]).out)
    for trial in range(int(2 * scale)):
        path = tmp_path / str(trial)
        command = [*flags, "--seeds", "1", "--out", str(path)]
        found = both(command, command)
        results = [json.loads(done.out)["results"] for done in found if done.code == 0]
        outcomes(row, found, str(path), all(each == alone["results"] for each in results))
    row.check(4)


def test_two_extractions_of_one_cache(tmp_path, tally, scale):
    """With a cache folder of their own; both train on the same features."""
    row = tally("two runs that build one feature cache")
    semantic = [*SMALL, "--method", "semanticfl", "--rounds", "1"]
    alone = tmp_path / "alone"
    assert run(["train", *semantic, "--out", str(alone)]).code == 0
    with pytest.MonkeyPatch.context() as patch:
        for trial in range(int(2 * scale)):
            patch.setenv("SEMANTICFL_CACHE", str(tmp_path / f"cache{trial}"))
            paths = [tmp_path / f"run{trial}-{each}" for each in (0, 1)]
            found = both(*(["train", *semantic, "--out", str(path)] for path in paths))
            for path, done in zip(paths, found, strict=True):
                outcomes(row, [done], str(path), same_files(path, alone))
    row.check(4)
