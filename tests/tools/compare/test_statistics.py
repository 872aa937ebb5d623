"""Statistics of a comparison, redone on paper."""

import json
import math

import pytest

from semanticfl_ref.tools.compare.statistics import compare, gain

FLAT = {
    "fedavg": {"iid": [[0.5] * 6, [0.6] * 6]},
    "semanticfl": {"iid": [[0.9, *[0.7] * 5], [0.0, 0.5, 0.6, 0.7, 0.8, 0.9]]},
}


def cells(result):
    return {(cell["scenario"], cell["arm"]): cell for cell in result["cells"]}


def test_means_differences_and_wins_by_hand(finished_grid):
    result = compare(finished_grid(FLAT), "fedavg", "test")
    mine = cells(result)["iid", "semanticfl"]
    assert mine["last"] == pytest.approx([70, 90]) and mine["last_five"] == pytest.approx(
        [70, 70]
    ), "the first of six rounds is in neither"
    assert mine["worst_client"] == pytest.approx([17.5, 22.5]) and mine["bytes_sent"] == 6 * 16
    assert (
        mine["gain"]["values"] == pytest.approx([20, 10])
        and mine["gain"]["mean"] == pytest.approx(15)
        and mine["gain"]["wins"] == 2
    )
    assert cells(result)["iid", "fedavg"]["gain"] is None
    assert result["curves"]["iid"]["semanticfl"]["mean"] == pytest.approx([45, 60, 65, 70, 75, 80])
    assert result["curves"]["iid"]["semanticfl"]["spread"][0] == pytest.approx(90 / math.sqrt(2))
    json.dumps(result)


def test_the_validation_part_is_told_when_asked(finished_grid):
    mine = cells(compare(finished_grid(FLAT), "fedavg", "validation"))["iid", "semanticfl"]
    assert mine["last"] == pytest.approx([35, 45])


def test_all_scenarios_pool_the_pairs(finished_grid):
    result = compare(
        finished_grid(
            {"fedavg": {"iid": [[0.5]], "nid2": [[0.2]]}, "moon": {"iid": [[0.6]], "nid2": [[0.1]]}}
        ),
        "fedavg",
        "test",
    )
    pooled = cells(result)["all", "moon"]["gain"]
    assert (
        pooled["values"] == pytest.approx([10, -10])
        and pooled["mean"] == pytest.approx(0)
        and pooled["wins"] == 1
    )


def test_a_further_arm_changes_no_other_arm(finished_grid, tmp_path):
    two = cells(compare(finished_grid(FLAT), "fedavg", "test"))
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    three = cells(
        compare(finished_grid({**FLAT, "moon": {"iid": [[0.4] * 6, [0.3] * 6]}}), "fedavg", "test")
    )
    assert {key: three[key] for key in two} == two


def test_bootstrap_interval():
    assert gain([3.0])["low"] is None, "one pair has no interval"
    certain = gain([2.0, 2.0, 2.0])
    assert (certain["low"], certain["high"]) == pytest.approx((2, 2))
    spread = gain(
        [float(v) for v in range(-10, 31)]
    )  # uniform: the mean's standard error is 12 / sqrt(41)
    assert spread["low"] == pytest.approx(10 - 1.96 * 11.83 / math.sqrt(41), abs=0.3) and spread[
        "high"
    ] == pytest.approx(10 + 1.96 * 11.83 / math.sqrt(41), abs=0.3)
    assert gain([1.0, 5.0, 2.0]) == gain([1.0, 5.0, 2.0]), "seeded"
