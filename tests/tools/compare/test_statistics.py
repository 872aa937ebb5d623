"""Statistics of a comparison, redone on paper."""

import json
import math
from dataclasses import asdict

import pytest

from semanticfl_ref.tools.compare.statistics import Result, compare, gain

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


def test_all_scenarios_pool_the_pairs(finished_grid):
    accuracies = {
        "fedavg": {"iid": [[0.5], [0.6]], "nid2": [[0.2], [0.2]]},
        "moon": {"iid": [[0.6], [0.9]], "nid2": [[0.1], [0.0]]},
    }
    pooled = by_entries(compare(*finished_grid(accuracies)).results)["all scenarios", "moon"]
    assert pooled.gain.values == pytest.approx([10, 30, -10, -20]), "scenario by scenario"
    assert pooled.gain.mean == pytest.approx(2.5)
    assert pooled.gain.wins == 2


def test_a_further_method_changes_no_other_method(finished_grid, tmp_path):
    two = by_entries(compare(*finished_grid(FLAT)).results)
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    more = {**FLAT, "moon": {"iid": [[0.4] * 6, [0.3] * 6]}}
    three = by_entries(compare(*finished_grid(more)).results)
    assert {key: three[key] for key in two} == two


def test_bootstrap_interval():
    assert gain([3.0]).low is None, "one pair has no interval"
    certain = gain([2.0, 2.0, 2.0])
    assert (certain.low, certain.high) == pytest.approx((2, 2))
    # Uniform: the mean's standard error is 11.83 / sqrt(41).
    uniform = gain([float(v) for v in range(-10, 31)])
    half = 1.96 * 11.83 / math.sqrt(41)
    assert uniform.low == pytest.approx(10 - half, abs=0.3)
    assert uniform.high == pytest.approx(10 + half, abs=0.3)
    assert gain([1.0, 5.0, 2.0]) == gain([1.0, 5.0, 2.0]), "seeded"
