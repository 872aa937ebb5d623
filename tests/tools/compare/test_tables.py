"""What a comparison shows: the Markdown's numbers, a line of CSV a run, figures of equal bytes."""

import csv
import io

import pytest

from semanticfl_ref.tools.compare import tables
from semanticfl_ref.tools.compare.statistics import compare

TWO = {
    "fedavg": {"iid": [[0.5] * 5, [0.6] * 5], "nid2": [[0.2] * 5, [0.3] * 5]},
    "semanticfl": {"iid": [[0.7] * 5, [0.7] * 5], "nid2": [[0.1] * 5, [0.5] * 5]},
}


def test_markdown_by_hand(finished_grid):
    text = tables.markdown(
        compare(finished_grid(TWO), "fedavg", "test"), "python -m semanticfl_ref compare"
    )
    assert "| fedavg | 55.0 ± 7.1 | 55.0 ± 7.1 | 13.8 ± 1.8 | 80 B |  |  |" in text, "iid"
    assert (
        "| +15.0 [+10.0, +20.0] | 2 of 2 |" in text
        and "**all scenarios**" in text
        and "over 2 seeds, 5 rounds" in text
    )
    assert "2.13.0" in text and text.endswith("    python -m semanticfl_ref compare")


def test_one_seed_has_no_spread(finished_grid):
    text = tables.markdown(
        compare(
            finished_grid({"fedavg": {"iid": [[0.5]]}, "moon": {"iid": [[0.6]]}}), "fedavg", "test"
        )
    )
    assert (
        "| moon | 60.0 | 60.0 | 15.0 | 16 B | +10.0 | 1 of 1 |" in text
        and "%, one seed, 1 rounds" in text
    )


def test_csv_has_a_line_a_run(finished_grid):
    lines = list(
        csv.DictReader(io.StringIO(tables.csv_text(compare(finished_grid(TWO), "fedavg", "test"))))
    )
    assert len(lines) == 8 and {line["scenario"] for line in lines} == {"iid", "nid2"}
    (one,) = [
        line
        for line in lines
        if (line["scenario"], line["method"], line["seed"]) == ("nid2", "semanticfl", "1")
    ]
    assert (
        float(one["last_round"]),
        float(one["last_five"]),
        float(one["worst_client"]),
        float(one["minus_baseline"]),
    ) == pytest.approx((50, 50, 12.5, 20))


def test_figures(finished_grid, tmp_path):
    pytest.importorskip("matplotlib")
    result = compare(finished_grid(TWO), "fedavg", "test")
    for draw in (tables.draw_curves, tables.draw_gains):
        files = [tmp_path / name for name in ("a.png", "b.png", "a.svg", "b.svg")]
        draw(result, *files[::2])
        draw(result, *files[1::2])
        contents = [file.read_bytes() for file in files]
        assert contents[0] == contents[1] and contents[2] == contents[3], (
            "the same numbers are the same bytes"
        )
        assert contents[0].startswith(b"\x89PNG") and all(
            name in contents[2] for name in (b"semanticfl", b"iid", b"nid2")
        )
    assert b"all scenarios" in contents[2], "the gains have a panel over all"


def test_a_single_arm_has_no_gains(finished_grid, tmp_path):
    pytest.importorskip("matplotlib")
    tables.draw_gains(
        compare(finished_grid({"fedavg": {"iid": [[0.5]]}}), "fedavg", "test"),
        tmp_path / "gains.png",
    )
    assert not (tmp_path / "gains.png").exists()
