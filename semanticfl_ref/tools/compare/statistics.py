"""Statistics of a finished grid: means, standard deviations, and differences paired by seed with t
intervals and p values.

Seeds are blocks: the runs of one seed share what is random, so that a seed gives one difference in
each scenario, and one over all scenarios, the mean of these. The scenarios are fixed and named; an
interval is about further seeds, not about further scenarios. Accuracies are in per cent. What
counts of a run is its last round, or the mean of its last five rounds; never its best round.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from statistics import fmean, stdev

import numpy as np

from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.summary import LAST
from semanticfl_ref.tools.compare.grid import Grid, Run

ENOUGH_SEEDS = 5  # with fewer, an interval is too wide to be of use, or rests on normality alone
POOLED = "all scenarios"  # the scenario of results over all of them
MACHINE = ("processor", "device", "precision", "threads", "python", "versions", "semanticfl_ref")

Rounds = list[dict]  # lines of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Differences of a method to another, in the same scenario and with the same seed.

    Attributes:
        method, reference: entries of the grid; positive is better than the reference.
        mean: mean difference in percentage points.
        low, high: 95 % t interval of the mean; None with fewer than ENOUGH_SEEDS seeds, or without
            SciPy.
        p: two-sided p value of the t test that the mean is zero; None as above.
        p_adjusted: Holm's, for all methods that are compared with the reference.
        wins: number of differences above zero.
        values: the differences, one per seed.
    """

    method: str
    reference: str
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    wins: int
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A method in a scenario, or over all of them.

    Attributes:
        scenario, method: entries of the grid; POOLED for all scenarios.
        rounds: number of rounds after which this is the result.
        averaged: number of last rounds that `mean_of_last` averages.
        last, mean_of_last, best, worst_client: a value per seed; over all scenarios, its mean over
            them. `best` is of the round that was best on the reported part: no estimate, and shown
            only where published numbers may be of that kind.
        bytes_sent: both ways, mean over the runs.
        gain: differences to the baseline; None for the baseline.
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
    gain: Gain | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished grid in numbers; all are JSON values.

    Attributes:
        part, baseline, at: as in `Grid`.
        seeds: seeds in ascending order.
        dataset: name of the data set.
        machines: the environments of the runs, each once.
        results: by number of rounds, then by scenario (over all of them last), then by method.
        leads: of each table of results, in their order, the best method against the second-best, by
            the mean of the last rounds; none with fewer than three methods.
        curves: scenario -> method -> "mean" and standard "deviation" over seeds after every round.
        warnings: warning -> the runs that have it.
        tuning: the search that chose the methods' settings, see `search.Search`; None: no search.
    """

    part: str
    baseline: str
    at: list[int]
    seeds: list[int]
    dataset: str
    machines: list[dict]
    results: list[Result]
    leads: list[Gain]
    curves: dict[str, dict[str, dict[str, list]]]
    warnings: dict[str, list[str]]
    tuning: dict | None = None


def compare(runs: Sequence[Run], grid: Grid) -> Comparison:
    """The comparison of a grid's finished runs."""
    key = f"{grid.part}_accuracy"
    scenarios = list(dict.fromkeys(run.scenario for run in runs))
    # Scenario, or POOLED, and method -> for every seed, the rounds of its runs.
    histories = defaultdict(lambda: [[] for _ in range(grid.seeds)])
    warned: dict[str, list[str]] = {}
    machines: list[dict] = []
    for run in runs:
        folder = RunFolder(run.folder)
        environment = folder.read("environment.json")
        machine = {name: environment[name] for name in MACHINE}
        if machine not in machines:
            machines.append(machine)
        rounds = folder.rounds()
        for scenario in (run.scenario, POOLED):
            histories[scenario, run.method][run.seed - grid.first_seed].append(rounds)
        for text in folder.summary()["warnings"]:
            warned.setdefault(text, []).append(f"{run.method}, {run.scenario}, seed {run.seed}")
    groups = [*scenarios, POOLED] if len(scenarios) > 1 else scenarios
    results, leads = [], []
    for after, scenario in product(grid.at or [None], groups):
        table = [result_of(scenario, m, histories[scenario, m], after, key) for m in grid.methods]
        results += with_gains(table, grid.baseline)
        if len(table) > 2:
            first, second = sorted(table, key=lambda result: -fmean(result.mean_of_last))[:2]
            leads += gains([first], second)
    return Comparison(
        part=grid.part,
        baseline=grid.baseline,
        at=list(grid.at),
        seeds=list(grid.seed_numbers),
        dataset=runs[0].config.data.name,
        machines=machines,
        results=results,
        leads=leads,
        curves={
            scenario: {method: _curve(histories[scenario, method], key) for method in grid.methods}
            for scenario in scenarios
        },
        warnings=warned,
        tuning=grid.tuning,
    )


def result_of(
    scenario: str, method: str, by_seed: list[list[Rounds]], after: int | None, key: str
) -> Result:
    """The result of a method.

    Args:
        scenario, method: entries of the grid; POOLED for all scenarios.
        by_seed: for every seed, the rounds of its run; for all scenarios, of its run in each.
        after: number of rounds that count; None: all.
        key: the accuracy in a line of metrics.jsonl.
    """

    def means(value):
        return [fmean(value(rounds[:after]) for rounds in runs) for runs in by_seed]

    sent = means(lambda rounds: sum(line["bytes_down"] + line["bytes_up"] for line in rounds))
    rounds = len(by_seed[0][0][:after])
    return Result(
        scenario=scenario,
        method=method,
        rounds=rounds,
        averaged=min(LAST, rounds),
        last=means(lambda rounds: 100 * rounds[-1][key]),
        mean_of_last=means(lambda rounds: 100 * fmean(line[key] for line in rounds[-LAST:])),
        best=means(lambda rounds: 100 * max(line[key] for line in rounds)),
        worst_client=means(lambda rounds: 100 * min(rounds[-1]["client_accuracy"])),
        bytes_sent=round(fmean(sent)),
    )


def with_gains(table: Sequence[Result], baseline: str) -> list[Result]:
    """The results of one table, with their differences to the baseline."""
    (reference,) = [result for result in table if result.method == baseline]
    others = [result for result in table if result is not reference]
    by_method = {gain.method: gain for gain in gains(others, reference)}
    return [replace(result, gain=by_method.get(result.method)) for result in table]


def gains(results: Sequence[Result], reference: Result) -> list[Gain]:
    """The differences of some methods to another."""
    # Rounded: two sums of the same accuracies may differ in the last bit, and are equal.
    differences = [
        np.subtract(result.mean_of_last, reference.mean_of_last).round(9).tolist()
        for result in results
    ]
    tests = [{}] * len(results)
    if results and len(reference.last) >= ENOUGH_SEEDS and find_spec("scipy"):
        tests = _t_tests(differences)
    return [
        Gain(
            method=result.method,
            reference=reference.method,
            mean=fmean(values),
            wins=sum(value > 0 for value in values),
            values=values,
            **test,
        )
        for result, values, test in zip(results, differences, tests, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the family-wise error rate holds however the tests depend.

    The p value of rank k of m is multiplied by m - k + 1, and is no smaller than those before it.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
        Statistics 6, 1979.
    """
    order = np.argsort(p_values)
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.maximum.accumulate(scaled).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def _t_tests(differences):
    """Interval and p values of each method, as fields of `Gain`."""
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings(action="ignore"):  # of equal differences: the interval is a point
        test = ttest_1samp(differences, 0, axis=1)
    p = np.nan_to_num(test.pvalue, nan=1)  # of differences that are all zero
    rows = np.transpose([*test.confidence_interval(0.95), p, holm(p)]).tolist()
    return [dict(zip(("low", "high", "p", "p_adjusted"), row, strict=True)) for row in rows]


def _curve(by_seed, key):
    runs = zip(*(rounds for (rounds,) in by_seed), strict=True)
    values = [[100 * line[key] for line in lines] for lines in runs]
    return {"mean": list(map(fmean, values)), "deviation": list(map(standard_deviation, values))}
