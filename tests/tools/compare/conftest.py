"""Grids: one made of numbers alone, so that statistics can be redone on paper, and one trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import JOB, run_cli

from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare.grid import Grid, Run, plan

ENVIRONMENT = {
    "processor": "abacus",
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "semanticfl_ref": "0",
}


@pytest.fixture
def finished_grid(tmp_path):
    """A function: (method -> scenario -> a list of test accuracies per seed) and fields of a Grid
    -> the finished runs of these accuracies, and their grid. `warnings` are those of every run but
    the baseline's.
    """

    def make(
        accuracies: dict[str, dict[str, list[list[float]]]],
        warnings: Sequence[str] = (),
        **fields,
    ) -> tuple[list[Run], Grid]:
        methods, scenarios = list(accuracies), list(next(iter(accuracies.values())))
        first = accuracies[methods[0]][scenarios[0]]
        settings = {"federation.rounds": len(first[0]), "data.name": "digits"}
        grid = Grid(
            **{
                "methods": methods,
                "scenarios": scenarios,
                "seeds": len(first),
                "settings": settings,
                "out": tmp_path,
                "baseline": methods[0],
                **fields,
            }
        )
        runs = plan(grid)
        for run in runs:
            folder = RunFolder.create(run.folder, run.config, {"environment.json": ENVIRONMENT})
            for round, accuracy in enumerate(accuracies[run.method][run.scenario][run.seed], 1):
                line = {
                    "round": round,
                    "test_accuracy": accuracy,
                    "validation_accuracy": accuracy / 2,
                    "client_accuracy": [accuracy, accuracy / 4],
                    "bytes_down": 10,
                    "bytes_up": 6,
                }
                folder.append(line, 1.0)
            own = [] if run.method == grid.baseline else list(warnings)
            folder.finish({"warnings": own})
        return runs, grid

    return make


@pytest.fixture(scope="session")
def grid_job() -> list[str]:
    """Flags of the small job, without method and rounds."""
    return [flag for flag in JOB if flag not in ("--method", "fedavg", "--rounds", "4")]


@pytest.fixture(scope="session")
def trained_grid(tmp_path_factory, grid_job) -> SimpleNamespace:
    """A trained grid of two methods and one seed: `folder`, `arguments` that make it, `result`."""
    folder: Path = tmp_path_factory.mktemp("trained") / "grid"
    arguments = [
        *("compare", "--methods", "fedavg,fedprox[fedprox.mu=0]", *grid_job),
        *("--rounds", "2", "--seeds", "1", "--json", "--out", str(folder)),
    ]
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, arguments=arguments, result=json.loads(done.stdout))
