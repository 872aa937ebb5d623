"""`report` of folders that are damaged, empty or no run's: one line, and nothing is written."""

import pytest
from run_files import refused, rows_of, write_rows

from semanticfl_ref import cli


def test_a_run_without_a_round(folder, capsys):
    (folder / "summary.json").unlink()
    write_rows(folder, [])
    assert "--resume" in refused(capsys, 2, str(folder))
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metrics.jsonl", '{"round": 1}\n', "does not hold a run's rounds"),
        ("metrics.jsonl", "[1]\n", "does not hold a run's rounds"),
        ("metrics.jsonl", "{{\n", "cannot read"),
        ("partition.json", "[]", "partition.json"),
        ("partition.json", '{"histograms": []}', "partition.json"),
        ("anchors.json", "nothing", "anchors.json"),
        ("summary.json", "{", "summary.json"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, capsys, name, content, words):
    (folder / name).write_text(content)
    assert words in refused(capsys, 3, str(folder))
    assert not (folder / "report.html").exists()


def test_what_only_informs_does_not_stop_a_report(folder, undrawn):
    """Where nothing seals it: a damaged environment.json, and timings."""
    (folder / "environment.json").write_text("nothing")
    (folder / "timings.jsonl").write_text("{")
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


def test_rounds_that_are_missing_are_not_drawn_over(folder, capsys):
    rows = rows_of(folder)
    write_rows(folder, [rows[0], *rows[2:]])
    assert "metrics.jsonl" in refused(capsys, 3, str(folder))


@pytest.mark.parametrize("name", ["clients", "terms", "drift", "bytes", "client_accuracy"])
def test_a_round_that_lacks_something_is_damage(folder, capsys, name):
    first, *rows = rows_of(folder)
    del first[name]
    write_rows(folder, [first, *rows])
    assert "does not hold a run's rounds" in refused(capsys, 3, str(folder))


def test_what_is_not_a_run(capsys, tmp_path):
    assert "no such run folder" in refused(capsys, 3, str(tmp_path / "absent"))
    assert "config.toml" in refused(capsys, 3, str(tmp_path))
    assert cli.main(["report"]) == 2


def test_a_run_of_a_method_that_is_not_imported(capsys, tmp_path):
    (tmp_path / "config.toml").write_text('[federation]\nmethod = "fedhalf"\n[fedhalf]\nnu = 0.5\n')
    said = refused(capsys, 3, str(tmp_path))
    assert "'fedhalf.nu'" in said and "--import" in said
