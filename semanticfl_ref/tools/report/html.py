"""Run folders -> pages: one self-contained report for each, and one that compares several. Equal
folders give equal bytes.

Reads what a run wrote and nothing else. What a run did not record is left out of its page.
"""

import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from semanticfl_ref.config.settings import Config
from semanticfl_ref.config.settings import settings as configuration
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.run.folder import RunFolder, read_config
from semanticfl_ref.run.summary import recorded_names, summarise
from semanticfl_ref.storage import write_atomic, write_errors
from semanticfl_ref.tools.report.drawing import COLOURS, can_draw, encoded, save_figure
from semanticfl_ref.tools.report.page import page
from semanticfl_ref.formatting import format_bytes as size

REPORT, FIGURES = "report.html", "figures"
LISTED = 40  # clients or classes in a table; of more, those with the lowest accuracy
RECORDED = {
    "round",
    "clients",
    "test_accuracy",
    "validation_accuracy",
    "client_accuracy",
    "loss",
    "terms",
    "gradient_share",
    "steps",
    "bytes_down",
    "bytes_up",
}
# matplotlib's inks as the page's, so that a picture is light or dark with its page.
INKS = {
    "#000000": "currentColor",
    "#ffffff": "var(--ground)",
    "#b0b0b0": "var(--line)",
    **{colour.lower(): f"var(--line-{i})" for i, colour in enumerate(COLOURS[:-1])},
}
UNWANTED = r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"|(?<=<g) id=\"[^\"]*\"| (width|height)=\"[\d.]+pt\""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says. `summary` is of the rounds that are there; `finished` says whether
    all are.
    """

    path: Path
    config: Config
    environment: dict
    partition: dict
    anchors: dict
    rows: list[dict]
    summary: dict
    finished: bool
    class_names: list[str]

    @property
    def title(self) -> str:
        return f"{self.config.federation.method} on {self.config.data.name}, seed {self.config.run.seed}"


def read_run(path: Path) -> Run:
    """Read a run folder, of a finished run or of one that has come to some round.

    Raises:
        DataError: it is not a run folder, or a file of it is damaged. UserError: no round is
            finished yet.
    """
    config, folder = read_config(path, "report"), RunFolder(path)
    rows = _rows(path / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{path} has no finished round yet, so there is nothing to report: let it go on, or take it up with train --resume {path}"
        )
    documents = {
        name: folder.read(f"{name}.json") for name in ("environment", "partition", "anchors")
    }
    if folder.finished:
        summary = folder.read("summary.json")
    else:
        summary = summarise(
            rows,
            sum(timing["seconds"] for timing in _lines(path / "timings.jsonl")[: len(rows)]),
            {"warnings": []},
        )
    try:
        names = documents["partition"].get("class_names") or [
            f"class {c}" for c in range(len(documents["partition"]["histograms"][0]))
        ]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise DataError(
            f"{path / 'partition.json'} is not what a run writes: it was changed or damaged"
        ) from None
    return Run(
        path=path,
        config=config,
        rows=rows,
        summary=summary,
        finished=folder.finished,
        class_names=[_printable(name) for name in names],
        **documents,
    )


def write_report(run: Run) -> Path:
    """report.html in the run's folder, and its figures where matplotlib is there; what was there of
    them is replaced.

    Raises:
        DataError: a file cannot be written; each of them is whole or as it was.
    """
    figures = {}
    if can_draw():
        from semanticfl_ref.tools.report.figures import run_figures

        with write_errors(run.path / FIGURES):
            (run.path / FIGURES).mkdir(exist_ok=True)
        for name, figure in run_figures(
            run.rows, run.partition, run.class_names, run.summary.get("confusion")
        ).items():
            figures[name] = _drawn(
                figure, *(run.path / FIGURES / f"{name}.{kind}" for kind in ("png", "svg"))
            )
    settings, preset = (
        configuration.to_flat(run.config),
        configuration.to_flat(
            configuration.build(
                {
                    "data.name": run.config.data.name,
                    "federation.method": run.config.federation.method,
                }
            )
        ),
    )
    last = run.rows[-1]
    own = last.get("own_accuracy") or [None] * len(last["client_accuracy"])
    classes = [
        {"name": name, "accuracy": accuracy}
        for name, accuracy in zip(run.class_names, last.get("class_accuracy") or [])
    ]
    of_clients = enumerate(
        zip(last["client_accuracy"], own, run.partition["histograms"], strict=True)
    )
    clients = [
        {
            "name": m,
            "accuracy": accuracy,
            "own": kept,
            "images": sum(held),
            "classes": sum(n > 0 for n in held),
        }
        for m, (accuracy, kept, held) in of_clients
    ]
    return _write(
        run.path / REPORT,
        run.title,
        "run",
        run=run,
        s=run.summary,
        figures=figures,
        settings=settings,
        about=configuration.settings(),
        classes=_listed(classes),
        clients=_listed(clients),
        changed={name: preset[name] for name in settings if settings[name] != preset[name]},
        confused=_confused(run.summary.get("confusion"), run.class_names),
        terms=recorded_names([row["terms"] for row in run.rows]),
    )


def write_comparison(runs: list[Run], file: Path) -> Path:
    """One page that lists several runs, the settings in which they differ, and their curves in the
    same pictures.

    Raises:
        DataError: the file cannot be written.
    """
    names = [run.path.name for run in runs]
    names = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    named = {_printable(name): run for name, run in zip(names, runs, strict=True)}
    figures = {}
    if can_draw():
        from semanticfl_ref.tools.report.figures import accuracy_figure, bytes_figure

        curves = {name: run.rows for name, run in named.items()}
        figures = {"test": _drawn(accuracy_figure(curves)), "bytes": _drawn(bytes_figure(curves))}
        validated = {
            name: rows
            for name, rows in curves.items()
            if rows[-1]["validation_accuracy"] is not None
        }
        if validated:
            figures["validation"] = _drawn(accuracy_figure(validated, "validation_accuracy"))
    flat = {name: configuration.to_flat(run.config) for name, run in named.items()}
    differing = [
        setting
        for setting in configuration.settings()
        if len({str(values[setting]) for values in flat.values()}) > 1
    ]
    links = {name: os.path.relpath(run.path / REPORT, file.parent) for name, run in named.items()}
    return _write(
        file,
        f"{len(runs)} runs",
        "runs",
        runs=named,
        links=links,
        figures=figures,
        flat=flat,
        differing=differing,
    )


def _write(file: Path, title: str, template: str, **context) -> Path:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=size,
        words=lambda name: name.replace("_", " "),
        percent=lambda share: "" if share is None else f"{share:.1%}",
        short=lambda x: "" if x is None else f"{x:.4g}",
    )
    body = environment.get_template(f"{template}.html.jinja").render(
        colours=COLOURS, can_draw=can_draw(), **context
    )
    write_atomic(
        file,
        page(_printable(title), body).encode("utf-8", "replace"),
        "choose another place for the page",
    )
    return file


def _drawn(figure, *files: Path) -> str:
    """Write the figure's files; returns it as SVG to stand inside a page, in the page's inks."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph", category=UserWarning
        )  # a letter that the font lacks is drawn as a box
        save_figure(figure, *files)
        text = (
            files[-1].read_bytes() if files else encoded(figure, "svg")
        ).decode()  # the SVG, which is not drawn again
    text = re.sub(UNWANTED, "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'fill="(#[0-9a-f]{6})"', r'style="fill: \1"', text
    )  # an attribute takes no variable of the page
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda colour: INKS.get(colour[0], colour[0]), text)


def _rows(path: Path) -> list[dict]:
    rows = _lines(path)
    if any(not isinstance(row, dict) or not set(row) >= RECORDED for row in rows) or [
        row["round"] for row in rows
    ] != list(range(1, len(rows) + 1)):
        raise DataError(
            f"{path} does not hold a run's rounds, one a line, from 1 on: it was changed or damaged"
        )
    return rows


def _lines(path: Path) -> list:
    """JSON values, one a line; a last line without its end is still being written, and left out."""
    try:
        return [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")
        ]
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None


def _listed(items: list[dict]) -> list[dict]:
    return (
        items
        if len(items) <= LISTED
        else sorted(items, key=lambda item: 2 if item["accuracy"] is None else item["accuracy"])[
            :LISTED
        ]
    )


def _confused(confusion: list[list[int]] | None, names: list[str]) -> list[tuple]:
    """The eight most frequent mistakes: true class, what it was taken for, how often, and of how
    many.
    """
    pairs = [
        (names[t], names[p], n, sum(row))
        for t, row in enumerate(confusion or [])
        for p, n in enumerate(row)
        if t != p and n
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))[:8]


def _printable(name) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(name))
