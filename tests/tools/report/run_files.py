"""The files of a run folder, to be read and changed; and a refusal of the command line."""

import json
from pathlib import Path

from semanticfl_ref import cli


def refused(capsys, code: int, *arguments: str) -> str:
    assert cli.main(["report", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and "Traceback" not in err
    return err


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict], ending: str = "") -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + ending)


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**read(file), **values}))
