"""Recorded runs: what a run folder says, read without torch."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.run.folder import METRICS, RunFolder
from semanticfl_ref.run.summary import evaluated, summarise

# What every line of metrics.jsonl has; own_accuracy is recorded with held-out images only.
RECORDED = {
    "round",
    "clients",
    "test_accuracy",
    "validation_accuracy",
    "class_accuracy",
    "client_accuracy",
    "loss",
    "terms",
    "gradient_share",
    "gradient_norm",
    "gradient_cosine",
    "steps",
    "bytes_down",
    "bytes_up",
    "bytes",
    "dropped",
    "drift",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recorded run.

    Attributes:
        path: the run folder.
        config: the configuration.
        environment, partition, anchors: the JSON documents of these names.
        rows: the evaluated lines of metrics.jsonl, at least one, see `evaluated`.
        summary: summary of these rounds.
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
        MismatchError: a file of a finished run was changed.
        UserError: no round is finished yet, or the method was not imported.
    """
    folder = RunFolder(path)
    config, rows, seconds = folder.config("report"), folder.rounds(), folder.seconds()
    folder.verify()
    numbers = [row["round"] for row in rows if isinstance(row, dict) and row.keys() >= RECORDED]
    if numbers != list(range(1, len(rows) + 1)):
        raise DataError(
            f"{path / METRICS} does not hold a run's rounds, one per line, from 1 on: it was "
            f"changed or damaged"
        )
    tested = evaluated(rows)
    if not tested:
        raise UserError(
            f"{path} has no evaluated round, so there is nothing to report: wait for the first, or "
            f"continue the run with train --resume {path}"
        )
    partition = folder.read("partition.json")
    try:
        names = [printable(name) for name in partition["class_names"]]
    except (KeyError, TypeError):
        raise DataError(
            f"{path / 'partition.json'} is not what a run writes: it was changed or damaged"
        ) from None
    return Run(
        path=path,
        config=config,
        environment=folder.environment(),
        partition=partition,
        anchors=folder.read("anchors.json"),
        rows=tested,
        summary=folder.summary() if folder.finished else summarise(rows, seconds, {}),
        finished=folder.finished,
        class_names=names,
    )


def printable(text: str) -> str:
    """The text with a replacement character for each that cannot be printed."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
