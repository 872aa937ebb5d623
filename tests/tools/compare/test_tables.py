"""What a comparison shows: the Markdown's numbers, a line of CSV per run, equal figures."""

import csv
import io

import pytest

from semanticfl_ref.tools.compare.experiment import write
from semanticfl_ref.tools.compare.figures import curves_figure, gains_figure
from semanticfl_ref.tools.compare.statistics import compare
from semanticfl_ref.tools.compare.tables import csv_text, markdown
from semanticfl_ref.tools.report.drawing import method_colour, save_figure

TWO = {
    "fedavg": {"iid": [[0.5] * 5, [0.6] * 5], "nid2": [[0.2] * 5, [0.3] * 5]},
    "semanticfl": {"iid": [[0.7] * 5, [0.7] * 5], "nid2": [[0.1] * 5, [0.5] * 5]},
}


def test_markdown_by_hand(finished_grid):
    text = markdown(compare(*finished_grid(TWO)), "python -m semanticfl_ref compare")
    assert "| fedavg | 55.0 ± 7.1 | 55.0 ± 7.1 | 13.8 ± 1.8 | 80 B |  |  |  |  |" in text, "iid"
    assert "| +15.0 (too few seeds for an interval) |  |  | 2 of 2 |" in text
    assert "| mean of the last 5 |" in text
    assert "**all scenarios**" in text
    assert "in %; seeds: 2, rounds: 5." in text
    assert "2.13.0" in text
    assert text.endswith("    python -m semanticfl_ref compare")


def test_five_seeds_have_intervals(finished_grid):
    pytest.importorskip("scipy")
    steps = (0.0, 0.01, 0.02, 0.03, 0.04)
    accuracies = {
        "fedavg": {"iid": [[0.5]] * 5},
        "moon": {"iid": [[0.51 + step] for step in steps]},
        "fedprox": {"iid": [[0.5 + step] for step in steps]},
    }
    text = markdown(compare(*finished_grid(accuracies)))
    assert "| +3.0 [+1.0, +5.0] | 0.013 | 0.026 | 5 of 5 |" in text
    assert "| +2.0 [+0.0, +4.0] | 0.047 | 0.047 | 4 of 5 |" in text
    assert "Best against second best: moon minus fedprox, +1.0" in text
    assert "too few" not in text


def test_one_seed_has_no_deviation(finished_grid):
    text = markdown(compare(*finished_grid({"fedavg": {"iid": [[0.5]]}, "moon": {"iid": [[0.6]]}})))
    few = "(too few seeds for an interval)"
    assert f"| moon | 60.0 | 60.0 | 15.0 | 16 B | +10.0 {few} |  |  | 1 of 1 |" in text
    assert "in %; seeds: 1, rounds: 1." in text


@pytest.mark.parametrize("rounds, averaged", [(1, 1), (3, 3), (5, 5), (7, 5)])
def test_the_mean_is_named_by_the_rounds_really_averaged(finished_grid, rounds, averaged):
    text = markdown(compare(*finished_grid({"fedavg": {"iid": [[0.5] * rounds]}})))
    assert f"| mean of the last {averaged} |" in text


def test_each_number_of_rounds_has_its_table(finished_grid):
    text = markdown(compare(*finished_grid(TWO, at=[3, 5])))
    headings = [line for line in text.splitlines() if line.startswith("**")]
    assert headings == [
        f"**{scenario}, after round {rounds}**"
        for rounds in (3, 5)
        for scenario in ("iid", "nid2", "all scenarios")
    ]
    assert "| mean of the last 3 |" in text
    assert "seeds: 2, rounds: 5." in text


def test_csv_has_a_line_per_run(finished_grid):
    text = csv_text(compare(*finished_grid(TWO)))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 8
    assert {line["scenario"] for line in lines} == {"iid", "nid2"}
    key = ("scenario", "method", "seed", "rounds", "averaged")
    (one,) = [line for line in lines if [line[k] for k in key[:3]] == ["nid2", "semanticfl", "1"]]
    assert [one[k] for k in key[3:]] == ["5", "5"]
    numbers = [float(value) for name, value in one.items() if name not in key]
    assert numbers == pytest.approx([50, 50, 12.5, 20])


def test_figures(finished_grid, tmp_path):
    pytest.importorskip("matplotlib")
    comparison = compare(*finished_grid(TWO))
    for draw in (curves_figure, gains_figure):
        files = [tmp_path / name for name in ("a.png", "b.png", "a.svg", "b.svg")]
        save_figure(draw(comparison), *files[::2])
        save_figure(draw(comparison), *files[1::2])
        contents = [file.read_bytes() for file in files]
        assert contents[0] == contents[1], "the same numbers are the same bytes"
        assert contents[2] == contents[3], "the same numbers are the same bytes"
        assert contents[0].startswith(b"\x89PNG")
        assert all(name in contents[2] for name in (b"semanticfl", b"iid", b"nid2"))
    assert b"all scenarios" in contents[2], "the gains have a panel over all"


def test_settings_change_the_line_but_not_the_colour(finished_grid):
    """Of a method in curves and in gains, whatever it is compared with."""
    to_hex = pytest.importorskip("matplotlib.colors").to_hex
    entries = ["moon", "semanticfl", "moon[moon.mu=5]", "moon[moon.mu=1;moon.tau=1]"]
    comparison = compare(*finished_grid({entry: {"iid": [[0.5]]} for entry in entries}))
    drawn = [draw(comparison).axes[0] for draw in (curves_figure, gains_figure)]
    moon, semanticfl = method_colour("moon"), method_colour("semanticfl")
    lines = [(line.get_color(), line.get_linestyle()) for line in drawn[0].get_lines()]
    assert lines == [(moon, "-"), (semanticfl, "-"), (moon, "--"), (moon, ":")]
    bars = [to_hex(bar.get_facecolor()).upper() for bar in drawn[1].patches]
    assert bars == [semanticfl, moon, moon]


def test_a_single_method_has_no_gains(finished_grid, tmp_path):
    pytest.importorskip("matplotlib")
    comparison = compare(*finished_grid({"fedavg": {"iid": [[0.5]]}}))
    write(comparison, tmp_path)
    assert not list(tmp_path.glob("gains.*"))
    assert (tmp_path / "curves.png").exists(), "one seed: a line without a band"
