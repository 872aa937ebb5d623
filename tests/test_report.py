"""`report`: pages that stand alone, of finished, interrupted, damaged and hostile run folders."""

import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from semanticfl_ref import cli

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = {
    "src",
    "href",
    "xlink:href",
    "srcset",
    "data",
    "action",
    "poster",
    "background",
    "formaction",
}


class Page(HTMLParser):
    """What a page holds; fails on an element that is not closed where it should be."""

    def __init__(self, file: Path):
        super().__init__()
        self.open, self.tags, self.references, self.words = [], [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "left open"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in LOADING]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folder(unbroken_run, tmp_path) -> Path:
    """A copy of the small run, to be spoilt."""
    return Path(shutil.copytree(unbroken_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def drawn(unbroken_run, tmp_path_factory) -> Path:
    """A copy of the small run with its report and figures, to be looked at."""
    pytest.importorskip("matplotlib")
    copy = Path(shutil.copytree(unbroken_run, tmp_path_factory.mktemp("drawn") / "run"))
    reported(copy)
    return copy


@pytest.fixture
def undrawn(monkeypatch):
    """Without matplotlib, which takes a second a page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def reported(folder: Path, *more: str) -> Page:
    assert cli.main(["report", str(folder), *more]) == 0
    return Page(folder / "report.html")


def refused(capsys, code: int, *arguments: str) -> str:
    assert cli.main(["report", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and "Traceback" not in err
    return err


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict], ending: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + ending)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_finished_run(drawn):
    page, last = Page(drawn / "report.html"), rows_of(drawn)[-1]
    assert (
        f"{last['test_accuracy']:.1%} after round 4 of 4" in page.text
        and "not finished" not in page.text
    )
    names = {file.stem for file in (drawn / "figures").iterdir()}
    assert {"accuracy", "partition", "clients", "terms", "bytes"} <= names
    assert {file.name for file in (drawn / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert page.tags.count("svg") == len(names) and "seven" in page.text
    changed, everything = page.text.split("All ")[0], page.text.split("All ")[1]
    assert (
        "model.width" in changed and "semantic.tau" not in changed and "semantic.tau" in everything
    )


def test_the_same_folder_gives_the_same_bytes_wherever_it_stands(drawn, tmp_path, capsys):
    first = {
        file.relative_to(drawn): file.read_bytes() for file in drawn.rglob("*") if file.is_file()
    }
    moved = Path(shutil.copytree(drawn, tmp_path / "elsewhere"))
    reported(moved, "--json")
    assert {
        file.relative_to(moved): file.read_bytes() for file in moved.rglob("*") if file.is_file()
    } == first
    assert json.loads(capsys.readouterr().out) == {
        "reports": [str(moved / "report.html")],
        "comparison": None,
        "figures": True,
        "unfinished": [],
    }


def test_a_page_loads_nothing(drawn):
    page, source = Page(drawn / "report.html"), (drawn / "report.html").read_text()
    assert page.references and all(
        reference.startswith(("#", "data:")) for reference in page.references
    ), page.references
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "http" not in source and "@import" not in source and "url(//" not in source


def test_an_interrupted_run(folder, capsys, undrawn):
    (folder / "summary.json").unlink()
    rows = rows_of(folder)
    write_rows(folder, rows[:2], ending='{"round": 3, "test_acc')  # killed while it wrote
    page = reported(folder, "--json")
    assert json.loads(capsys.readouterr().out)["unfinished"] == [str(folder)]
    assert (
        f"{rows[1]['test_accuracy']:.1%} after round 2 of 4" in page.text
        and "not finished: 2 of 4 rounds" in page.text
    )


def test_a_run_without_a_round(folder, capsys):
    (folder / "summary.json").unlink()
    write_rows(folder, [])
    assert "--resume" in refused(capsys, 2, str(folder)) and not (folder / "report.html").exists()


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
    assert words in refused(capsys, 3, str(folder)) and not (folder / "report.html").exists()


def test_rounds_that_are_missing_are_not_drawn_over(folder, capsys):
    rows = rows_of(folder)
    write_rows(folder, [rows[0], *rows[2:]])
    assert "metrics.jsonl" in refused(capsys, 3, str(folder))


def test_what_is_not_a_run(capsys, tmp_path):
    assert "no such run folder" in refused(capsys, 3, str(tmp_path / "absent"))
    assert "config.toml" in refused(capsys, 3, str(tmp_path))
    assert cli.main(["report"]) == 2


def test_nothing_that_a_folder_says_becomes_markup(folder):
    hostile = '<script>alert("1")</script> & $x$ $'
    names = [hostile, "a\ud800\x00b", "x" * 500, *map(str, range(7))]
    change(folder / "partition.json", class_names=names, scenario="<b>")
    change(
        folder / "summary.json",
        warnings=["<img src=http://x>"],
        confusion=[[5] * 10] * 10,
        class_accuracy=[0.5] * 10,
    )
    change(folder / "environment.json", command="<a href=x>", versions={"<i>": "</table>"})
    write_rows(folder, [{**row, "class_accuracy": [None, *[0.5] * 9]} for row in rows_of(folder)])
    page = reported(folder)
    assert not {"script", "b", "a", "img"} & set(page.tags)
    assert all(
        text in page.text
        for text in (hostile, "a\ufffd\ufffdb", "<img src=http://x>", "<a href=x>", "<i> </table>")
    )


def test_everything_that_a_round_may_record(folder):
    """With every key, and with the null that each may hold."""
    clients = len(rows_of(folder)[0]["client_accuracy"])
    more = {
        "terms": {"cross_entropy": 2.0, "contrast": 0.5},
        "gradient_share": {"cross_entropy": 0.75, "contrast": 0.25},
        "gradient_norm": {"cross_entropy": 3.0, "contrast": 1.0},
        "gradient_cosine": {"contrast": None},
        "class_accuracy": [None, *[0.5] * 9],
        "own_accuracy": [None, *[0.25] * (clients - 1)],
        "dropped": [1],
        "drift": {"update_norm": [None, 2.0], "mean_update_norm": 1.5, "update_alignment": None},
        "bytes": {
            "down": {"model": 7, "anchors": 5, "controls": 0},
            "up": {"model": 7, "anchors": 0, "controls": 0},
        },
    }
    rows = [{**row, **more} for row in rows_of(folder)]
    rows[0] = {
        **rows[0],
        "drift": {"update_norm": [None, None], "mean_update_norm": 0.0, "update_alignment": None},
    }
    write_rows(folder, rows)
    change(
        folder / "partition.json",
        corruptions=["grey", "blur", "noise"],
        modalities=["text", "visual", "neither"],
        dropped=[70, 7],
        kl=1.25,
    )
    change(
        folder / "summary.json",
        gradient_norm=more["gradient_norm"],
        gradient_cosine=more["gradient_cosine"],
        bytes=more["bytes"],
        confusion=[[3, 1] + [0] * 8] * 10,
        best_validation_round=3,
        test_accuracy_at_best_validation=0.4321,
        client_accuracy={"mean": 0.5, "worst_tenth": 0.1234, "std": 0.1},
        own_accuracy={"mean": 0.25, "worst_tenth": 0.25, "std": 0.0},
        to_accuracy=[
            {"accuracy": 0.1, "round": 2, "bytes": 2048},
            {"accuracy": 0.9, "round": None, "bytes": None},
        ],
        drift={"update_norm": 2.0, "mean_update_norm": 1.5, "update_alignment": None},
    )
    page = reported(folder)
    assert all(
        text in page.text
        for text in (
            "43.2%",
            "12.3%",
            "2.0 KiB",
            "(dropped: 1)",
            "no test image",
            "taken for zero (",
            "Drift",
            "anchors 5 B",
            "noise neither",
            "77 images belong",
            "KL 1.25",
        )
    ), page.text


def test_a_term_that_only_some_rounds_have(folder):
    """Where clients get different anchors, the first round's and the last one's clients may have
    none of a term's.
    """
    pytest.importorskip("matplotlib")
    rows = rows_of(folder)
    middle = {
        "terms": {"cross_entropy": 2.0, "contrast": 0.5},
        "gradient_share": {"cross_entropy": 0.75, "contrast": 0.25},
    }
    write_rows(folder, [rows[0], {**rows[1], **middle}, {**rows[1], "round": 3}])
    assert (
        "contrast" in reported(folder).text
        and "contrast" in (folder / "figures" / "terms.svg").read_text()
    )


def test_without_matplotlib_the_tables_come(folder, capsys, undrawn):
    page = reported(folder)
    assert (
        "pip install matplotlib" in capsys.readouterr().err
        and "pip install matplotlib" in page.text
    )
    assert (
        "svg" not in page.tags
        and not (folder / "figures").exists()
        and f"{rows_of(folder)[1]['test_accuracy']:.1%}" in page.text
    )


def test_a_report_that_cannot_be_written_leaves_the_old_one(folder, capsys, undrawn):
    reported(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "report.html.part").mkdir()
    write_rows(folder, rows_of(folder)[:2])
    capsys.readouterr()
    assert (
        "report.html" in refused(capsys, 3, str(folder))
        and (folder / "report.html").read_bytes() == before
    )


def test_several_runs_on_one_page(folder, tmp_path, capsys):
    other = Path(shutil.copytree(folder, tmp_path / "deep" / "the other #1"))
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(
        config.replace("learning_rate = 0.1", "learning_rate = 0.125")
    )
    out = tmp_path / "all.html"
    assert cli.main(["report", str(folder), str(other), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"] == str(out)
    page = Page(out)
    assert {
        (tmp_path / unquote(reference)).resolve()
        for reference in page.references
        if not reference.startswith(("#", "data:"))
    } == {folder / "report.html", other / "report.html"}
    assert (
        "federation.learning_rate 0.1 0.125" in page.text
        and "the other #1" in page.text
        and "model.width" not in page.text
    )


def test_a_page_of_several_needs_several_and_a_place(folder, tmp_path, capsys):
    assert "compares several" in refused(capsys, 2, str(folder), "--out", str(tmp_path / "x.html"))
    assert ".html" in refused(capsys, 2, str(folder), str(folder), "--out", str(tmp_path / "x.txt"))
    assert "folder that exists" in refused(
        capsys, 2, str(folder), str(folder), "--out", str(tmp_path / "absent" / "x.html")
    )
    assert not (folder / "report.html").exists()


def test_a_partition_is_drawn_to_scale():
    pytest.importorskip("matplotlib")
    from semanticfl_ref.tools.report.figures import partition_figure

    axes = partition_figure({"histograms": [[3, 0, 2], [0, 4, 0]]}, ["a", "b", "c"]).axes[0]
    heights = [
        [patch.get_data().values[client] - patch.get_data().baseline[client] for client in (0, 2)]
        for patch in axes.patches
    ]
    assert heights == [[3, 0], [0, 4], [2, 0]]
    crowd = partition_figure({"histograms": [[3, 0, 2]] * 101}, ["a", "b", "c"]).axes[0]
    assert not crowd.patches and crowd.images[0].get_array().shape == (3, 101)


def test_a_run_of_a_method_that_is_not_imported(capsys, tmp_path):
    (tmp_path / "config.toml").write_text('[federation]\nmethod = "fedhalf"\n[fedhalf]\nnu = 0.5\n')
    assert "'fedhalf'" in (said := refused(capsys, 2, str(tmp_path))) and "--import" in said
