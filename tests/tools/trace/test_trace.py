"""A round watched on the embedded default: it is the real one, told in order, and it follows the
code.
"""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from semanticfl_ref import cli
from semanticfl_ref.commands.trace import SMALL
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.federated.context import make_context, new_state
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.run.setup import build_anchors, load_data
from semanticfl_ref.tools.trace import trace, words
from semanticfl_ref.tools.trace.values import describe

ROOT = Path(__file__).parent.parent.parent
STORY = (ROOT / "semanticfl_ref" / "federated" / "round.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Feature caches of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def default(cache, tmp_path_factory):
    """`trace --json --html` with nothing else: the document and the page."""
    out, page = io.StringIO(), tmp_path_factory.mktemp("page") / "round.html"
    with contextlib.redirect_stdout(out):
        assert cli.main(["trace", "--json", "--html", str(page), "--offline"]) == 0
    return SimpleNamespace(
        document=json.loads(
            out.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
        ),
        page=page,
    )


def watched(method: str, round: int = 1, **settings):
    """A narrow model's round of a method: the configuration, document and context."""
    settled = config.build({**SMALL, "model.width": 4, "federation.method": method, **settings})
    return settled, *trace.observe(settled, images=6, round=round, offline=True, say=lambda _: None)


def steps_of(document):
    return [step for turn in document["turns"] for step in turn["steps"]]


def made(document, function, name):
    return next(
        value
        for step in steps_of(document)
        if step["function"] == function
        for value in step["values"]
        if value["name"] == name
    )


def test_all_four_turns_in_order_as_the_source_numbers_them(default):
    turns = default.document["turns"]
    assert [(turn["number"], turn["title"]) for turn in turns] == [
        (int(n), title) for n, title in re.findall(r"^ +# (\d)\. (.*)$", STORY, re.M)
    ]
    assert [turn["number"] for turn in turns] == [1, 2, 3, 4]
    own = [
        [step["line"] for step in turn["steps"] if step["function"] == "run_round"]
        for turn in turns
    ]
    assert all(own) and sum(own, []) == sorted(sum(own, [])), (
        "the round's own statements, from its first line to its last"
    )
    inside = [{step["function"] for step in turn["steps"]} for turn in turns]
    assert (
        "by_sample_count" in inside[0]
        and {"train_client", "objective", "semantic_terms", "contrast"} <= inside[1]
        and {"Aggregator.add", "Aggregator.finish"} <= inside[2]
    )
    assert {"make_anchors", "pca"} <= {step["function"] for step in default.document["before"]}


def test_every_statement_stands_where_it_says(default):
    for step in default.document["before"] + steps_of(default.document):
        lines = (
            (
                ROOT
                / ("semanticfl_ref" if not step["file"].startswith("kernels") else ".")
                / step["file"]
            )
            .read_text(encoding="utf-8")
            .splitlines()
        )
        assert lines[step["line"] - 1].strip() == step["source"].splitlines()[0].strip()


def test_a_loop_shows_its_first_pass_and_counts_the_rest(default):
    loop = next(
        step
        for step in steps_of(default.document)
        if step["source"].startswith("for client, weight in")
    )
    assert (
        loop["iterations"] == 2
        and [value["value"] for value in loop["values"]] == [0, 8.0]
        and words.more(loop) == "... and 1 more in this call"
    )
    assert [step["source"] for step in steps_of(default.document)].count("optimizer.step()") == 1


def test_equations_stand_beside_the_statements_that_call_for_them(default):
    beside = {
        tag: step["source"] for step in steps_of(default.document) for tag in step["equations"]
    }
    assert (
        beside["local-step"] == "report = train_client(update)"
        and "objective(" in beside["objective"]
        and "consistency(" in beside["consistency"]
    )
    assert (
        beside["info-nce"] == "return info_nce(features_BD, text_CD, labels_B, tau)"
        and "average.finish()" in beside["average"]
    )
    assert set(beside) <= set(default.document["equations"])


@pytest.mark.parametrize(
    "method", ["semanticfl", "feddifrc", "fedprox", "moon", "fedrcl", "fedavg"]
)
def test_the_weighted_terms_sum_to_the_loss(method):
    """And the weights are the settings'; in the first round MOON's contrast of equal models is log
    2 and FedProx' distance zero.
    """
    settled, document, _ = watched(method)
    terms = {term["name"]: term for term in document["terms"]}
    o = settled
    weights = {
        "semanticfl": {"consistency": o.semantic.lambda_kd, "contrast": o.semantic.lambda_con},
        "feddifrc": {
            "noise_consistency": o.feddifrc.lambda_noise,
            "text_contrast": o.feddifrc.lambda_text,
        },
        "fedprox": {"proximal": o.fedprox.mu},
        "moon": {"model_contrast": o.moon.mu},
        "fedrcl": {"supervised_contrast": o.fedrcl.contrast, "divergence_penalty": o.fedrcl.beta},
        "fedavg": {},
    }[method]
    assert {name: term["weight"] for name, term in terms.items()} == {
        "cross_entropy": 1.0,
        **weights,
    }
    assert document["loss"] == pytest.approx(
        sum(term["weight"] * term["value"] for term in terms.values()), rel=1e-6
    )
    assert terms["cross_entropy"]["gradient_norm"] > 0
    expected = {"moon": ("model_contrast", 0.6931472), "fedprox": ("proximal", 0.0)}.get(method)
    assert expected is None or terms[expected[0]]["value"] == pytest.approx(expected[1], abs=1e-6)


def test_watching_changes_nothing_and_bytes_are_the_ledgers():
    settled, document, context = watched("semanticfl", round=2)
    dataset, partition, held = load_data(settled, True)
    again = make_context(
        settled,
        dataset,
        context.partition,
        build_anchors(settled, dataset, partition, held, True, lambda _: None),
    )
    first, line = run_round(new_state(again), again)
    second, line = run_round(first, again)
    assert document["metrics"] == line and sys.gettrace() is None
    assert (
        document["rows"][0] == describe("before", first.row)[0]
        and document["rows"][2] == describe("after", second.row)[0]
    )
    assert (document["bytes"]["down"], document["bytes"]["up"], document["bytes"]["anchors"]) == (
        line["bytes_down"],
        line["bytes_up"],
        0,
    ), "the anchors went out in round one"
    assert [client["client"] for client in document["clients"]] == line["clients"]


def test_anchors_cross_the_network_in_the_first_round(default):
    sent = default.document["bytes"]
    assert (
        sent["anchors"] == 2 * 4 * (8 * 96 + 10 * 64)
        and sent["down"] - sent["anchors"]
        == sent["up"]
        == 2 * 4 * default.document["rows"][0]["shape"][0]
    )


def test_what_a_method_remembers_is_seen_in_the_second_round():
    for round, still in ((1, True), (2, False)):
        _, document, _ = watched("scaffold", round)
        assert (made(document, "train_client", "correction_P")["norm"] == 0) is still
    _, document, _ = watched("moon", 2)
    assert {"received", "last"} == {
        value["name"].split("'")[1]
        for step in steps_of(document)
        if step["source"].startswith("frozen =")
        for value in step["values"]
    }


def test_it_follows_the_code(default, tmp_path):
    """A copy of the package, in which a line is put above a loss and above the first turn, and a
    statement and a turn are reworded.
    """
    for folder in ("semanticfl_ref", "kernels"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    edits = {
        "losses.py": [
            ('    if kind == "cosine":', '    # moved\n    if kind == "cosine":'),
            (", dim=1)).mean()", ", dim=1)).mean(dim=0)"),
        ],
        "round.py": [("    # 1. Server: choose", "\n    # 1. Server: draw")],
    }
    for name, changes in edits.items():
        path = tmp_path / "semanticfl_ref" / "federated" / name
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "semanticfl_ref", "trace", "--json", "--offline"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout)
    lines = [
        {
            (step["file"].rpartition("/")[2], step["source"]): step["line"]
            for step in steps_of(document)
        }
        for document in (default.document, moved)
    ]
    condition, choice = (
        ("losses.py", 'if kind == "cosine":'),
        next(key for key in lines[0] if key[1].startswith("everyone_M =")),
    )
    assert (
        lines[1][condition] == lines[0][condition] + 1 and lines[1][choice] == lines[0][choice] + 1
    )
    assert any("mean(dim=0)" in source for _, source in lines[1]) and moved["turns"][0][
        "title"
    ].startswith("Server: draw")
    assert moved["loss"] == pytest.approx(default.document["loss"], rel=1e-5)


class Page(HTMLParser):
    """Notes what a page loads, and that its tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.images, self.targets, self.ids = [], [], {}, set(), set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.ids.add(attributes.get("id"))
        if tag == "a":
            self.targets.add(attributes["href"])
        elif tag == "img":
            self.images.setdefault(attributes["alt"], []).append(attributes["src"])
        assert tag not in ("script", "link", "iframe", "object", "embed")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_shows_every_picture(default):
    text = default.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|url\(|@import", text)
    assert (
        page.targets == {f"#turn-{n}" for n in range(5)}
        and {target[1:] for target in page.targets} <= page.ids
    )
    kinds = {
        "image: ": (4, 32),
        "noised latent": (4, 32),
        "level mid": (4, 32),
        "Visual anchors": (1, 24),
        "Text anchors": (1, 10),
    }
    for start, (count, height) in kinds.items():
        shown = [
            source
            for caption, sources in page.images.items()
            if caption.startswith(start)
            for source in sources
        ]
        assert len(shown) == count, start
        for source in shown:
            picture = Image.open(
                io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))
            )
            picture.load()
            assert picture.height == height and len(picture.getcolors(2**16)) > 10, (
                "there is something to see"
            )
    data = re.sub(r"<[^>]+>", "", text)
    for word in (
        "consistency",
        "loss",
        "everyone_M",
        "&lt;- w - eta v",
        *default.document["letters"].values(),
    ):
        assert word in data


def test_the_page_is_never_overwritten(default, capsys):
    before = default.page.read_bytes()
    assert (
        cli.main(["trace", "--html", str(default.page)]) == 2
        and "is there already" in capsys.readouterr().err
    )
    assert default.page.read_bytes() == before


def test_a_method_without_anchors_shows_images_alone(tmp_path):
    assert (
        cli.main(
            [
                "trace",
                "--method",
                "fedavg",
                "--set",
                "model.width=4",
                "--html",
                str(tmp_path / "round.html"),
            ]
        )
        == 0
    )
    captions = Page((tmp_path / "round.html").read_text(encoding="utf-8")).images
    assert captions and all(caption.startswith("image: ") for caption in captions)


def test_the_terminal_has_a_hundred_columns_and_colours_only_where_asked(default, monkeypatch):
    plain, coloured = (
        "\n".join(words.blocks(default.document, colours)) for colours in (False, True)
    )
    assert max(map(len, plain.splitlines())) <= 100 and "\033" not in plain
    assert "\033[36m" in coloured and re.sub(r"\033\[[0-9;]*m", "", coloured) == plain
    stream = SimpleNamespace(isatty=lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert words.colourful(stream) and not words.colourful(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not words.colourful(stream)


@pytest.mark.parametrize(
    "flags",
    [
        ["--step"],
        ["--step", "--json"],
        ["--images", "0"],
        ["--round", "0"],
        ["--html", "absent/page.html"],
        ["--method", "fedavgg"],
    ],
)
def test_a_mistake_is_one_line(capsys, flags):
    """--step, too, where standard input is no terminal, as under pytest."""
    assert cli.main(["trace", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("semanticfl_ref: error: ")


@pytest.mark.parametrize("until", [3, None])
def test_each_step_waits_for_enter(default, monkeypatch, capsys, until):
    """Until the input ends, or all is shown."""
    waits = []

    def enter():
        waits.append(1)
        if len(waits) == until:
            raise EOFError

    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(trace, "observe", lambda *_, **__: (default.document, None))
    assert cli.main(["trace", "--step"]) == 0
    blocks = list(words.blocks(default.document, False))
    assert len(waits) == (until or len(blocks)) and capsys.readouterr().out == "".join(
        f"{block}\n" for block in blocks[:until]
    )


def test_values_that_are_no_numbers_are_words_in_json():
    (nan,), (empty,) = (
        describe("x", torch.tensor([1.0, float("nan")])),
        describe("y", torch.empty(0, 3)),
    )
    assert (nan["mean"], nan["first"]) == ("nan", [1.0, "nan"]) and empty == {
        "name": "y",
        "shape": [0, 3],
        "dtype": "float32",
        "first": [],
    }
    json.dumps([nan, empty], allow_nan=False)
