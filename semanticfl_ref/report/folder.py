"""A run's folder: made whole or not at all, never overwritten, cut back to its checkpoint on a
resume.
"""

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from semanticfl_ref import config as configuration
from semanticfl_ref.config import Config
from semanticfl_ref.errors import DataError, MismatchError, UserError
from semanticfl_ref.storage import replace, write, writing

CHECKPOINT = "checkpoint.safetensors"
REMEDY = "free space or choose another --out"


def default_folder(config: Config) -> Path:
    """`runs/<dataset>-<method>-seed<seed>-<time>`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return (
        Path("runs")
        / f"{config.data.name}-{config.federation.method}-seed{config.run.seed}-{stamp}"
    )


def refuse_existing(folder: Path) -> None:
    """Raise before any work is done if `folder` exists or could not be made.

    Raises:
        UserError: it exists, or it lies where nothing can be written.
    """
    if os.path.lexists(folder):
        raise UserError(
            f"{folder} exists and is never overwritten: continue it with --resume {folder}, or choose another --out"
        )
    above = folder.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(
            f"cannot make the run folder {folder}: {above} is not a folder; choose another --out"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot make the run folder {folder}: no permission to write in {above}; choose another --out"
        )


def read_config(folder: Path, said: str = "--resume") -> Config:
    """The configuration that a run was started with. `said`: the word of the command line before
    the folder.

    Raises:
        DataError: no such folder, or it is not a run's. UserError: its method is one from outside
            the package, and was not imported.
    """
    if not folder.is_dir():
        raise DataError(f"{said} {folder}: no such run folder")
    if not (folder / "config.toml").is_file():
        raise DataError(f"{said} {folder}: it holds no config.toml, so it is not a run folder")
    settings = configuration.read_toml(folder / "config.toml")
    if settings.get("federation.method", "fedavg") not in configuration.METHODS:
        raise UserError(
            f"{said} {folder}: its method {settings['federation.method']!r} is not in the package: add --import with the file that it came from"
        )
    return configuration.build(settings)


class RunFolder:
    """The files of one run. Lines of metrics.jsonl and timings.jsonl are on the disk before the
    checkpoint that counts them.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, config: Config, documents: dict[str, dict]) -> "RunFolder":
        """Make the folder with config.toml and one JSON file per entry of `documents`, under a
        temporary name that is then changed.

        Raises:
            UserError: the folder exists, or cannot be written.
        """
        with writing(path, REMEDY):
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            with writing(path, REMEDY):
                write(staging / "config.toml", configuration.to_toml(config))
                for name, document in documents.items():
                    write(staging / name, _json(document))
                for name in ("metrics.jsonl", "timings.jsonl"):
                    write(staging / name, "")
                staging.chmod(0o755)
            refuse_existing(path)
            with writing(path, REMEDY):
                os.rename(staging, path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return cls(path)

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    def append(self, metrics: dict, seconds: float) -> None:
        """One line for a round in metrics.jsonl and one in timings.jsonl, flushed to the disk.

        Raises:
            DataError: the disk is full or the file cannot be written; what was there stays.
        """
        for name, line in (
            ("metrics.jsonl", metrics),
            ("timings.jsonl", {"round": metrics["round"], "seconds": round(seconds, 4)}),
        ):
            with (
                writing(self.path / name, REMEDY),
                open(self.path / name, "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def cut_back(self, rounds: int) -> None:
        """Keep the first `rounds` lines: what a killed run wrote after its checkpoint is played
        again.

        Raises:
            MismatchError: a file holds fewer lines than the checkpoint has rounds, or other rounds.
        """
        for name in ("metrics.jsonl", "timings.jsonl"):
            path = self.path / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = lines[:rounds]
            if _rounds(kept) != list(range(1, rounds + 1)):
                raise MismatchError(
                    f"{path} does not hold rounds 1 to {rounds} of its checkpoint: it was changed; start again with another --out"
                )
            if len(lines) != rounds:
                replace(self.path / name, b"".join(kept), REMEDY)

    def rows(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [
            json.loads(line)
            for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    def seconds(self) -> float:
        """The rounds' wall time in all, whatever was killed and resumed in between."""
        lines = (self.path / "timings.jsonl").read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line)["seconds"] for line in lines)

    def read(self, name: str) -> dict:
        """A JSON file of the folder; DataError if it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read {self.path / name}: {getattr(error, 'strerror', None) or error}"
            ) from None

    def finish(self, summary: dict) -> None:
        """Write summary.json: its presence says that the run is finished."""
        replace(self.path / "summary.json", _json(summary), REMEDY)

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()


def _json(document: dict) -> str:
    """Indented, and a list of plain values on one line, so that a matrix looks like one. In a text
    a line break is written \\n: those found are the indentation's.
    """
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    return (
        re.sub(
            r"\[\n([^\[\]{}]*)\n *\]",
            lambda values: "[" + re.sub(r"\n +", " ", values[1].lstrip()) + "]",
            text,
        )
        + "\n"
    )


def _rounds(lines: list[bytes]) -> list[int] | None:
    try:
        return [json.loads(line)["round"] for line in lines]
    except (ValueError, KeyError, TypeError):
        return None
