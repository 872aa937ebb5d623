"""A comparison as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import fmean

from semanticfl_ref.formatting import format_bytes
from semanticfl_ref.tools.compare.statistics import POOLED, Comparison, Result, standard_deviation

COLUMNS = (
    *("scenario", "method", "seed", "rounds", "averaged"),
    *("last_round", "mean_of_last", "worst_client", "difference"),
)
NOTES = """\
Numbers are mean ± standard deviation over seeds (for all scenarios: over scenarios and seeds).
Differences are between means of the last rounds, in percentage points, paired by scenario and seed;
wins are differences above zero. In brackets: the 95 % bootstrap interval of the mean difference,
which is too narrow with few pairs and not corrected for the number of methods. Runs of one scenario
and seed share partition, sampled clients, initial weights and batches, unless a method's own
settings change them."""


def markdown(comparison: Comparison, command: str | None = None) -> str:
    """A table per scenario, one over all scenarios, and below them what was run and where."""
    tables: dict[str, list[Result]] = {}
    for result in comparison.results:
        heading = result.scenario
        if comparison.at:
            heading += f", after round {result.rounds}"
        tables.setdefault(heading, []).append(result)
    lines = []
    for heading, results in tables.items():
        lines += [f"**{heading}**", "", *_table(comparison, results), ""]
    curves = [curve for curves in comparison.curves.values() for curve in curves.values()]
    rounds = _numbers(len(curve["mean"]) for curve in curves)
    lines += [
        f"{comparison.dataset}, {comparison.part} accuracy in %; seeds: {len(comparison.seeds)}, "
        f"rounds: {rounds}.",
        NOTES,
        _machine(comparison.machine),
    ]
    if command:
        lines += ["", f"    {command}"]
    return "\n".join(lines)


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
        values = (result.last, result.mean_of_last, result.worst_client, differences)
        for seed, *numbers in zip(comparison.seeds, *values, strict=True):
            about = (result.scenario, result.method, seed, result.rounds, result.averaged)
            writer.writerow([*about, *map("{:.4f}".format, numbers)])
    return buffer.getvalue()


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone for a single value."""
    deviation = standard_deviation(values)
    return f"{fmean(values):.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _table(comparison: Comparison, results: list[Result]) -> list[str]:
    worst = "worst client" if comparison.part == "test" else "worst client (test part)"
    difference = f"difference to {comparison.baseline}"
    mean = f"mean of the last {_numbers(result.averaged for result in results)}"
    header = ["method", "last round", mean, worst, "communication", difference, "wins"]
    rows = [header, ["---"] * len(header), *map(_cells, results)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _cells(result: Result) -> list[str]:
    values = map(mean_and_deviation, (result.last, result.mean_of_last, result.worst_client))
    cells = [result.method, *values, format_bytes(result.bytes_sent)]
    gain = result.gain
    if gain is None:
        return [*cells, "", ""]
    interval = f" [{gain.low:+.1f}, {gain.high:+.1f}]" if gain.low is not None else ""
    return [*cells, f"{gain.mean:+.1f}{interval}", f"{gain.wins} of {len(gain.values)}"]


def _numbers(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def _machine(machine: dict) -> str:
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    return (
        f"{machine['device']} ({machine['processor']}), {machine['precision']}, threads per run: "
        f"{machine['threads']}, Python {machine['python']}, {', '.join(versions)}."
    )
