"""A run's summary on numbers that can be redone on paper, its table, and its files."""

import json

import pytest

from semanticfl_ref.commands.train import summary_table
from semanticfl_ref.run import folder, summary

ROW = {
    "clients": [0, 1, 2],
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


def summary_of(rows: list[dict]) -> dict:
    return summary.summarise(rows, 12.0, {"folder": "runs/x", "warnings": ["first"]})


def test_the_summary_and_its_table():
    found = summary_of(ROWS)
    assert (found["test_accuracy"], found["worst_client"]) == (0.7, 1)
    assert found["bytes_down"] == 7 * 1024
    assert found["test_accuracy_last_five"] == pytest.approx(0.5)
    assert found["bytes"] == {
        "down": {"model": 7000, "anchors": 168, "controls": 0},
        "up": {"model": 7 * 512, "anchors": 0, "controls": 0},
    }
    assert len(found["warnings"]) == 2
    assert "'contrast'" in found["warnings"][1] and "0.50%" in found["warnings"][1]
    text = summary_table(found)
    assert "20.00% (worst client: 1, 20.00%)" in text
    assert "10.5 KiB" in text and "validation" not in text
    assert "mean of the last 5 " in text


def test_an_update_far_larger_than_the_others_gets_a_warning():
    """The median of six norms is 2; from a hundred times that on, round and client are named."""
    rows = [{**row, "drift": {**row["drift"], "update_norm": [1.0, 2.0, 3.0]}} for row in ROWS]
    rows[3]["drift"]["update_norm"] = [1.0, 200.0, None]
    assert not summary.dominant_update(rows)
    rows[3]["drift"]["update_norm"] = [1.0, 1e33, None]
    (text,) = summary.dominant_update(rows)
    assert "round 4, client 1: the norm of the update is 1e+33, that of a usual one 2;" in text
    assert text in summary_of(rows)["warnings"]
    rows[3]["drift"]["update_norm"] = [None, None, None]
    assert not summary.dominant_update(rows[3:4])


def test_the_table_names_the_rounds_that_were_averaged():
    assert "mean of the last 3 " in summary_table(summary_of(ROWS[:3]))


def test_means_over_rounds_leave_out_what_is_unknown():
    drift = {"update_norm": [9.0, 9.0, 9.0], "mean_update_norm": 5.0, "update_alignment": 0.25}
    last = {**ROWS[-1], "gradient_cosine": {"contrast": -0.5}, "drift": drift}
    found = summary_of([*ROWS[:-1], last])
    assert found["gradient_norm"] == pytest.approx({"cross_entropy": 2.0, "contrast": 0.01})
    assert found["gradient_cosine"] == {"contrast": -0.5}
    assert found["drift"] == pytest.approx(
        {
            "update_norm": (6 * 2 + 9) / 7,
            "mean_update_norm": (6 * 1.5 + 5) / 7,
            "update_alignment": 0.25,
        }
    )
    unknown = summary_of(ROWS)
    assert unknown["gradient_cosine"] == {"contrast": None}
    assert unknown["drift"]["update_alignment"] is None


def test_a_term_that_the_last_round_lacks_is_in_the_summary():
    """Where clients receive different anchors, a round's clients may have none of a term's."""
    without = {
        "gradient_share": {"cross_entropy": 1.0},
        "gradient_norm": {"cross_entropy": 1.0},
        "gradient_cosine": {},
    }
    found = summary_of([*ROWS, {**ROWS[-1], **without, "round": 8}])
    assert found["gradient_norm"] == pytest.approx({"cross_entropy": 15 / 8, "contrast": 0.01})
    assert found["gradient_share"]["contrast"] == pytest.approx(0.005)


def test_the_round_is_chosen_on_the_validation_part_alone():
    """Test accuracy was best in round 3; validation was best in rounds 2 and 4, of which the first
    counts.
    """
    rows = [
        {**ROW, "round": r, "test_accuracy": test, "validation_accuracy": validation}
        for r, test, validation in [(1, 0.3, 0.2), (2, 0.5, 0.8), (3, 0.9, 0.7), (4, 0.6, 0.8)]
    ]
    found = summary_of(rows)
    assert found["best_validation_round"] == 2
    assert (found["test_accuracy_at_best_validation"], found["validation_accuracy"]) == (0.5, 0.8)
    assert "50.00% (round 2)" in summary_table(found)
    without = summary_of(ROWS)
    assert without["best_validation_round"] is without["test_accuracy_at_best_validation"] is None


def test_the_distribution_over_clients():
    """Of eleven clients the worst tenth are two; those without a test set of their own do not
    count.
    """
    accuracies = [0.5] * 9 + [0.1, 0.3]
    assert summary.distribution(accuracies) == pytest.approx(
        {
            "mean": 4.9 / 11,
            "worst_tenth": 0.2,
            "std": ((9 * 0.25 + 0.01 + 0.09) / 11 - (4.9 / 11) ** 2) ** 0.5,
        }
    )
    assert summary.distribution([None, 0.25, 0.75]) == pytest.approx(
        {"mean": 0.5, "worst_tenth": 0.25, "std": 0.25}
    )
    assert "own_accuracy" not in summary_of(ROWS)
    own = summary_of([{**row, "own_accuracy": [None, 0.5]} for row in ROWS])["own_accuracy"]
    assert own == {"mean": 0.5, "worst_tenth": 0.5, "std": 0.0}


def test_the_cost_to_reach_an_accuracy():
    """0.25, 0.6, 0.55, 0.8 in rounds of 1536 bytes: the first round at a target or above counts; a
    later fall takes nothing back.
    """
    rows = [
        {**ROW, "round": r, "test_accuracy": accuracy}
        for r, accuracy in enumerate([0.25, 0.6, 0.55, 0.8], 1)
    ]
    rounds = [1, 1, 2, 2, 2, 2, 4, 4, None]
    expected = [
        {"accuracy": tenths / 10, "round": r, "bytes": r and 1536 * r}
        for tenths, r in enumerate(rounds, 1)
    ]
    assert summary_of(rows)["cost_to_accuracy"] == expected


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
