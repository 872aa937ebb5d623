"""A comparison as Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

from semanticfl_ref.tools.compare.grid import short_name
from semanticfl_ref.tools.compare.statistics import (
    ENOUGH_SEEDS,
    POOLED,
    Comparison,
    standard_deviation,
)
from semanticfl_ref.tools.report.page import render

COLUMNS = (
    *("scenario", "method", "seed", "rounds", "averaged"),
    *("last_round", "mean_of_last", "worst_client", "difference"),
)


def markdown(comparison: Comparison, command: str | None = None) -> str:
    """A table per scenario, one over all scenarios, and below them what was run and where."""
    # Without `at`, one table holds what methods with different numbers of rounds reached.
    tables = groupby(comparison.results, lambda r: (r.scenario, comparison.at and r.rounds))
    return render(
        Path(__file__).parent,
        "comparison.md.jinja",
        comparison=comparison,
        tables=[list(results) for _, results in tables],
        rounds=sorted(
            {len(c["mean"]) for methods in comparison.curves.values() for c in methods.values()}
        ),
        command=command,
        spread=mean_and_deviation,
        short=short_name,
        enough=ENOUGH_SEEDS,
    )


def csv_text(comparison: Comparison) -> str:
    """A line per run and reported number of rounds.

    `difference` is to the baseline, of `mean_of_last`: the mean of the last `averaged` rounds.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in comparison.results:
        if result.scenario == POOLED:
            continue
        differences = result.gain.values if result.gain else [0.0] * len(result.last)
        for seed, *numbers in zip(
            comparison.seeds,
            result.last,
            result.mean_of_last,
            result.worst_client,
            differences,
            strict=True,
        ):
            about = (result.scenario, result.method, seed, result.rounds, result.averaged)
            writer.writerow([*about, *(f"{number:.4f}" for number in numbers)])
    return buffer.getvalue()


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the mean alone for a single value."""
    deviation = standard_deviation(values)
    return f"{fmean(values):.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")
