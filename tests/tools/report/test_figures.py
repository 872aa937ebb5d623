"""The figures of a report, to scale and in the colours of their methods."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.tools.report import drawing
from semanticfl_ref.tools.report.drawing import inline_svg, method_colour, plain, readable_names
from semanticfl_ref.tools.report.figures import comparison_figures, partition_figure, run_figures
from semanticfl_ref.tools.report.runs import read_run


@pytest.fixture(scope="module")
def run(unbroken_run):
    return read_run(unbroken_run)


def lines_of(figure) -> dict[str, tuple]:
    """Label -> colour and style of every line."""
    lines = figure.axes[0].lines
    return {line.get_label(): (line.get_color(), line.get_linestyle()) for line in lines}


def test_a_partition_is_drawn_to_scale():
    manifest = {"histograms": [[3, 0, 2], [0, 4, 0]]}
    axes = partition_figure(manifest, ["a", "b", "c"]).axes[0]
    # Between the two clients there is a gap.
    heights = [
        [patch.get_data().values[place] - patch.get_data().baseline[place] for place in (0, 2)]
        for patch in axes.patches
    ]
    assert heights == [[3, 0], [0, 4], [2, 0]]
    crowd = partition_figure({"histograms": [[3, 0, 2]] * 101}, ["a", "b", "c"]).axes[0]
    assert not crowd.patches and crowd.images[0].get_array().shape == (3, 101)


def test_a_method_has_one_colour_and_its_runs_differ_in_style(run):
    other = replace(run, config=resolve({"federation.method": "semanticfl"}))
    figures = comparison_figures({"a": run, "b": other, "c": run})
    fedavg, semanticfl = method_colour("fedavg"), method_colour("semanticfl")
    for figure in figures.values():
        lines = lines_of(figure)
        assert (lines["a"], lines["b"]) == ((fedavg, "-"), (semanticfl, "-"))
        assert lines["c"] == (fedavg, "--") and "chance level, 1/10" in lines
        assert figure.axes[0].get_ylim() == (0, 1)


def test_runs_without_validation_images_have_no_such_figure(run):
    rows = [{**row, "validation_accuracy": None} for row in run.rows]
    without = replace(run, rows=rows)
    assert comparison_figures({"a": without})["validation"] is None
    assert "a" not in lines_of(comparison_figures({"a": without, "b": run})["validation"])


def test_every_built_in_method_has_a_colour_of_its_own():
    own = [name for name, entry in METHODS.entries.items() if isinstance(entry.target, str)]
    assert len({method_colour(name) for name in own}) == len(own) == 9


def test_the_number_of_classes_sets_the_chance_level(run):
    figure = comparison_figures({"a": run, "b": replace(run, class_names=["x"] * 4)})["test"]
    levels = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert levels["chance level, 1/10"] == 0.1 and levels["chance level, 1/4"] == 0.25


def test_an_svg_takes_the_colours_of_its_page():
    svg = b'<?xml?><svg xmlns="http://a"><metadata>x</metadata><g id="a" style="stroke: #0072b2">'
    svg += b'<path fill="#ffffff" style="stroke: #123456"/></g></svg>'
    assert inline_svg(svg) == (
        '<svg><g style="stroke: var(--line-0)"><path style="fill: var(--ground)" '
        'style="stroke: #123456"/></g></svg>'
    )


def test_a_name_is_short_and_no_formula():
    assert plain("$x$") == r"\$x\$"
    assert plain("x" * 40) == "x" * 27 + "…"


def test_names_that_no_font_has_or_that_look_alike_are_numbered(monkeypatch):
    monkeypatch.setattr(drawing, "letters", lambda: set(map(ord, "abc …x")))
    assert readable_names(["a b", "c"]) == ["a b", "c"]
    assert readable_names(["a b", "\u732b"]) == ["0 a b", "1 \u732b"]
    assert readable_names(["x" * 30 + "a", "x" * 30 + "b"]) == [f"{n} {'x' * 27}…" for n in (0, 1)]
    assert readable_names(["a", "b"], numbered=True) == ["0 a", "1 b"]


def test_matplotlibs_own_font_has_latin_letters():
    assert drawing.font_families()[0] == "DejaVu Sans"
    assert drawing.letters().issuperset(map(ord, "abcXYZäéß0189_[=]"))


def test_many_classes_and_clients_are_maps_with_names():
    """Bars of fifty clients could not be told apart; a map grows with its rows."""
    few = {"histograms": [[1, 2]] * 3}
    many = {"histograms": [[1] * 30] * 50}
    assert not partition_figure(few, ["a", "b"]).axes[0].images
    figure = partition_figure(many, [f"class {c}" for c in range(30)])
    axes = figure.axes[0]
    assert axes.images
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "class 29"
    assert figure.get_figheight() > 30 * 0.14, "a line of text per class"


def test_long_names_are_numbered_below_the_confusion_matrix(run):
    long = [f"a name of many letters, {name}" for name in run.class_names]
    summary = {**run.summary, "confusion": [[1] * len(long)] * len(long)}
    axes = run_figures(replace(run, summary=summary, class_names=long))["confusion"].axes[0]
    assert axes.get_xlabel() == "predicted class, by number"
    assert axes.get_yticklabels()[0].get_text().startswith("0 a name of")
