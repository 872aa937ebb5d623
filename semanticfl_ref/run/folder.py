"""A run's folder: made completely or not at all, never overwritten, truncated on a resume.

No torch in here: the command line looks into run folders before it loads torch.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from itertools import chain, count
from pathlib import Path

from semanticfl_ref.config.resolve import read_toml, resolve, to_toml
from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import DataError, MismatchError, UserError
from semanticfl_ref.storage import (
    LOCK_EX,
    LOCK_NB,
    LOCKS,
    file_sha256,
    flock,
    remove_parts,
    write_atomic,
    write_errors,
    write_flushed,
)

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
# What a finished run is judged by; the other files only inform.
RESULTS = ("config.toml", "identity.json", "partition.json", "anchors.json", METRICS)
REMEDY = "free some disk space or choose another --out"


def default_folder(config: Config) -> Path:
    """`runs/<dataset>-<method>-seed<seed>-<time>`."""
    name = f"{config.data.name}-{config.federation.method}-seed{config.run.seed}"
    return Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def reserve(folder: Path) -> Path:
    """Make an empty folder of this name or, if it is taken, of the next: `-2`, `-3`, ...

    Raises:
        DataError: no folder can be made there.
    """
    others = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    with write_errors(folder, REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for free in chain([folder], others):
            with suppress(FileExistsError):
                free.mkdir()  # by one process only
                break
    return free


def refuse_existing(folder: Path) -> None:
    """Check before any work is done that `folder` can be made.

    Raises:
        UserError: it exists and is not empty, or nothing can be written there.
    """
    is_empty = folder.is_dir() and not folder.is_symlink() and not os.listdir(folder)
    if os.path.lexists(folder) and not is_empty:
        raise UserError(
            f"{folder} exists and is never overwritten: continue it with --resume {folder}, or "
            f"choose another --out"
        )
    parent = next(above for above in folder.absolute().parents if os.path.lexists(above))
    problem = None
    if not parent.is_dir():
        problem = f"{parent} is not a folder"
    elif not os.access(parent, os.W_OK | os.X_OK):
        problem = f"no permission to write in {parent}"
    if problem:
        raise UserError(f"cannot make the run folder {folder}: {problem}; choose another --out")


class RunFolder:
    """The files of one run.

    Lines of metrics.jsonl and timings.jsonl are on disk before the checkpoint that counts them.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, config: Config, documents: dict[str, dict]) -> "RunFolder":
        """Make the folder under a temporary name, then rename it.

        Args:
            path: the folder to make.
            config: written as config.toml.
            documents: file name -> JSON document.

        Raises:
            UserError: the folder exists, or cannot be written.
        """
        path = Path(path)
        texts = {name: _json(document) for name, document in documents.items()}
        texts |= {"config.toml": to_toml(config), METRICS: "", TIMINGS: ""}
        with write_errors(path, REMEDY):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as staging:
                made = Path(staging, "run")
                made.mkdir()
                for name, text in texts.items():
                    write_flushed(made / name, text)
                refuse_existing(path)
                if os.name == "nt" and path.is_dir():  # there no rename replaces an empty folder
                    path.rmdir()
                os.rename(made, path)
        return cls(path)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def config(self, flag: str = "--resume") -> Config:
        """The configuration that the run was started with.

        Args:
            flag: what precedes the folder in messages.

        Raises:
            DataError: there is no such folder, or it is not a run's.
            UserError: a setting is not admissible, as of a method that was not imported.
        """
        named = f"{flag} {self.path}"
        if not self.path.is_dir():
            raise DataError(f"{named}: there is no such run folder")
        if not (self.path / "config.toml").is_file():
            raise DataError(f"{named}: there is no config.toml in it, so it is not a run folder")
        settings = read_toml(self.path / "config.toml")
        try:
            return resolve(settings)
        except UserError as error:
            problem = str(error).partition(";")[0]  # without the guess at another name
            raise UserError(
                f"{named}: {problem}; if a file registers it, add --import FILE"
            ) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing into the folder; ends with the process at the latest.

        Raises:
            UserError: another process writes into it.
        """
        # The folder itself is locked: it is never replaced, as its files are. Windows opens none.
        descriptor = os.open(self.path if LOCKS else os.devnull, os.O_RDONLY)
        try:
            try:
                flock(descriptor, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process trains in {self.path}: wait for its end, or choose another "
                    f"--out"
                ) from None
            remove_parts(self.path)
            yield
        finally:
            os.close(descriptor)

    def reopen(self, config: Config) -> None:
        """Give a run another number of rounds; it is not finished until it has them.

        Raises:
            UserError: the run has more rounds already.
        """
        done, asked = len(self.rounds()), config.federation.rounds
        if asked < done:
            raise UserError(f"{self.path} has {done} rounds already: --rounds {asked} is fewer")
        (self.path / "summary.json").unlink(missing_ok=True)
        write_atomic(self.path / "config.toml", to_toml(config), REMEDY)

    def append(self, line: dict, seconds: float, seal: str = "") -> str:
        """Append a round's line of metrics and its time, flushed to disk.

        Returns:
            The seal of all lines of metrics, which continues that of the lines before.

        Raises:
            DataError: a file cannot be written; what was there stays.
        """
        timing = {"round": line["round"], "seconds": round(seconds, 4)}
        texts = {
            name: json.dumps(document, allow_nan=False) + "\n"
            for name, document in ((METRICS, line), (TIMINGS, timing))
        }
        for name, text in texts.items():
            path = self.path / name
            with write_errors(path, REMEDY), open(path, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        return _sealed(seal, texts[METRICS].encode())

    def truncate(self, rounds: int, seal: str) -> None:
        """Keep the first `rounds` lines: what follows the checkpoint is run again.

        Raises:
            MismatchError: a file has fewer lines than the checkpoint has rounds, or lines of
                metrics that the seal of the checkpoint does not know.
        """
        for name in (METRICS, TIMINGS):
            path = self.path / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = lines[:rounds]
            if len(kept) < rounds or (name == METRICS and reduce(_sealed, kept, "") != seal):
                raise MismatchError(
                    f"{path} does not hold rounds 1 to {rounds} of its checkpoint: it was changed; "
                    f"start again with another --out"
                )
            if len(lines) != rounds:
                write_atomic(path, b"".join(kept), REMEDY)

    def add_environment(self, environment: dict, round: int) -> None:
        """Replace environment.json; the previous one moves to "earlier", with its last round."""
        before = self.read("environment.json")
        earlier = [*before.pop("earlier", []), {**before, "last_round": round}]
        document = _json({**environment, "earlier": earlier})
        write_atomic(self.path / "environment.json", document, REMEDY)

    def rounds(self) -> list[dict]:
        """The lines of metrics.jsonl; see `read`."""
        return self._read(METRICS, _lines)

    def seconds(self) -> float:
        """Total wall time of the rounds; see `read`."""
        return sum(line["seconds"] for line in self._read(TIMINGS, _lines))

    def summary(self) -> dict:
        """The summary of a finished run."""
        return self.read("summary.json")

    def read(self, name: str) -> dict:
        """A JSON file of the folder.

        Raises:
            DataError: it is missing or damaged.
        """
        return self._read(name, json.loads)

    def finish(self, summary: dict) -> None:
        """Write summary.json: its presence means that the run is finished; it seals the results."""
        files = {name: self.path / name for name in RESULTS}
        sealed = {name: file_sha256(path) for name, path in files.items() if path.is_file()}
        write_atomic(self.path / "summary.json", _json({**summary, "sealed": sealed}), REMEDY)

    def verify(self) -> None:
        """Check that the results of a finished run are what its end left.

        Raises:
            MismatchError: names the file that was changed or is missing.
            DataError: the summary is damaged.
        """
        for name, sha256 in self.summary().get("sealed", {}).items():
            path = self.path / name
            if not path.is_file() or file_sha256(path) != sha256:
                raise MismatchError(f"{path} was changed after the run: restore it, or train again")

    def _read(self, name: str, parse: Callable[[str], object]):
        try:
            return parse((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {self.path / name}: {reason}") from None


def _sealed(seal: str, line: bytes) -> str:
    """The seal of one more line."""
    return hashlib.sha256(seal.encode() + line).hexdigest()


def _lines(text: str) -> list[dict]:
    """The JSON values of the lines; a last line without its end is still being written."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _json(document: dict) -> str:
    """Indented JSON, with lists of plain values on one line."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    # In a JSON string a line break is written \n: those found here are the indentation's.
    plain_list = r"\[\n[^\[\]{}]*\n *\]"
    return re.sub(plain_list, lambda found: json.dumps(json.loads(found[0])), text) + "\n"
