"""`runs`: a table of the runs in a folder, or all their metrics as CSV."""

import csv
import json
import sys
from pathlib import Path
from statistics import fmean

from semanticfl_ref.commands.output import show
from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.formatting import format_percent
from semanticfl_ref.run.folder import METRICS, RunFolder
from semanticfl_ref.run.summary import LAST
from semanticfl_ref.storage import user_path

HELP = "list: a table of the runs in a folder; csv: the metrics of all their rounds"
COLUMNS = ("run", "method", "data", "scenario", "seed", "rounds", "last", "last_five", "state")


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["list", "csv"], metavar="list|csv")
    parser.add_argument(
        "folder",
        type=user_path,
        nargs="?",
        default=Path("runs"),
        metavar="FOLDER",
        help="run folder, or folder with run folders at any depth (default: runs)",
    )


def run(arguments) -> int:
    folder = arguments.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    found = [RunFolder(file.parent) for file in sorted(folder.rglob("config.toml"))]
    if arguments.what == "list":
        rows = [_described(each) for each in found]
        return show({"runs": rows}, arguments.json, lambda document: _table(document["runs"]))
    lines = []
    for each in found:
        named = _named(each, each.config("runs csv"))
        lines += [named | flat(line) for line in _rounds(each)]
    if arguments.json:
        return show({"rounds": lines}, True, str)
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return 0


def _named(folder: RunFolder, config: Config) -> dict:
    """What tells a run from others."""
    return {
        "run": str(folder.path),
        "method": config.federation.method,
        "data": config.data.name,
        "scenario": config.partition.scenario,
        "seed": config.run.seed,
    }


def _rounds(folder: RunFolder) -> list[dict]:
    rounds = folder.rounds()
    if not all(isinstance(line, dict) and "test_accuracy" in line for line in rounds):
        raise DataError(f"{folder.path / METRICS} is not what a run writes: restore or remove it")
    return rounds


def _described(folder: RunFolder) -> dict:
    """A row of the table; of a folder that cannot be read, with the reason as its state."""
    try:
        config, rounds = folder.config("runs list"), _rounds(folder)
    except UserError as error:
        return dict.fromkeys(COLUMNS) | {"run": str(folder.path), "state": str(error)}
    known = [line["test_accuracy"] for line in rounds if line["test_accuracy"] is not None]
    accuracies = known[-LAST:]
    return _named(folder, config) | {
        "rounds": f"{len(rounds)} of {config.federation.rounds}",
        "last": accuracies[-1] if accuracies else None,
        "last_five": fmean(accuracies) if accuracies else None,
        "state": "finished" if folder.finished else "unfinished",
    }


def _table(rows: list[dict]) -> str:
    shares = {"last", "last_five"}
    texts = [
        [format_percent(row[c]) if c in shares else str(row[c] or 0) for c in COLUMNS]
        for row in rows
    ]
    texts.insert(0, [name.replace("_", " ") for name in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


def flat(line: dict, prefix: str = "") -> dict:
    """The values of a line by dotted name; lists as JSON."""
    values = {}
    for key, value in line.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return values
