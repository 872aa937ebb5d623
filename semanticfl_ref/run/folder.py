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
    canonical_json,
    described,
    file_sha256,
    flock,
    remove_parts,
    write_atomic,
    write_errors,
    write_flushed,
)

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
# What the end of a run seals; the checkpoint has a digest of its own.
DOCUMENTS = ("config.toml", "identity.json", "partition.json", "anchors.json", "environment.json")
RESULTS = (*DOCUMENTS, METRICS, TIMINGS)
SEAL = "# SHA-256 of the lines above: "
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


def stopping_point(config: Config) -> tuple[int, int]:
    """What decides after which round a run ends: the number of rounds, and the patience."""
    return config.federation.rounds, config.run.patience


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
        texts |= {"config.toml": _sealed_toml(config), METRICS: "", TIMINGS: ""}
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
    def best(self) -> Path:
        """The model of the best validation round, with `run.patience`."""
        return self.path / "best.safetensors"

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def config(self, flag: str = "--resume") -> Config:
        """The configuration that the run was started with.

        Args:
            flag: what precedes the folder in messages.

        Raises:
            DataError: there is no such folder, or it is not a run's; or its configuration is
                damaged, or names a method that was not imported.
        """
        named = f"{flag} {self.path}"
        if not self.path.is_dir():
            raise DataError(f"{named}: there is no such run folder")
        file = self.path / "config.toml"
        if not file.is_file():
            raise DataError(f"{named}: there is no config.toml in it, so it is not a run folder")
        try:
            return resolve(read_toml(file))
        except DataError:
            raise
        except UserError as error:
            problem = str(error).partition(";")[0]  # without the guess at another name
            raise DataError(
                f"{file}: {problem}; restore the file, or if a file registers it, add --import FILE"
            ) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing into the folder; ends with the process at the latest.

        A comparison's folder is held in the same way.

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
        """Give a run another stopping point; it is not finished until it is there.

        Raises:
            UserError: the run has more rounds already.
        """
        done, asked = len(self.rounds()), config.federation.rounds
        if asked < done:
            raise UserError(f"{self.path} has {done} rounds already: --rounds {asked} is fewer")
        (self.path / "summary.json").unlink(missing_ok=True)
        write_atomic(self.path / "config.toml", _sealed_toml(config), REMEDY)

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

    def truncate(self, rounds: int) -> None:
        """Keep the first `rounds` lines: what follows the checkpoint is run again."""
        for name in (METRICS, TIMINGS):
            path = self.path / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            if len(lines) > rounds:
                write_atomic(path, b"".join(lines[:rounds]), REMEDY)

    def add_environment(self, environment: dict, round: int) -> None:
        """Replace environment.json; the previous one moves to "earlier", with its last round."""
        before = self.environment()
        earlier = [*before.pop("earlier", []), {**before, "last_round": round}]
        document = _json({**environment, "earlier": earlier})
        write_atomic(self.path / "environment.json", document, REMEDY)

    def rounds(self) -> list[dict]:
        """The lines of metrics.jsonl; see `read`."""
        return self._read(METRICS, _lines)

    def seconds(self) -> float:
        """Total wall time of the rounds; without the lines of timings.jsonl that are damaged."""
        total = 0.0
        with suppress(OSError):
            for line in (self.path / TIMINGS).read_bytes().splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    total += json.loads(line)["seconds"]
        return total

    def environment(self) -> dict:
        """environment.json; empty if it is damaged, since it only informs."""
        try:
            return self.read("environment.json")
        except DataError:
            return {}

    def write_again(self, documents: dict[str, dict]) -> None:
        """Replace documents, by file name: what is there may be damaged."""
        for name, document in documents.items():
            write_atomic(self.path / name, _json(document), REMEDY)

    def summary(self) -> dict:
        """The summary of a finished run."""
        return self.read("summary.json")

    def read(self, name: str) -> dict:
        """A JSON file of the folder.

        Raises:
            DataError: it is missing or damaged.
        """
        document = self._read(name, json.loads)
        if not isinstance(document, dict):
            raise DataError(f"{self.path / name} is not what a run writes: it was changed")
        return document

    def finish(self, summary: dict) -> None:
        """Write summary.json: its presence means that the run is finished; it seals the results."""
        files = {name: self.path / name for name in RESULTS}
        sealed = {name: file_sha256(path) for name, path in files.items() if path.is_file()}
        document = {**summary, "sealed": sealed}
        document["sha256"] = _digest(document)
        write_atomic(self.path / "summary.json", _json(document), REMEDY)

    def verify(self) -> None:
        """Check that the files are what the run wrote.

        Of a finished run, those are all files but the checkpoint; of another one the configuration,
        and the lines of metrics that the checkpoint counts.

        Raises:
            MismatchError: names the file that was changed or is missing.
            DataError: a file cannot be read.
        """
        changed = self._changed_of_finished() if self.finished else self._changed_of_unfinished()
        for name in changed:
            raise MismatchError(f"{self.path / name} was changed: restore it, or train again")

    def _changed_of_finished(self) -> Iterator[str]:
        summary = self.summary()
        # An earlier version wrote neither.
        if summary.get("sha256", _digest(summary)) != _digest(summary):
            yield "summary.json"
        for name, sha256 in summary.get("sealed", {}).items():
            path = self.path / name
            if not path.is_file() or file_sha256(path) != sha256:
                yield name

    def _changed_of_unfinished(self) -> Iterator[str]:
        settings, mark, sha256 = self._read("config.toml", str).rpartition(SEAL)
        if mark and sha256.strip() != hashlib.sha256(settings.encode()).hexdigest():
            yield "config.toml"
        if not self.checkpoint.is_file():
            return
        try:
            with open(self.checkpoint, "rb") as file:
                about = described(file)
            rounds, seal = about["round"], about["seal"]
            lines = self._read(METRICS, str.encode).splitlines(keepends=True)[:rounds]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return  # of a damaged checkpoint, its reader tells more
        if len(lines) < rounds or reduce(_sealed, lines, "") != seal:
            yield METRICS

    def _read(self, name: str, parse: Callable[[str], object]):
        try:
            return parse((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {self.path / name}: {reason}") from None


def _sealed(seal: str, line: bytes) -> str:
    """The seal of one more line."""
    return hashlib.sha256(seal.encode() + line).hexdigest()


def _digest(document: dict) -> str:
    """SHA-256 of a JSON document without the entry that holds it."""
    text = canonical_json({key: value for key, value in document.items() if key != "sha256"})
    return hashlib.sha256(text.encode()).hexdigest()


def _sealed_toml(config: Config) -> str:
    text = to_toml(config)
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _lines(text: str) -> list[dict]:
    """The JSON values of the lines; a last line without its end is still being written."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _json(document: dict) -> str:
    """Indented JSON, with lists of plain values on one line."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    # In a JSON string a line break is written \n: those found here are the indentation's.
    plain_list = r"\[\n[^\[\]{}]*\n *\]"
    return re.sub(plain_list, lambda found: json.dumps(json.loads(found[0])), text) + "\n"
