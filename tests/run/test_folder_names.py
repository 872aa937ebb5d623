"""A name of the program's own choice never collides; what was reserved in vain does not stay."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semanticfl_ref import cli
from semanticfl_ref.errors import DataError
from semanticfl_ref.run.folder import reserve


def test_everyone_gets_a_folder_of_their_own(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "name-2").write_text("a file of the user's")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: reserve(tmp_path / "runs" / "name"), range(8)))
    assert sorted(folder.name for folder in made) == ["name", *(f"name-{n}" for n in range(3, 10))]
    assert not any(list(folder.iterdir()) for folder in made)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(DataError, match="choose another --out"):
        reserve(tmp_path / "runs" / "name")


def test_a_run_takes_the_next_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    flags = ["train", "--dataset", "digits", "--method", "fedavg", "--rounds", "1"]
    flags += ["--local-epochs", "1", "--width", "2"]
    assert cli.main([*flags, "--set", "run.device=cuda"]) in (0, 2)
    for path in Path("runs").glob("*"):  # with a GPU, it was trained
        path.rename(tmp_path / path.name)
    Path("runs/digits-fedavg-seed0-now").mkdir(parents=True)
    assert cli.main(flags) == 0, capsys.readouterr().err
    assert Path("runs/digits-fedavg-seed0-now-2/summary.json").is_file()
