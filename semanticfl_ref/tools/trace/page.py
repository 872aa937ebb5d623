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
    document, dataset = traced.document, traced.context.dataset
    stages = traced.stages or {"image": dataset.train_images[traced.shown_B]}
    page = render(
        Path(__file__).parent,
        "round.html.jinja",
        f"One round of {document['settings']['federation.method']}, statement by statement",
        document=document,
        turns=[
            {**turn, "groups": _folded(turn["steps"])} for turn in text.numbered_turns(document)
        ],
        stages=list(stages),
        images=[
            (dataset.class_names[int(dataset.train_labels[n])], map(stage_picture, values))
            for n, *values in zip(traced.shown_B, *stages.values(), strict=True)
        ],
        anchors=anchor_pictures(traced.context),
        tables=text.tables(document),
        text=text,
        pieces=pieces,
    )
    write_atomic(path, page, "choose another place for the page")


def _folded(steps: list[dict]) -> list[tuple[bool, list[dict]]]:
    """Consecutive steps that call for an equation, and those between, which are folded."""
    groups = groupby(steps, key=lambda step: bool(step["equations"]))
    return [(shown, list(part)) for shown, part in groups]
