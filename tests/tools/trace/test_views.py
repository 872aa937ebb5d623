"""A watched round as its readers see it: on the page and in the terminal."""

import base64
import contextlib
import html
import io
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image
from rounds import parsed, steps_of

from semanticfl_ref import cli
from semanticfl_ref.commands.trace import PROMPT, SMALL
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.tools.trace import trace
from semanticfl_ref.tools.trace.syntax import pieces
from semanticfl_ref.tools.trace.text import blocks, has_colours


class Page(HTMLParser):
    """What a page loads, what it shows before one unfolds anything, that tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.targets, self.ids = [], {}, set(), set()
        self.classes, self.folded, self.labels, self.visible, self.style = [], [], [], "", ""
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
        group = self.folded if "details" in self.open else self.classes
        group += attributes.get("class", "").split()
        assert tag not in ("script", "link", "iframe", "object", "embed")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
            return
        if "details" not in self.open or "summary" in self.open:
            self.visible += data
        if self.open[-1:] == ["th"] and data.strip():
            self.labels.append(data.strip())


def test_a_method_without_anchors_has_no_diffusion_pass(tmp_path):
    page = tmp_path / "round.html"
    flags = ["--method", "fedavg", "--set", "model.width=4", "--html", str(page)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["trace", *flags, "--json"]) == 0
    document = parsed(out.getvalue())
    assert document["diffusion_pass"] == [] and "noised-latent" not in document["equations"]
    assert document["before"] == []
    captions = Page(page.read_text(encoding="utf-8")).images
    assert captions and all(caption.startswith("image: ") for caption in captions)


def test_the_page_loads_nothing_and_shows_every_picture(default):
    text = default.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|url\(|@import", text)
    assert page.targets == {*(f"#turn-{n}" for n in range(5)), "#results"}
    assert {target[1:] for target in page.targets} <= page.ids
    kinds = {
        "image: ": (4, 32),
        "VAE latent: ": (4, 17),
        "noised latent, t = 20: ": (4, 17),
        "U-Net mid: ": (4, 14),
        "pooled mid: ": (4, 1),
        "anchor: ": (4, 1),
        "visual anchors: ": (10, 6),
        "text anchor: ": (10, 1),
    }
    for start, (count, height) in kinds.items():
        captions = [caption for caption in page.images if caption.startswith(start)]
        shown = [source for caption in captions for source in page.images[caption]]
        assert len(shown) == count, start
        for source in shown:
            encoded = source.removeprefix("data:image/png;base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
            picture.load()
            assert picture.height == height
            assert len(picture.getcolors(2**16)) > 10, "there is something to see"
    data = re.sub(r"<[^>]+>", "", text)
    for word in (
        "consistency",
        "loss",
        "order_M",
        "&lt;- w - eta v",
        *default.document["letters"].values(),
    ):
        assert word in data


def test_images_and_anchors_are_labelled_by_class(default):
    page = Page(default.page.read_text(encoding="utf-8"))
    seen = trace.trace_round(resolve(SMALL), images=8, round=1, offline=True, say=lambda text: None)
    dataset = seen.context.dataset
    names = [dataset.class_names[int(label)] for label in dataset.train_labels[seen.shown_B]]
    start = page.labels.index(names[0])
    assert page.labels[start : start + len(names)] == names
    for name in dataset.class_names:
        assert f"visual anchors: {name}" in page.images and f"text anchor: {name}" in page.images
        assert name in page.labels


def test_the_page_folds_what_carries_no_equation(default):
    page = Page(default.page.read_text(encoding="utf-8"))
    steps = default.document["before"] + steps_of(default.document)
    with_equation = [step for step in steps if step["equations"]]
    assert page.classes.count("step") == len(with_equation) < 20
    assert page.folded.count("step") == len(steps) - len(with_equation) > 100
    for equation in default.document["equations"].values():
        assert equation["text"].splitlines()[0] in page.visible
    assert len(page.visible.split()) < 1500, "a few screens"
    for kind in ("keyword", "string", "number"):
        assert (page.classes + page.folded).count(kind) > 10
        assert page.style.count(f"--{kind}: #") == 2, "light and dark"
        assert f"pre .{kind} {{ color: var(--{kind}); }}" in page.style


def test_source_is_coloured_and_stays_as_it_is(default):
    shown = re.findall(r"<pre>(.*?)</pre>", default.page.read_text(encoding="utf-8"), re.DOTALL)
    shown = {html.unescape(re.sub(r"<[^>]+>", "", source)) for source in shown}
    for step in default.document["before"] + steps_of(default.document):
        assert "".join(text for _, text in pieces(step["source"])) == step["source"]
        assert step["source"] in shown
    source = 'if x and f("a") == 1.5:  # why'
    kinds = [(kind, text) for kind, text in pieces(source) if kind]
    expected = [("keyword", "if"), ("keyword", "and"), ("string", '"a"'), ("number", "1.5")]
    assert kinds == [*expected, ("comment", "# why")]
    source = "g(b'#', r\"it's\", 1e-6 - x_1, y1, 0.5)  # if 'a'"
    strings = [("string", "b'#'"), ("string", 'r"it\'s"')]
    numbers = [("number", "1e-6"), ("number", "0.5")]
    kinds = [(kind, text) for kind, text in pieces(source) if kind]
    assert kinds == [*strings, *numbers, ("comment", "# if 'a'")]
    multi = 'f(\n    f"{x:.1f} of",\n    None,\n)'
    assert "".join(text for _, text in pieces(multi)) == multi
    assert ("keyword", "None") in list(pieces(multi))


def test_the_page_is_never_overwritten(default, capsys):
    before = default.page.read_bytes()
    assert cli.main(["trace", "--html", str(default.page)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert default.page.read_bytes() == before


@pytest.mark.parametrize("everything", [False, True])
def test_the_terminal_has_a_hundred_columns_and_colours_only_where_asked(
    default, monkeypatch, everything
):
    plain, coloured = (
        "\n".join(blocks(default.document, everything=everything, colours=colours))
        for colours in (False, True)
    )
    assert max(map(len, plain.splitlines())) <= 100 and "\033" not in plain
    assert "\033[36m" in coloured and "\033[35m" in coloured
    assert re.sub(r"\033\[[0-9;]*m", "", coloured) == plain
    stream = SimpleNamespace(isatty=lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colours(stream) and not has_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(stream)


def test_the_terminal_folds_what_carries_no_equation(default):
    document = default.document
    short = "\n".join(blocks(document))
    steps = {0: document["before"]} | {turn["number"]: turn["steps"] for turn in document["turns"]}
    hidden = [sum(not step["equations"] for step in steps[n]) for n in range(5)]
    folded = re.findall(r"^\((\d+) more statements: --all shows them\)$", short, re.MULTILINE)
    assert [int(n) for n in folded] == hidden
    assert short.count("\n") < 200 and "order_M" not in short
    long = "\n".join(blocks(document, everything=True))
    assert "--all" not in long and "order_M" in long
    for step in document["before"] + steps_of(document):
        assert step["source"].splitlines()[0] in long
        assert (step["source"].splitlines()[0] in short) or not step["equations"]
    for equation in document["equations"].values():
        assert f"({equation['tag']}) [{equation['source']}]" in short


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


@pytest.mark.parametrize(("until", "answer"), [(3, None), (3, "q"), (None, "")])
def test_each_step_waits_for_enter(default, monkeypatch, capsys, until, answer):
    """Until the input ends, q is entered, or all is shown."""
    waits = []

    def enter():
        waits.append(1)
        if len(waits) == until and answer is None:
            raise EOFError
        return answer if len(waits) == until else ""

    seen = SimpleNamespace(document=default.document)
    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(trace, "trace_round", lambda *_, **__: seen)
    assert cli.main(["trace", "--step"]) == 0
    shown = blocks(default.document)
    assert len(waits) == (until or len(shown))
    out, err = capsys.readouterr()
    assert out == "".join(f"{block}\n" for block in shown[:until])
    assert err.count(PROMPT) == len(waits) and PROMPT.strip() == "Enter: next step, q: quit"


def test_help_shows_the_values_that_will_be_used(capsys):
    def shown(*flags: str) -> str:
        with pytest.raises(SystemExit):
            cli.main(["trace", *flags, "--help"])
        return " ".join(capsys.readouterr().out.split())

    for name, value in SMALL.items():
        if name != "federation.local_epochs":
            assert f"({name}; default: {value})" in shown()
    assert "(federation.batch_size; default: 64)" in shown("--set", "federation.batch_size=64")
