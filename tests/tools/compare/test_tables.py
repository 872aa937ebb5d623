"""What a comparison shows: the Markdown's numbers, a line of CSV per run, equal figures."""

import csv
import io
import sys
from itertools import pairwise

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
    assert "| fedavg | 55.0 ± 7.1 | 55.0 ± 7.1 | 13.8 ± 1.8 | 80 B |  |  |  |  |  |" in text, "iid"
    assert "| +15.0 | too few seeds for an interval |  |  | 2 of 2 |" in text
    assert "Intervals and p values need 5 seeds." in text
    assert "± is the sample standard deviation over seeds." in text
    assert "| mean of the last 5 |" in text
    assert "**all scenarios**" in text
    assert "in %; seeds: 2, rounds: 5." in text
    assert "2.13.0" in text
    assert text.endswith("    python -m semanticfl_ref compare")


def test_an_entry_with_a_name_is_called_by_it_and_spelled_out_once(finished_grid):
    entry = "slow=fedavg[federation.learning_rate=0.01]"
    text = markdown(compare(*finished_grid({entry: TWO["fedavg"], "moon": TWO["semanticfl"]})))
    assert "| slow | 55.0 ± 7.1 |" in text and "| difference to slow |" in text
    assert text.count(entry) == 1 and f"\n\n- `{entry}`\n\n" in text
    assert "[federation" not in text.replace(entry, "") and "- `moon" not in text


FIVE = {
    "fedavg": {"iid": [[0.5]] * 5, "nid2": [[0.4]] * 5},
    "moon": {"iid": [[0.51], [0.52], [0.53], [0.54], [0.55]], "nid2": [[0.4]] * 5},
    "semanticfl": {"iid": [[0.6], [0.5], [0.7], [0.6], [0.6]], "nid2": [[0.5]] * 5},
}


def test_markdown_of_five_seeds_by_hand(finished_grid):
    """MOON's differences are 1 to 5, see test_statistics.py; over both scenarios half of that.
    SemanticFL's to MOON: 9, -2, 17, 6, 5; mean 7, standard error sqrt(47.5 / 5) = 3.08.
    """
    pytest.importorskip("scipy")
    text = markdown(compare(*finished_grid(FIVE)))
    assert "| +3.0 | +1.0 to +5.0 | 0.013 | 0.026 | 5 of 5 |" in text
    assert "| +1.5 | +0.5 to +2.5 | 0.013 | 0.013 | 5 of 5 |" in text
    assert (
        "The winner, semanticfl, against the runner-up, moon: +7.0 (95 % interval -1.6 to +15.6, "
        "p 0.086), wins 4 of 5."
    ) in text
    words = " ".join(text.split())
    assert "Student's t, degrees of freedom: 4; exact for normally distributed" in words
    assert "Holm's p values are adjusted for the number of differences in the table" in words
    assert "each seed's values are averaged over the scenarios first" in words
    assert "The scenarios are fixed (iid, nid2): intervals and p values are about further" in words
    assert "tends to be overstated" in words
    assert "too few seeds" not in text and "SciPy" not in text


def test_without_scipy_the_table_says_so(finished_grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    text = markdown(compare(*finished_grid(FIVE)))
    assert "| +3.0 | not computed: SciPy is missing |  |  | 5 of 5 |" in text
    assert "moon: +7.0 (not computed: SciPy is missing), wins 4 of 5." in text
    assert "Intervals and p values need SciPy: pip install scipy" in text


def test_a_single_method_or_scenario_is_told_nothing_of_others(finished_grid):
    text = markdown(compare(*finished_grid({"fedavg": {"iid": [[0.5]] * 5}})))
    assert "averaged over the scenarios" not in text
    assert "winner" not in text and "Intervals" not in text and "interval of" not in text


def test_warnings_are_shown_with_their_runs(finished_grid):
    text = markdown(compare(*finished_grid(TWO, warnings=["negligible: raise it", "a stand-in"])))
    runs = "; ".join(
        f"semanticfl, {scenario}, seed {seed}" for seed in (0, 1) for scenario in ("iid", "nid2")
    )
    assert f"\n\nWarnings of the runs:\n\n- negligible: raise it ({runs})\n- a stand-in (" in text
    assert "Warnings" not in markdown(compare(*finished_grid({"moon": {"iid": [[0.5]]}})))


def test_one_seed_has_no_deviation(finished_grid):
    text = markdown(compare(*finished_grid({"fedavg": {"iid": [[0.5]]}, "moon": {"iid": [[0.6]]}})))
    assert "| moon | 60.0 | 60.0 | 15.0 | 16 B | +10.0 | too few seeds for an interval |" in text
    assert "|  |  | 1 of 1 |" in text
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


def test_gains_have_an_interval_only_where_there_is_one(finished_grid):
    """Beside the line at zero, the dots of each method, and with five seeds its interval."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    for accuracies, lines in ((TWO, 1 + 1), (FIVE, 1 + 2 * 2)):
        axis = gains_figure(compare(*finished_grid(accuracies))).axes[0]
        assert len(axis.get_lines()) == lines


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


LONG = "moon[moon.mu=1;moon.tau=0.25;federation.learning_rate=0.01]"


def test_long_and_short_names_of_methods_in_figures(finished_grid):
    """Every line has its label, and the axes keep their place."""
    pytest.importorskip("matplotlib")
    accuracies = {"fedavg": {"iid": [[0.5]]}, f"tuned={LONG}": {"iid": [[0.6]]}, LONG: {}}
    accuracies[LONG] = {"iid": [[0.6]]}
    comparison = compare(*finished_grid(accuracies))
    figure = curves_figure(comparison)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == sorted(["fedavg", "tuned", "moon[mu=1;tau=0.25;learning…"])
    heights = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    assert all(b - a > 0.2 for a, b in pairwise(heights)), "labels are apart"
    low, high = figure.axes[0].get_ylim()
    assert high - low >= 5, "one seed's noise is not blown up"
    assert "one seed" in figure.axes[0].get_ylabel()
    for drawn in (figure, gains_figure(comparison)):
        drawn.draw_without_rendering()
        assert drawn.axes[0].get_position().width > 0.4
    assert "seeds: 1" in gains_figure(comparison).get_supxlabel()
    assert len(comparison.results) == 3


def test_ours_stands_out(finished_grid):
    pytest.importorskip("matplotlib")
    widths = [
        line.get_linewidth()
        for accuracies in (TWO, {"fedavg": {"iid": [[0.5]]}, "moon": {"iid": [[0.4]]}})
        for line in curves_figure(compare(*finished_grid(accuracies))).axes[0].get_lines()
    ]
    assert [width > 2 for width in widths] == [False, True, True, False], "else the best"
