"""`report`: pages that stand alone, of finished, interrupted and hostile run folders."""

import json
import secrets
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from run_files import change, read, refused, rows_of, write_rows

from semanticfl_ref import cli

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
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


@pytest.fixture(scope="module")
def drawn(unbroken_run, tmp_path_factory) -> Path:
    """A copy of the small run with its report and figures, to be read."""
    pytest.importorskip("matplotlib")
    copy = Path(shutil.copytree(unbroken_run, tmp_path_factory.mktemp("drawn") / "run"))
    reported(copy)
    return copy


def reported(folder: Path, *more: str) -> Page:
    assert cli.main(["report", str(folder), *more]) == 0
    return Page(folder / "report.html")


def files_in(folder: Path) -> dict[Path, bytes]:
    return {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_a_finished_run(drawn):
    page, last = Page(drawn / "report.html"), rows_of(drawn)[-1]
    assert f"{last['test_accuracy']:.1%} after round 4 of 4" in page.text
    assert "not finished" not in page.text
    names = {file.stem for file in (drawn / "figures").iterdir()}
    assert {"accuracy", "partition", "clients", "terms", "bytes"} <= names
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {file.name for file in (drawn / "figures").iterdir()} == expected
    assert page.tags.count("svg") == len(names) and "seven" in page.text
    changed, everything = page.text.split("All ")
    assert "model.width" in changed
    assert "semanticfl.tau" not in changed and "semanticfl.tau" in everything


def test_the_main_settings_and_the_chance_level_are_at_the_top(folder, undrawn):
    config = (folder / "config.toml").read_text()
    config = config.replace('method = "fedavg"', 'method = "fedprox"')
    (folder / "config.toml").write_text(config.replace("mu = 0.01", "mu = 0.0625"))
    top = reported(folder).text.split("last round")[0]
    for text in (
        "chance level 10.0%",
        "method fedprox",
        "data set digits",
        "scenario nid1, alpha 0.3",
        "clients 3, 2 per round",
        "rounds 4",
        "local epochs 1",
        "batch size 32",
        "learning rate 0.1",
        "fedprox. mu 0.0625",
    ):
        assert text in top, (text, top)


def test_the_mean_names_the_rounds_that_it_is_of(folder, undrawn):
    page = reported(folder)
    mean = read(folder / "summary.json")["test_accuracy_last_five"]
    assert f"mean of the last 4 rounds {mean:.1%}" in page.text


def test_figures_are_in_per_cent_with_the_chance_level(drawn):
    for name in ("accuracy", "bytes"):
        text = (drawn / "figures" / f"{name}.svg").read_text()
        assert ">80%<" in text and ">chance level, 1/10<" in text
    for name in ("classes", "clients", "confusion", "gradient_share"):
        assert ">80%<" in (drawn / "figures" / f"{name}.svg").read_text()


def test_the_same_folder_gives_the_same_bytes_wherever_it_stands(drawn, tmp_path, capsys):
    first = files_in(drawn)
    moved = Path(shutil.copytree(drawn, tmp_path / "elsewhere"))
    reported(moved, "--json")
    assert files_in(moved) == first
    assert json.loads(capsys.readouterr().out) == {
        "reports": [str(moved / "report.html")],
        "comparison": None,
        "figures": True,
        "unfinished": [],
    }


def test_a_page_loads_nothing(drawn):
    page, source = Page(drawn / "report.html"), (drawn / "report.html").read_text()
    assert page.references
    for reference in page.references:
        assert reference.startswith(("#", "data:")), reference
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "http" not in source and "@import" not in source and "url(//" not in source


def test_an_interrupted_run(folder, capsys, undrawn):
    (folder / "summary.json").unlink()
    rows = rows_of(folder)
    write_rows(folder, rows[:2], ending='{"round": 3, "test_acc')  # killed while it wrote
    page = reported(folder, "--json")
    assert json.loads(capsys.readouterr().out)["unfinished"] == [str(folder)]
    assert f"{rows[1]['test_accuracy']:.1%} after round 2 of 4" in page.text
    assert "not finished: 2 of 4 rounds" in page.text
    assert "mean of the last 2 rounds" in page.text


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
    for text in (hostile, "a\ufffd\ufffdb", "<img src=http://x>", "<a href=x>", "<i> </table>"):
        assert text in page.text


def test_the_command_can_be_pasted(folder, undrawn):
    command = "python -m semanticfl_ref train --set 'diffusion.prompt=a photo of a {}' --out 'a b'"
    change(folder / "environment.json", command=command)
    reported(folder)
    source = (folder / "report.html").read_text()
    assert f"<pre>{command.replace(chr(39), '&#39;')}</pre>" in source


def test_a_resumed_run_names_each_start_and_what_changed(folder, undrawn):
    now = read(folder / "environment.json")
    first = {
        **now,
        "command": "python -m semanticfl_ref train --out x",
        "commit": "cafe",
        "threads": 7,
        "versions": {**now["versions"], "torch": "2.12.0"},
        "last_round": 1,
    }
    second = {**first, "command": "python -m semanticfl_ref train --resume x", "last_round": 3}
    last = {"command": "python -m semanticfl_ref train --resume y", "commit": "beef"}
    change(folder / "environment.json", earlier=[first, second], **last)
    page = reported(folder)
    starts = page.text.split("Environment Command that started the run: ")[1]
    original, once, again = starts.split("python -m semanticfl_ref train ")[1:]
    assert original.startswith("--out x Resumed") and original.endswith(f"{second['date']} 2 ")
    assert once.startswith("--resume x nothing") and once.endswith(f"{now['date']} 4 ")
    assert again.startswith("--resume y ")
    changed, current = again.split("The environment since then:")
    torch = now["versions"]["torch"]
    for text in ("commit: cafe, now beef", "threads: 7, now 1", f"torch: 2.12.0, now {torch}"):
        assert text in changed, changed
    assert "commit beef" in current and f"date {now['date']}" in current


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
    still = {"update_norm": [None, None], "mean_update_norm": 0.0, "update_alignment": None}
    rows[0] = {**rows[0], "drift": still}
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
        cost_to_accuracy=[
            {"accuracy": 0.1, "round": 2, "bytes": 2048},
            {"accuracy": 0.9, "round": None, "bytes": None},
        ],
        drift={"update_norm": 2.0, "mean_update_norm": 1.5, "update_alignment": None},
    )
    page = reported(folder)
    for text in (
        "43.2%",
        "12.3%",
        "Cost to reach an accuracy",
        "2.0 KiB",
        "(dropped: 1)",
        "no test image",
        "taken for zero (",
        "drift",
        "anchors 5 B",
        "noise neither",
        "77 images are unused",
        "KL divergence 1.25",
    ):
        assert text in page.text, (text, page.text)


def test_a_term_that_only_some_rounds_have(folder):
    """Where clients receive different anchors, the first round's and the last one's clients may
    have none of a term's.
    """
    pytest.importorskip("matplotlib")
    rows = rows_of(folder)
    middle = {
        "terms": {"cross_entropy": 2.0, "contrast": 0.5},
        "gradient_share": {"cross_entropy": 0.75, "contrast": 0.25},
    }
    write_rows(folder, [rows[0], {**rows[1], **middle}, {**rows[1], "round": 3}])
    assert "contrast" in reported(folder).text
    assert "contrast" in (folder / "figures" / "terms.svg").read_text()


def test_of_many_clients_those_with_the_lowest_accuracy_are_listed(folder, undrawn):
    accuracies = [1.0, *[0.5] * 20, 0.25, *[0.75] * 20]
    counts = [1] * 10
    change(
        folder / "partition.json",
        sizes=[10] * len(accuracies),
        histograms=[counts] * len(accuracies),
    )
    write_rows(folder, [{**row, "client_accuracy": accuracies} for row in rows_of(folder)])
    text = reported(folder).text
    assert "The 40 of 42 clients with the lowest accuracy" in text
    table = text.split("client images classes accuracy ")[1].split(" Classes ")[0].split()
    assert table[::4] == [str(m) for m in range(1, 41)] and "100.0%" not in table


def test_without_matplotlib_the_tables_come(folder, capsys, undrawn):
    page = reported(folder)
    assert "pip install matplotlib" in capsys.readouterr().err
    assert "pip install matplotlib" in page.text
    assert "svg" not in page.tags and not (folder / "figures").exists()
    assert f"{rows_of(folder)[1]['test_accuracy']:.1%}" in page.text


def test_a_report_that_cannot_be_written_leaves_the_old_one(folder, capsys, undrawn, monkeypatch):
    reported(folder)
    before = (folder / "report.html").read_bytes()
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0")
    (folder / "report.html.0.part").mkdir()
    write_rows(folder, rows_of(folder)[:2])
    capsys.readouterr()
    assert "report.html" in refused(capsys, 3, str(folder))
    assert (folder / "report.html").read_bytes() == before


def test_several_runs_on_one_page(folder, tmp_path, capsys):
    other = Path(shutil.copytree(folder, tmp_path / "deep" / "the other #1"))
    config = (other / "config.toml").read_text()
    config = config.replace("learning_rate = 0.1", "learning_rate = 0.125")
    (other / "config.toml").write_text(config)
    out = tmp_path / "all.html"
    assert cli.main(["report", str(folder), str(other), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"] == str(out)
    page = Page(out)
    linked = {
        (tmp_path / unquote(reference)).resolve()
        for reference in page.references
        if not reference.startswith(("#", "data:"))
    }
    assert linked == {folder / "report.html", other / "report.html"}
    assert "federation.learning_rate 0.1 0.125" in page.text and "the other #1" in page.text
    assert "federation.local_epochs 1 1" in page.text and "model.width" not in page.text


def test_a_page_of_several_needs_several_and_a_place(folder, tmp_path, capsys):
    assert "compares several" in refused(capsys, 2, str(folder), "--out", str(tmp_path / "x.html"))
    for name, words in (("x.txt", ".html"), ("absent/x.html", "folder that exists")):
        out = str(tmp_path / name)
        assert words in refused(capsys, 2, str(folder), str(folder), "--out", out)
    assert not (folder / "report.html").exists()
