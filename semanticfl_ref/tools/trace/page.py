"""A watched round as one HTML page; its text is in round.html.jinja."""

from itertools import groupby
from pathlib import Path

from semanticfl_ref.storage import write_atomic
from semanticfl_ref.tools.report.page import render
from semanticfl_ref.tools.trace import text
from semanticfl_ref.tools.trace.pictures import anchor_pictures, stage_picture
from semanticfl_ref.tools.trace.syntax import pieces
from semanticfl_ref.tools.trace.trace import TracedRound


def write_page(path: Path, traced: TracedRound) -> None:
    """Write the page, or leave nothing.

    Raises:
        DataError: the file cannot be written.
    """
    dataset = traced.context.dataset
    labels = dataset.train_labels[traced.shown_B].tolist()
    page = render(
        Path(__file__).parent,
        "round.html.jinja",
        f"One round of {traced.document['settings']['federation.method']}, statement by statement",
        document=traced.document,
        labels=[dataset.class_names[label] for label in labels],
        stages=traced.stages or {"image": dataset.train_images[traced.shown_B]},
        anchors=anchor_pictures(traced.context),
        stage_picture=stage_picture,
        folded=folded,
        pieces=pieces,
        text=text,
    )
    write_atomic(path, page, "choose another place for the page")


def folded(steps: list[dict]) -> list[tuple[bool, list[dict]]]:
    """Consecutive steps that call for an equation, and those between, which are folded."""
    groups = groupby(steps, key=lambda step: bool(step["equations"]))
    return [(shown, list(part)) for shown, part in groups]
