"""A run's summary on numbers that can be redone on paper, its table, and how its files are written."""

import json

import pytest

from semanticfl_ref.run import folder
from semanticfl_ref.run import summary as metrics
from semanticfl_ref.tools.report import tables

ROW = {
    "validation_accuracy": None,
    "class_accuracy": [0.5, None],
    "client_accuracy": [0.6, 0.2],
    "loss": 1.0,
    "steps": 3,
    "bytes_down": 1024,
    "bytes_up": 512,
    "bytes": {
        "down": {"model": 1000, "anchors": 24, "controls": 0},
        "up": {"model": 512, "anchors": 0, "controls": 0},
    },
    "gradient_share": {"cross_entropy": 0.995, "contrast": 0.005},
    "gradient_norm": {"cross_entropy": 2.0, "contrast": 0.01},
    "gradient_cosine": {"contrast": None},
    "drift": {"update_norm": [1.0, None, 3.0], "mean_update_norm": 1.5, "update_alignment": None},
}
ROWS = [{**ROW, "round": r, "test_accuracy": r / 10} for r in range(1, 8)]


def summary_of(rows):
    return metrics.summarise(rows, 12.0, {"folder": "runs/x", "warnings": ["first"]})


def test_the_summary_and_its_table():
    summary = summary_of(ROWS)
    assert (summary["test_accuracy"], summary["worst_client"], summary["bytes_down"]) == (
        0.7,
        1,
        7 * 1024,
    )
    assert summary["test_accuracy_last_five"] == pytest.approx(0.5)
    assert summary["bytes"] == {
        "down": {"model": 7000, "anchors": 168, "controls": 0},
        "up": {"model": 7 * 512, "anchors": 0, "controls": 0},
    }
    assert (
        len(summary["warnings"]) == 2
        and "'contrast'" in summary["warnings"][1]
        and "0.50%" in summary["warnings"][1]
    )
    text = tables.table(summary)
    assert (
        "20.00% (the worst: client 1, 20.00%)" in text
        and "10.5 KiB" in text
        and "validation" not in text
    )


def test_means_over_rounds_leave_out_what_is_unknown():
    rows = [
        *ROWS[:-1],
        {
            **ROWS[-1],
            "gradient_cosine": {"contrast": -0.5},
            "drift": {
                "update_norm": [9.0, 9.0, 9.0],
                "mean_update_norm": 5.0,
                "update_alignment": 0.25,
            },
        },
    ]
    summary = summary_of(rows)
    assert summary["gradient_norm"] == pytest.approx(
        {"cross_entropy": 2.0, "contrast": 0.01}
    ) and summary["gradient_cosine"] == {"contrast": -0.5}
    assert summary["drift"] == pytest.approx(
        {
            "update_norm": (6 * 2 + 9) / 7,
            "mean_update_norm": (6 * 1.5 + 5) / 7,
            "update_alignment": 0.25,
        }
    )
    assert (
        summary_of(ROWS)["gradient_cosine"] == {"contrast": None}
        and summary_of(ROWS)["drift"]["update_alignment"] is None
    )


def test_a_term_that_the_last_round_lacks_is_in_the_summary():
    """Where clients get different anchors, a round's clients may have none of a term's."""
    without = {key: {"cross_entropy": 1.0} for key in ("gradient_share", "gradient_norm")} | {
        "gradient_cosine": {}
    }
    summary = summary_of([*ROWS, {**ROWS[-1], **without, "round": 8}])
    assert summary["gradient_norm"] == pytest.approx(
        {"cross_entropy": 15 / 8, "contrast": 0.01}
    ) and summary["gradient_share"]["contrast"] == pytest.approx(0.005)


def test_the_round_is_chosen_on_the_validation_part_alone():
    """The test part was best in round 3; validation was best in rounds 2 and 4, of which the first
    counts.
    """
    rows = [
        {**ROW, "round": r, "test_accuracy": test, "validation_accuracy": v}
        for r, test, v in [(1, 0.3, 0.2), (2, 0.5, 0.8), (3, 0.9, 0.7), (4, 0.6, 0.8)]
    ]
    summary = summary_of(rows)
    assert (
        summary["best_validation_round"],
        summary["test_accuracy_at_best_validation"],
        summary["validation_accuracy"],
    ) == (2, 0.5, 0.8)
    assert "50.00% (round 2)" in tables.table(summary)
    without = summary_of(ROWS)
    assert without["best_validation_round"] is without["test_accuracy_at_best_validation"] is None


def test_the_spread_over_clients():
    """Of eleven clients the worst tenth are two; those without a test of their own do not count."""
    accuracies = [0.5] * 9 + [0.1, 0.3]
    assert metrics.spread(accuracies) == pytest.approx(
        {
            "mean": 4.9 / 11,
            "worst_tenth": 0.2,
            "std": ((9 * 0.25 + 0.01 + 0.09) / 11 - (4.9 / 11) ** 2) ** 0.5,
        }
    )
    assert metrics.spread([None, 0.25, 0.75]) == pytest.approx(
        {"mean": 0.5, "worst_tenth": 0.25, "std": 0.25}
    )
    assert "own_accuracy" not in summary_of(ROWS)
    assert summary_of([{**row, "own_accuracy": [None, 0.5]} for row in ROWS])["own_accuracy"] == {
        "mean": 0.5,
        "worst_tenth": 0.5,
        "std": 0.0,
    }


def test_the_price_of_an_accuracy():
    """0.25, 0.6, 0.55, 0.8 in rounds of 1536 bytes: a mark's price is that of the first round at it
    or above; a later fall takes nothing back.
    """
    rows = [
        {**ROW, "round": r, "test_accuracy": accuracy}
        for r, accuracy in enumerate([0.25, 0.6, 0.55, 0.8], 1)
    ]
    rounds = [1, 1, 2, 2, 2, 2, 4, 4, None]
    expected = [
        {"accuracy": mark / 10, "round": r, "bytes": r and 1536 * r}
        for mark, r in enumerate(rounds, 1)
    ]
    assert summary_of(rows)["to_accuracy"] == expected


def test_a_matrix_is_written_line_by_line_and_read_back():
    document = {
        "matrix": [[1, 2], [3, 4]],
        "texts": ["a  [b]", "two\n  lines", "{c}"],
        "plain": ["a  b", "two\n  lines"],
        "empty": [],
        "deep": [{"k": [0.5, None]}],
    }
    text = folder._json(document)
    assert json.loads(text) == document
    assert "    [1, 2],\n    [3, 4]\n" in text and '"k": [0.5, null]' in text
