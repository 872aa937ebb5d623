"""Recorded runs as pages: one self-contained report per run, and one page that compares several.

Equal folders give equal bytes. A page has what the run recorded; what it did not is left out.
"""

import os
from pathlib import Path

import numpy as np

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import setting_fields, to_flat
from semanticfl_ref.run.summary import LAST, names_in
from semanticfl_ref.storage import write_atomic, write_errors
from semanticfl_ref.tools.report.drawing import can_draw, encoded, inline_svg, save_figure
from semanticfl_ref.tools.report.figures import comparison_figures, run_figures
from semanticfl_ref.tools.report.page import render
from semanticfl_ref.tools.report.runs import Run, printable

REPORT = "report.html"
LISTED = 40  # clients or classes in a table; of more, those with the lowest accuracy


def write_report(run: Run) -> Path:
    """Write report.html into the run's folder, and its figures if matplotlib is installed.

    Raises:
        DataError: a file cannot be written; the old one stays.
    """
    folder, figures = run.path / "figures", {}
    if can_draw():
        with write_errors(folder):
            folder.mkdir(exist_ok=True)
        for name, figure in run_figures(run).items():
            svg = folder / f"{name}.svg"
            save_figure(figure, folder / f"{name}.png", svg)
            figures[name] = inline_svg(svg.read_bytes())
    data, last = run.config.data.name, run.rows[-1]
    return _write(
        run.path / REPORT,
        "run.html.jinja",
        f"{run.method} on {data}, seed {run.config.run.seed}",
        run=run,
        figures=figures,
        settings=to_flat(run.config),
        preset=to_flat(resolve({"data.name": data, "federation.method": run.method})),
        classes=_listed(last["class_accuracy"]),
        clients=_listed(last["client_accuracy"]),
        mistakes=_mistakes(run),
        terms=names_in(row["terms"] for row in run.rows),
    )


def write_comparison(runs: list[Run], file: Path) -> Path:
    """Write a page that lists several runs, where their settings differ, and their curves.

    Raises:
        DataError: the file cannot be written; the old one stays.
    """
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    named = dict(zip(map(printable, names), runs, strict=True))
    drawn = comparison_figures(named) if can_draw() else {}
    flat = [to_flat(run.config) for run in runs]
    return _write(
        file,
        "runs.html.jinja",
        f"{len(runs)} runs",
        runs=named,
        link=lambda run: os.path.relpath(run.path / REPORT, file.parent),
        figures={
            name: inline_svg(encoded(figure, "svg")) for name, figure in drawn.items() if figure
        },
        settings={name: [values[name] for values in flat] for name in flat[0]},
    )


def _write(file: Path, template: str, title: str, **context) -> Path:
    page = render(
        Path(__file__).parent,
        template,
        title,
        about=setting_fields(),
        last_rounds=LAST,
        **context,
    )
    write_atomic(file, page.encode("utf-8", "replace"), "choose another place for the page")
    return file


def _listed(accuracies: list[float | None]) -> list[int]:
    """The indices to list, ascending."""
    # None comes last.
    return sorted(np.argsort(np.array(accuracies, dtype=float)).tolist()[:LISTED])


def _mistakes(run: Run) -> list[tuple[int, str, str, int]]:
    """The eight most frequent mistakes: count, class, predicted class, images of the class."""
    found = [
        (count, run.class_names[actual], run.class_names[predicted], sum(row))
        for actual, row in enumerate(run.summary.get("confusion", []))
        for predicted, count in enumerate(row)
        if count and predicted != actual
    ]
    return sorted(found, reverse=True)[:8]
