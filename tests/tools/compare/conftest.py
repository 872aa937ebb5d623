"""Run folders made of numbers alone, so that statistics can be redone on paper."""

import json

import pytest

from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare import grid

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
    """A function: (arm -> scenario -> a list of test accuracies a seed) -> the jobs of finished
    runs of these accuracies.
    """

    def make(accuracies: dict[str, dict[str, list[list[float]]]]) -> list[grid.Job]:
        arms, scenarios = list(accuracies), list(next(iter(accuracies.values())))
        runs = accuracies[arms[0]][scenarios[0]]
        settings = {"federation.rounds": len(runs[0]), "data.name": "digits"}
        jobs = grid.plan(
            arms, scenarios, len(runs), lambda cell: config.build({**settings, **cell}), tmp_path
        )
        for job in jobs:
            folder = RunFolder.create(job.folder, job.config, {"environment.json": ENVIRONMENT})
            for round, accuracy in enumerate(accuracies[job.arm][job.scenario][job.seed], start=1):
                line = {
                    "round": round,
                    "test_accuracy": accuracy,
                    "validation_accuracy": accuracy / 2,
                    "client_accuracy": [accuracy, accuracy / 4],
                    "bytes_down": 10,
                    "bytes_up": 6,
                }
                folder.append(line, 1.0)
            folder.finish(json.loads("{}"))
        return jobs

    return make
