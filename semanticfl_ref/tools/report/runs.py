"""Recorded runs: what a run folder says, read without torch."""

import contextlib
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.run.folder import METRICS, TIMINGS, RunFolder
from semanticfl_ref.run.summary import summarise


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recorded run.

    Attributes:
        path: of its folder.
        config: the configuration.
        environment, partition, anchors: the JSON documents of these names.
        rows: the lines of metrics.jsonl, at least one.
        summary: of these rounds.
        finished: whether all rounds are done.
        class_names: C printable names.
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
    def method(self) -> str:
        return self.config.federation.method

    @property
    def rounds(self) -> list[int]:
        return [row["round"] for row in self.rows]

    @property
    def sent(self) -> list[float]:
        """MiB sent up to each round, both ways."""
        return list(accumulate((row["bytes_down"] + row["bytes_up"]) / 2**20 for row in self.rows))


def read_run(path: Path) -> Run:
    """Read the folder of a run, finished or not.

    Raises:
        DataError: it is not a run folder, or a file of it is damaged.
        UserError: no round is finished yet, or the method was not imported.
    """
    folder = RunFolder(path)
    config, rows = folder.config("report"), _lines(path / METRICS)
    if not rows:
        raise UserError(
            f"{path} has no finished round, so there is nothing to report: wait for the first, or "
            f"continue the run with train --resume {path}"
        )
    summary = _summary(path, rows)
    documents = {name: _document(folder, name) for name in ("environment", "partition", "anchors")}
    names = documents["partition"].get("class_names")
    if not names:
        raise DataError(f"{path / 'partition.json'} lacks class_names: it was changed or damaged")
    return Run(
        path=path,
        config=config,
        rows=rows,
        summary=_document(folder, "summary") if folder.finished else summary,
        finished=folder.finished,
        class_names=list(map(printable, names)),
        **documents,
    )


def printable(text: str) -> str:
    """The text with a replacement character for each that cannot be printed."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _lines(path: Path) -> list:
    """The JSON values of the lines; a last line without its end is still being written."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None


def _summary(path: Path, rows: list[dict]) -> dict:
    """The summary of these rounds; raises DataError if a row is not a round's."""
    seconds = sum(timing["seconds"] for timing in _lines(path / TIMINGS)[: len(rows)])
    with contextlib.suppress(KeyError, TypeError):
        if [row["round"] for row in rows] == list(range(1, len(rows) + 1)):
            return summarise(rows, seconds, {})
    raise DataError(
        f"{path / METRICS} does not hold a run's rounds, one per line, from 1 on: it was changed "
        f"or damaged"
    )


def _document(folder: RunFolder, name: str) -> dict:
    document = folder.read(f"{name}.json")
    if not isinstance(document, dict):
        raise DataError(
            f"{folder.path / name}.json does not hold a JSON object: it was changed or damaged"
        )
    return document
