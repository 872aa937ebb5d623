"""Statistics of a comparison, redone on paper."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare import statistics
from semanticfl_ref.tools.compare.statistics import Result, compare, gain, holm

FLAT = {
    "fedavg": {"iid": [[0.5] * 6, [0.6] * 6]},
    "semanticfl": {"iid": [[0.9, *[0.7] * 5], [0.0, 0.5, 0.6, 0.7, 0.8, 0.9]]},
}


def by_entries(results: list[Result]) -> dict[tuple[str, str], Result]:
    return {(result.scenario, result.method): result for result in results}


def test_means_differences_and_wins_by_hand(finished_grid):
    comparison = compare(*finished_grid(FLAT))
    results = by_entries(comparison.results)
    mine = results["iid", "semanticfl"]
    assert mine.last == pytest.approx([70, 90])
    assert mine.mean_of_last == pytest.approx([70, 70]), "the first of six rounds is in neither"
    assert (mine.rounds, mine.averaged) == (6, 5)
    assert mine.worst_client == pytest.approx([17.5, 22.5])
    assert mine.bytes_sent == 6 * 16
    assert mine.gain.values == pytest.approx([20, 10])
    assert mine.gain.mean == pytest.approx(15)
    assert mine.gain.wins == 2
    assert results["iid", "fedavg"].gain is None
    curve = comparison.curves["iid"]["semanticfl"]
    assert curve["mean"] == pytest.approx([45, 60, 65, 70, 75, 80])
    assert curve["deviation"][0] == pytest.approx(90 / math.sqrt(2))
    json.dumps(asdict(comparison))


def test_after_fewer_rounds_by_hand(finished_grid):
    """Each number of rounds is as if the runs had ended there."""
    comparison = compare(*finished_grid(FLAT, at=[2, 6]))
    early, late = by_entries(comparison.results[:2]), by_entries(comparison.results[2:])
    mine = early["iid", "semanticfl"]
    assert (mine.rounds, mine.averaged) == (2, 2)
    assert mine.last == pytest.approx([70, 50])
    assert mine.mean_of_last == pytest.approx([80, 25])
    assert mine.bytes_sent == 2 * 16
    assert mine.gain.values == pytest.approx([30, -35])
    assert mine.gain.wins == 1
    assert late["iid", "semanticfl"].mean_of_last == pytest.approx([70, 70])


def test_the_validation_part_is_reported_when_asked(finished_grid):
    comparison = compare(*finished_grid(FLAT, part="validation"))
    mine = by_entries(comparison.results)["iid", "semanticfl"]
    assert mine.last == pytest.approx([35, 45])


def test_seeds_are_the_blocks_over_all_scenarios(finished_grid):
    """A seed's differences are averaged over the scenarios first."""
    accuracies = {
        "fedavg": {"iid": [[0.5], [0.6]], "nid2": [[0.2], [0.2]]},
        "moon": {"iid": [[0.6], [0.9]], "nid2": [[0.1], [0.0]]},
    }
    pooled = by_entries(compare(*finished_grid(accuracies)).results)["all scenarios", "moon"]
    assert pooled.gain.values == pytest.approx([0, 5])
    assert pooled.gain.mean == pytest.approx(2.5)
    assert pooled.gain.wins == 1


def test_best_against_second_best(finished_grid):
    accuracies = {
        "fedavg": {"iid": [[0.5], [0.6]]},
        "moon": {"iid": [[0.6], [0.9]]},
        "fedprox": {"iid": [[0.7], [0.7]]},
    }
    (lead,) = compare(*finished_grid(accuracies)).leads
    assert (lead.first, lead.second) == ("moon", "fedprox")
    assert lead.gain.values == pytest.approx([-10, 20])


def test_warnings_of_the_runs(finished_grid):
    runs, grid = finished_grid(FLAT)
    for run in runs[2:]:
        RunFolder(run.folder).finish({"warnings": ["a term is negligible"]})
    assert compare(runs, grid).warnings == [
        f"{run.method}: a term is negligible" for run in runs[2:]
    ]


def test_a_further_method_changes_no_other_method(finished_grid, tmp_path):
    two = by_entries(compare(*finished_grid(FLAT)).results)
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    more = {**FLAT, "moon": {"iid": [[0.4] * 6, [0.3] * 6]}}
    three = by_entries(compare(*finished_grid(more)).results)
    assert {key: three[key] for key in two} == two


def test_the_t_interval_on_numbers():
    """Differences 1 ... 5: mean 3, standard error sqrt(0.5), t(0.975, 4) = 2.776."""
    pytest.importorskip("scipy")
    found = gain([1.0, 2.0, 3.0, 4.0, 5.0], 5)
    half = 2.776445 * math.sqrt(0.5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert found.p == pytest.approx(0.013236, abs=1e-5)
    certain = gain([2.0] * 5, 5)
    assert (certain.low, certain.high, certain.p) == (2, 2, 0)
    few = gain([1.0, 2.0, 3.0, 4.0], 4)
    assert (few.low, few.high, few.p, few.adjusted) == (None,) * 4, "too few seeds"


def test_holm_on_numbers():
    """Four p values: times 4, 3, 2, 1 in ascending order, never descending, at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("spreads", [(1.0,), (0.5, 3.0)])
def test_coverage_of_the_interval(seeds, spreads):
    """Normal differences of mean 1, in scenarios of unequal spread: 94 to 96 %."""
    pytest.importorskip("scipy")
    source = np.random.default_rng(seeds)
    covered, trials = 0, 3_000
    for _ in range(trials):
        scenarios = [source.normal(1.0, spread, seeds) for spread in spreads]
        found = gain(np.concatenate(scenarios).tolist(), seeds)
        covered += found.low <= 1.0 <= found.high
    assert 0.94 <= covered / trials <= 0.96


def test_without_scipy_there_are_means_and_wins(monkeypatch, finished_grid):
    monkeypatch.setattr(statistics, "has_scipy", lambda: False)
    found = gain([1.0, 2.0, 3.0, 4.0, 5.0], 5)
    assert (found.mean, found.wins, found.low, found.p) == (3.0, 5, None, None)
