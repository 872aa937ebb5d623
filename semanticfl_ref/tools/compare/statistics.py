"""Statistics of a finished grid: means, standard deviations, and paired differences over seeds with
t intervals and p values.

Seeds are the blocks: runs of one seed share partition, clients and initial weights. Over all
scenarios, which are fixed and named, a seed's differences are averaged first. Intervals and p
values need SciPy (the extra `plots`) and five seeds.

Accuracies are in per cent. What counts of a run is its last round, or the mean of its last five
rounds; never its best round.
"""

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, stdev

from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.summary import LAST
from semanticfl_ref.tools.compare.grid import Grid, Run

LEAST_SEEDS = 5  # for an interval or a p value
POOLED = "all scenarios"  # the scenario of results over all of them
MACHINE = ("processor", "device", "precision", "threads", "python", "versions", "semanticfl_ref")

Rounds = list[dict]  # lines of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Differences to another method with the same seed.

    Attributes:
        mean: mean difference in percentage points.
        low, high: 95 % t interval of the mean over seeds (df = seeds - 1); None below five seeds.
        p: of the two-sided t test that the mean is zero; None below five seeds.
        adjusted: p, adjusted by Holm for the number of methods compared with the baseline.
        wins: number of seeds whose difference is above zero.
        values: the difference of each seed; over all scenarios, its mean over them.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    adjusted: float | None
    wins: int
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The best mean of the last rounds against the second best, compared directly.

    Attributes:
        scenario, rounds: as in `Result`.
        first, second: methods.
        gain: of the first over the second.
    """

    scenario: str
    rounds: int
    first: str
    second: str
    gain: Gain


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
        leads: of two or more methods, by number of rounds, then by scenario.
        warnings: of the runs, each once, with its method.
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
    leads: list[Lead]
    warnings: list[str]
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
    results, leads = [], []
    groups = [*scenarios, POOLED] if len(scenarios) > 1 else scenarios
    for after, scenario in product(grid.at or [None], groups):
        cut = {m: [rounds[:after] for rounds in histories[scenario, m]] for m in grid.methods}
        found = _results(scenario, cut, grid, key)
        results += found
        if len(found) > 1:
            leads.append(_lead(found, grid.seeds))
    environment = RunFolder(runs[0].folder).read("environment.json")
    return Comparison(
        part=grid.part,
        baseline=grid.baseline,
        at=list(grid.at),
        seeds=list(range(grid.seeds)),
        dataset=runs[0].config.data.name,
        machine={name: environment[name] for name in MACHINE},
        results=results,
        leads=leads,
        warnings=_warnings(runs),
        curves={
            scenario: {method: _curve(histories[scenario, method], key) for method in grid.methods}
            for scenario in scenarios
        },
    )


def gain(differences: Sequence[float], seeds: int) -> Gain:
    """The mean of paired differences, its t interval and p value.

    Args:
        differences: scenario by scenario in the order of the seeds; averaged for each seed.
        seeds: their number.
    """
    values = [fmean(differences[seed::seeds]) for seed in range(seeds)]
    low = high = p = None
    if has_scipy() and seeds >= LEAST_SEEDS:
        from scipy import stats

        low, high = fmean(values), fmean(values)
        p = 0.0 if low else 1.0
        if stdev(values) > 0:  # else the mean is known exactly
            test = stats.ttest_1samp(values, 0.0)
            low, high = map(float, test.confidence_interval(0.95))
            p = float(test.pvalue)
    wins = sum(value > 0 for value in values)
    return Gain(mean=fmean(values), low=low, high=high, p=p, adjusted=p, wins=wins, values=values)


def has_scipy() -> bool:
    """Whether SciPy, of the extra `plots`, is installed."""
    return importlib.util.find_spec("scipy") is not None


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number, in the same order.

    Source: Holm: A simple sequentially rejective multiple test procedure. Scandinavian Journal of
    Statistics 6, 1979.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def mean_of_last(rounds: Rounds, key: str) -> float:
    """Mean accuracy of a run's last rounds, five or as many as there are, in per cent."""
    return 100 * fmean(line[key] for line in rounds[-LAST:])


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation over runs; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def _results(scenario: str, runs_of: dict[str, list[Rounds]], grid: Grid, key: str) -> list[Result]:
    """The result of every method, with p values adjusted over the methods."""
    means = {m: [mean_of_last(rounds, key) for rounds in runs] for m, runs in runs_of.items()}
    gains = {
        method: gain(_differences(means[method], means[grid.baseline]), grid.seeds)
        for method in grid.methods
        if method != grid.baseline
    }
    if any(own.p is not None for own in gains.values()):
        adjusted = holm([own.p for own in gains.values()])
        pairs = zip(gains.items(), adjusted, strict=True)
        gains = {method: replace(own, adjusted=p) for (method, own), p in pairs}
    return [
        Result(
            scenario=scenario,
            method=method,
            rounds=len(own[0]),
            averaged=min(LAST, len(own[0])),
            last=[100 * rounds[-1][key] for rounds in own],
            mean_of_last=means[method],
            best=[100 * max(line[key] for line in rounds) for rounds in own],
            worst_client=[100 * min(rounds[-1]["client_accuracy"]) for rounds in own],
            bytes_sent=round(
                fmean(sum(line["bytes_down"] + line["bytes_up"] for line in run) for run in own)
            ),
            gain=gains.get(method),
        )
        for method, own in runs_of.items()
    ]


def _lead(results: list[Result], seeds: int) -> Lead:
    first, second = sorted(results, key=lambda r: fmean(r.mean_of_last), reverse=True)[:2]
    differences = _differences(first.mean_of_last, second.mean_of_last)
    return Lead(
        scenario=first.scenario,
        rounds=first.rounds,
        first=first.method,
        second=second.method,
        gain=gain(differences, seeds),
    )


def _differences(own: list[float], other: list[float]) -> list[float]:
    return [mine - theirs for mine, theirs in zip(own, other, strict=True)]


def _warnings(runs: Sequence[Run]) -> list[str]:
    texts = (
        f"{run.method}: {text}"
        for run in runs
        for text in RunFolder(run.folder).summary().get("warnings", [])
    )
    return list(dict.fromkeys(texts))


def _curve(runs: list[Rounds], key: str) -> dict[str, list]:
    values = [[100 * line[key] for line in lines] for lines in zip(*runs, strict=True)]
    return {"mean": list(map(fmean, values)), "deviation": list(map(standard_deviation, values))}
