"""Statistics of a finished grid: means, standard deviations, and differences paired over seeds with
bootstrap intervals.

Accuracies are in per cent. What counts of a run is its last round, or the mean of its last five
rounds; never its best round.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev

import numpy as np

from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.summary import LAST
from semanticfl_ref.tools.compare.grid import Grid, Run

RESAMPLES = 10_000
POOLED = "all scenarios"  # the scenario of results over all of them
MACHINE = ("processor", "device", "precision", "threads", "python", "versions", "semanticfl_ref")

Rounds = list[dict]  # lines of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Differences to the baseline in the same scenario and with the same seed.

    Attributes:
        mean: mean difference in percentage points.
        low, high: 95 % percentile bootstrap interval of the mean over the pairs; None for a single
            pair. With a handful of pairs it is narrower than it should be.
        wins: number of differences above zero.
        values: the differences.
    """

    mean: float
    low: float | None
    high: float | None
    wins: int
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A method in a scenario, or over all of them.

    Attributes:
        scenario, method: entries of the grid; POOLED for all scenarios.
        rounds: number of rounds after which this is the result.
        averaged: number of last rounds that `mean_of_last` averages.
        last, mean_of_last, best, worst_client: a value per run, scenario by scenario in the order
            of the seeds. `best` is the best round's, chosen on the images that it is reported of:
            only for comparison with published numbers that may be of this kind.
        bytes_sent: both ways, mean over the runs.
        gain: None for the baseline.
    """

    scenario: str
    method: str
    rounds: int
    averaged: int
    last: list[float]
    mean_of_last: list[float]
    best: list[float]
    worst_client: list[float]
    bytes_sent: int
    gain: Gain | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished grid in numbers; all are JSON values.

    Attributes:
        part, baseline, at: as in `Grid`.
        seeds: seeds in ascending order.
        dataset: name of the data set.
        machine: environment of the first run.
        results: by number of rounds, then by scenario (over all of them last), then by method.
        curves: scenario -> method -> "mean" and standard "deviation" over seeds after every round.
    """

    part: str
    baseline: str
    at: list[int]
    seeds: list[int]
    dataset: str
    machine: dict
    results: list[Result]
    curves: dict[str, dict[str, dict[str, list]]]


def compare(runs: Sequence[Run], grid: Grid) -> Comparison:
    """The comparison of a grid's finished runs."""
    key = f"{grid.part}_accuracy"
    scenarios = list(dict.fromkeys(run.scenario for run in runs))
    # Scenario, or POOLED, and method -> the rounds of each run.
    histories: dict[tuple[str, str], list[Rounds]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: scenarios.index(run.scenario)):
        rounds = RunFolder(run.folder).rounds()
        histories[run.scenario, run.method].append(rounds)
        histories[POOLED, run.method].append(rounds)
    results = []
    groups = [*scenarios, POOLED] if len(scenarios) > 1 else scenarios
    for after, scenario in product(grid.at or [None], groups):
        cut = {m: [rounds[:after] for rounds in histories[scenario, m]] for m in grid.methods}
        for method in grid.methods:
            results.append(_result(scenario, method, cut[method], cut[grid.baseline], key))
    environment = RunFolder(runs[0].folder).read("environment.json")
    return Comparison(
        part=grid.part,
        baseline=grid.baseline,
        at=list(grid.at),
        seeds=list(range(grid.seeds)),
        dataset=runs[0].config.data.name,
        machine={name: environment[name] for name in MACHINE},
        results=results,
        curves={
            scenario: {method: _curve(histories[scenario, method], key) for method in grid.methods}
            for scenario in scenarios
        },
    )


def gain(differences: list[float]) -> Gain:
    """The mean of paired differences and its bootstrap interval; the resampling is seeded."""
    low = high = None
    if len(differences) > 1:
        samples = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences)))
        low, high = np.percentile(samples.mean(axis=1), (2.5, 97.5)).tolist()
    wins = sum(difference > 0 for difference in differences)
    return Gain(mean=fmean(differences), low=low, high=high, wins=wins, values=differences)


def mean_of_last(rounds: Rounds, key: str) -> float:
    """Mean accuracy of a run's last rounds, five or as many as there are, in per cent."""
    return 100 * fmean(line[key] for line in rounds[-LAST:])


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation over runs; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def _result(
    scenario: str, method: str, own: list[Rounds], baseline: list[Rounds], key: str
) -> Result:
    means, others = ([mean_of_last(rounds, key) for rounds in runs] for runs in (own, baseline))
    differences = [mean - other for mean, other in zip(means, others, strict=True)]
    sent = [sum(line["bytes_down"] + line["bytes_up"] for line in rounds) for rounds in own]
    return Result(
        scenario=scenario,
        method=method,
        rounds=len(own[0]),
        averaged=min(LAST, len(own[0])),
        last=[100 * rounds[-1][key] for rounds in own],
        mean_of_last=means,
        best=[100 * max(line[key] for line in rounds) for rounds in own],
        worst_client=[100 * min(rounds[-1]["client_accuracy"]) for rounds in own],
        bytes_sent=round(fmean(sent)),
        gain=None if own is baseline else gain(differences),
    )


def _curve(runs: list[Rounds], key: str) -> dict[str, list]:
    values = [[100 * line[key] for line in lines] for lines in zip(*runs, strict=True)]
    return {"mean": list(map(fmean, values)), "deviation": list(map(standard_deviation, values))}
