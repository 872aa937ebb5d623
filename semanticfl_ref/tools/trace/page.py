"""A watched round as one HTML page; its text is in round.html.jinja."""

from itertools import groupby
from pathlib import Path

from semanticfl_ref.storage import write_atomic
from semanticfl_ref.tools.trace.pictures import anchor_pictures, stage_picture
from semanticfl_ref.tools.trace.text import render_round
from semanticfl_ref.tools.trace.trace import TracedRound


def write_page(path: Path, traced: TracedRound) -> None:
    """Write the page, or leave nothing.

    Raises:
        DataError: the file cannot be written.
    """
    dataset, method = traced.context.dataset, traced.context.config.federation.method
    labels = dataset.train_labels[traced.shown_B].tolist()
    page = render_round(
        "round.html.jinja",
        traced.document,
        title=f"One round of {method}, statement by statement",
        labels=[dataset.class_names[label] for label in labels],
        stages=traced.stages,
        anchors=anchor_pictures(traced.context),
        stage_picture=stage_picture,
        folded=folded,
    )
    write_atomic(path, page, "choose another place for the page")


def folded(steps: list[dict]) -> list[tuple[bool, list[dict]]]:
    """Consecutive steps that call for an equation, and those between, which are folded."""
    groups = groupby(steps, key=lambda step: bool(step["equations"]))
    return [(shown, list(part)) for shown, part in groups]
