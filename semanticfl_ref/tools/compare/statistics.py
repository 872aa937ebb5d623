"""What a finished grid says: means, spread, and differences paired over seeds with bootstrap
confidence intervals.

Accuracies are in per cent. A run's figure is the last round's, or the mean of its last five rounds;
never its best round."""

from statistics import fmean, stdev

import numpy as np

from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare.grid import Job

RESAMPLES = 10_000
LAST = 5  # rounds whose mean is reported


def compare(jobs: list[Job], baseline: str, part: str) -> dict:
    """The comparison as plain JSON values.

    Args:
        jobs: finished ones.
        baseline: the arm that the others are paired with.
        part: "test" or "validation", the part whose accuracy is told.

    Returns:
        part, baseline, seeds, rounds, dataset, machine; cells, one for each arm in each scenario,
        and in "all" of them where there are several: scenario, arm, last, last_five, worst_client
        (a value a run, in the order of the seeds, in per cent), bytes_sent (both ways, mean of the
        runs), gain (see `gain`; None for the baseline); curves: scenario -> arm -> mean and
        standard deviation over seeds of every round's accuracy.
    """
    key = f"{part}_accuracy"
    rows = {(job.scenario, job.arm, job.seed): RunFolder(job.folder).rows() for job in jobs}
    scenarios, arms = (
        list(dict.fromkeys(names)) for names in ([j.scenario for j in jobs], [j.arm for j in jobs])
    )
    seeds = sorted({job.seed for job in jobs})

    def cell(name: str, among: list[str], arm: str) -> dict:
        runs = [(rows[s, arm, seed], rows[s, baseline, seed]) for s in among for seed in seeds]
        gains = [last_five(mine, key) - last_five(theirs, key) for mine, theirs in runs]
        return dict(
            scenario=name,
            arm=arm,
            last=[100 * mine[-1][key] for mine, _ in runs],
            last_five=[last_five(mine, key) for mine, _ in runs],
            worst_client=[100 * min(mine[-1]["client_accuracy"]) for mine, _ in runs],
            bytes_sent=round(
                fmean(sum(row["bytes_down"] + row["bytes_up"] for row in mine) for mine, _ in runs)
            ),
            gain=None if arm == baseline else gain(gains),
        )

    groups = [(s, [s]) for s in scenarios] + ([("all", scenarios)] if len(scenarios) > 1 else [])
    environment = RunFolder(jobs[0].folder).read("environment.json")
    return {
        "part": part,
        "baseline": baseline,
        "seeds": seeds,
        "rounds": jobs[0].config.federation.rounds,
        "dataset": jobs[0].config.data.name,
        "machine": {
            key: environment[key]
            for key in (
                "processor",
                "device",
                "precision",
                "threads",
                "python",
                "versions",
                "semanticfl_ref",
            )
        },
        "cells": [cell(name, among, arm) for name, among in groups for arm in arms],
        "curves": {
            s: {arm: _curve([rows[s, arm, seed] for seed in seeds], key) for arm in arms}
            for s in scenarios
        },
    }


def gain(values: list[float]) -> dict:
    """What differences to the baseline in the same scenario and seed, in points, come to; the
    resampling is seeded.

    Returns:
        mean; low ... high, the 95 % interval of the mean by the percentile bootstrap over the pairs
        (None for a single pair; with a handful of pairs it is narrower than the truth); wins, the
        pairs above zero; values.
    """
    low = high = None
    if len(values) > 1:
        draws = np.random.default_rng(0).choice(np.asarray(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(draws.mean(axis=1), (2.5, 97.5)).tolist()
    return {
        "mean": fmean(values),
        "low": low,
        "high": high,
        "wins": sum(v > 0 for v in values),
        "values": values,
    }


def last_five(rows: list[dict], key: str) -> float:
    """Mean accuracy of a run's last five rounds, in per cent."""
    return 100 * fmean(row[key] for row in rows[-LAST:])


def spread(values: list[float]) -> float | None:
    """Standard deviation of a sample, None of a single value."""
    return stdev(values) if len(values) > 1 else None


def _curve(runs: list[list[dict]], key: str) -> dict[str, list]:
    values = [[100 * row[key] for row in round] for round in zip(*runs, strict=True)]
    return {"mean": [fmean(v) for v in values], "spread": [spread(v) for v in values]}
