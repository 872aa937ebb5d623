"""Statistics of a comparison, redone on paper."""

import json
import math
import sys
import warnings
from dataclasses import asdict

import numpy as np
import pytest
from interval_coverage import result

from semanticfl_ref.tools.compare.statistics import (
    Gain,
    Result,
    compare,
    gains,
    holm,
    result_of,
    with_gains,
)

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


def test_equal_numbers_of_correct_images_are_no_difference(finished_grid):
    """2 716 in five rounds of 899 images, both; the means differ in the last bit."""
    correct = ([482, 575, 671, 528, 460], [626, 489, 406, 641, 554])
    first, second = ([count / 899 for count in counts] for counts in correct)
    grid = {"fedavg": {"iid": [first] * 5}, "moon": {"iid": [second] * 5}}
    (before, mine) = compare(*finished_grid(grid)).results
    assert mine.mean_of_last[0] > before.mean_of_last[0], "what is to be seen through"
    assert (set(mine.gain.values), mine.gain.mean, mine.gain.wins) == ({0.0}, 0.0, 0)


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


def test_over_all_scenarios_each_seed_is_averaged_first(finished_grid):
    accuracies = {
        "fedavg": {"iid": [[0.5], [0.6]], "nid2": [[0.2], [0.2]]},
        "moon": {"iid": [[0.6], [0.9]], "nid2": [[0.1], [0.0]]},
    }
    pooled = by_entries(compare(*finished_grid(accuracies)).results)["all scenarios", "moon"]
    assert pooled.last == pooled.mean_of_last == pytest.approx([35, 45])
    assert pooled.worst_client == pytest.approx([35 / 4, 45 / 4])
    assert pooled.gain.values == pytest.approx([0, 5]), "a value per seed, of two scenarios"
    assert pooled.gain.mean == pytest.approx(2.5)
    assert pooled.bytes_sent == 16


def test_a_further_method_changes_no_other_method(finished_grid, tmp_path):
    two = by_entries(compare(*finished_grid(FLAT)).results)
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    more = {**FLAT, "moon": {"iid": [[0.4] * 6, [0.3] * 6]}}
    three = by_entries(compare(*finished_grid(more)).results)
    assert {key: three[key] for key in two} == two


def test_interval_and_p_value_by_hand():
    """Mean 3, standard deviation sqrt(2.5), five seeds: Student's t of four degrees of freedom
    leaves 2.5 % beyond 2.7764, and 0.0132 on both sides beyond 4.2426.
    """
    pytest.importorskip("scipy")
    (gain,) = compared([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5 / 5)
    assert (gain.low, gain.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert gain.p == pytest.approx(0.0132, abs=1e-4)
    assert gain.p_adjusted == gain.p, "the only one"
    assert gain.wins == 5
    three = compared(
        [1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 1.0, -2.0, -1.0], [5.0, 1.0, 3.0, 2.0, 4.0]
    )
    assert [gain.p_adjusted for gain in three] == pytest.approx([3 * gain.p, 1, 3 * gain.p])


def test_equal_differences_have_a_point_as_interval():
    """And, if they are zero, no evidence against zero; nothing is written about it."""
    pytest.importorskip("scipy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero, two = compared([0.0] * 5, [2.0] * 5)
    assert (zero.low, zero.high, zero.p, zero.p_adjusted) == (0, 0, 1, 1)
    assert (two.low, two.high, two.p) == (2, 2, 0)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4])
def test_fewer_than_five_seeds_have_no_interval(seeds):
    (gain,) = compared([3.0] * seeds)
    assert (gain.mean, gain.wins) == (3, seeds)
    assert gain.low is gain.high is gain.p is gain.p_adjusted is None


def test_without_scipy_means_and_wins_remain(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    (gain,) = compared([1.0, 2.0, 3.0, 4.0, -5.0])
    assert (gain.mean, gain.wins) == (1, 4)
    assert gain.low is gain.high is gain.p is gain.p_adjusted is None


def test_holm_by_hand():
    """Of four: times 4, 3, 2, 1 in ascending order, never below the one before, at most one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6, 0.9]) == [1, 1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [5, 10])
def test_the_interval_covers_the_true_difference_in_95_of_100_experiments(seeds):
    """10 000 experiments, normal differences: the standard error of the coverage is 0.2 %."""
    pytest.importorskip("scipy")
    differences = np.random.default_rng(seeds).normal(3.0, 2.0, (10_000, seeds)).tolist()
    assert 0.94 <= coverage(differences, 3.0) <= 0.96


@pytest.mark.parametrize("seeds", [5, 10])
def test_over_scenarios_of_unequal_spread_the_coverage_holds(seeds):
    """And with what the scenarios of a seed share: pairs of scenario and seed are not independent,
    means within a seed are.
    """
    pytest.importorskip("scipy")
    generator = np.random.default_rng(seeds)
    spreads, truths, experiments = [0.5, 2.0, 8.0], [0.0, 4.0, -1.0], 10_000
    shared = generator.normal(0, 3, (experiments, seeds))
    own = generator.normal(truths, spreads, (experiments, seeds, 3)) + shared[..., None]
    means = [
        result_of("all scenarios", "moon", rounds_of(experiment), None, "accuracy").mean_of_last
        for experiment in own.tolist()
    ]
    assert 0.94 <= coverage(means, 100.0) <= 0.96, "the mean of the truths, in per cent"


def test_the_winner_is_compared_with_the_runner_up(finished_grid):
    """Whichever the baseline is, and with the same seeds."""
    accuracies = {
        "fedavg": {"iid": [[0.5], [0.6]], "nid2": [[0.1], [0.1]]},
        "moon": {"iid": [[0.7], [0.5]], "nid2": [[0.1], [0.2]]},
        "fedprox": {"iid": [[0.4], [0.9]], "nid2": [[0.0], [0.1]]},
    }
    iid, nid2, pooled = compare(*finished_grid(accuracies)).leads
    assert (iid.method, iid.reference) == ("fedprox", "moon")
    assert iid.values == pytest.approx([-30, 40])
    assert iid.wins == 1
    assert (nid2.method, nid2.reference) == ("moon", "fedavg")
    assert (pooled.method, pooled.reference) == ("moon", "fedprox")
    assert pooled.values == pytest.approx([20, -15])


def test_two_methods_have_their_difference_in_the_table(finished_grid):
    assert compare(*finished_grid(FLAT)).leads == []


def test_holm_counts_the_methods_of_a_table():
    pytest.importorskip("scipy")
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    table = [result([0.0] * 5, "fedavg"), result(values, "moon"), result(values[::-1], "fedprox")]
    reference, moon, fedprox = with_gains(table, "fedavg")
    assert reference.gain is None
    assert moon.gain.p_adjusted == pytest.approx(2 * moon.gain.p)
    assert fedprox.gain.p_adjusted == pytest.approx(2 * fedprox.gain.p)


def test_warnings_of_every_run(finished_grid):
    runs, grid = finished_grid(FLAT, warnings=["the term is negligible"])
    assert compare(runs, grid).warnings == {
        "the term is negligible": ["semanticfl, iid, seed 0", "semanticfl, iid, seed 1"]
    }


def compared(*differences: list[float]) -> list[Gain]:
    """As methods whose accuracies they are, with one whose accuracies are zero."""
    return gains([result(values) for values in differences], result([0.0] * len(differences[0])))


def coverage(differences: list[list[float]], truth: float) -> float:
    """Share of intervals that contain the truth."""
    return np.mean([gain.low <= truth <= gain.high for gain in compared(*differences)])


def rounds_of(accuracies: list[list[float]]) -> list[list[list[dict]]]:
    """Per seed and scenario an accuracy -> per seed and scenario a run of one round."""
    line = {"client_accuracy": [0.0], "bytes_down": 0, "bytes_up": 0}
    return [[[{**line, "accuracy": value}] for value in runs] for runs in accuracies]
