"""Scenarios through the command line: shown, drawn, saved, loaded, trained; the server's cache holds
what the clients hold.
"""

import importlib.util
import json
import shlex

import pytest
from processes import JOB

from semanticfl_ref import cli
from semanticfl_ref.commands.flags import settle
from semanticfl_ref.run import setup as prepare

DIGITS = ["--dataset", "digits", "--clients", "4", "--clients-per-round", "2"]
EVERYTHING = [
    "--set",
    "partition.imbalance=5",
    "--set",
    "partition.features=corruption",
    "--set",
    "partition.modality=mixed",
]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed here"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))


def shown(capsys, *flags):
    assert cli.main(["partition", "show", *DIGITS, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_shown_with_all_that_tells_clients_apart(capsys):
    told = shown(capsys, *EVERYTHING)
    assert (
        sum(told["sizes"]) + sum(told["dropped"]) == 450
        and told["dropped"][0] == 0 < told["dropped"][9]
    )
    assert (
        len(told["corruptions"]) == len(told["modalities"]) == 4
        and told["kl"] > 0
        and len(told["sha256"]) == 64
    )
    assert cli.main(["partition", "show", *DIGITS, *EVERYTHING]) == 0
    out = capsys.readouterr().out
    assert (
        f"({sum(told['dropped'])} more belong to nobody)" in out
        and "corruption" in out
        and any(name in out for name in told["corruptions"])
    )


@pytest.mark.parametrize("scenario", ["pathological", "quantity"])
def test_a_saved_partition_is_loaded(capsys, tmp_path, scenario):
    file = tmp_path / "mine.json"
    flags = [
        "--scenario",
        scenario,
        "--set",
        "partition.classes_per_client=5",
        "--set",
        "partition.held_out_share=0.2",
    ]
    drawn = shown(capsys, *flags, "--save", str(file))
    loaded = shown(capsys, *flags, "--set", f"partition.file={file}")
    assert (loaded["sha256"], loaded["histograms"], loaded["scenario"]) == (
        drawn["sha256"],
        drawn["histograms"],
        "file",
    )


@pytest.mark.parametrize(
    ("flags", "content", "code", "words"),
    [
        (["--set", "partition.file=FILE"], None, 3, "cannot read partition.file"),
        (
            ["--set", "partition.file=FILE"],
            "[[0, 1], [1, 2], [3, 4], [5, 6]]",
            3,
            "image 1 is held 2 times",
        ),
        (
            ["--set", "partition.file=FILE"],
            "[[0, 1]]",
            4,
            "has 1 clients, partition.clients = 4: use --clients 1",
        ),
        (
            ["--set", "partition.file=FILE"],
            '{"indices": [[0,1],[2,3],[4,5],[6,7]], "dataset_sha256": "x"}',
            4,
            "was made of other training images",
        ),
        (
            ["--scenario", "pathological", "--set", "partition.classes_per_client=11"],
            None,
            2,
            "cuts 44 shards",
        ),
        (["--scenario", "patological"], None, 2, "did you mean 'pathological'"),
        (
            ["--set", "partition.imbalance=0.5"],
            None,
            2,
            "partition.imbalance = 0.5: must be at least 1.0",
        ),
        (["--figure", "FILE"], None, 2, "ends in .png or .svg"),
        (["--save", "FILE/p.json"], None, 3, "choose another --save"),
    ],
)
def test_mistakes(capsys, tmp_path, flags, content, code, words):
    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(content)
    assert (
        cli.main(
            ["partition", "show", *DIGITS, *[flag.replace("FILE", str(file)) for flag in flags]]
        )
        == code
    )
    assert words in capsys.readouterr().err


@needs_matplotlib
@pytest.mark.parametrize(
    ("clients", "flags"), [("4", EVERYTHING), ("60", ["--clients-per-round", "2"])]
)
def test_drawn(capsys, tmp_path, clients, flags):
    drawn = ["--clients", clients, *flags, "--figure"]
    shown(capsys, *drawn, str(tmp_path / "one.png"))
    shown(capsys, *drawn, str(tmp_path / "two.png"))
    content = (tmp_path / "one.png").read_bytes()
    assert (
        content[:8] == b"\x89PNG\r\n\x1a\n"
        and content == (tmp_path / "two.png").read_bytes()
        and len(content) > 10_000
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


@needs_matplotlib
@pytest.mark.parametrize("classes", [1, 10, 18])
def test_the_bars_are_the_histograms(classes):
    """Every class of every client is one step of its height, on top of the classes before it."""
    from semanticfl_ref.tools.report.figures import partition_figure

    rows = [[(m * 7 + c * 3) % 5 for c in range(classes)] for m in range(3)] + [[0] * classes]
    (axes,) = partition_figure(
        {"histograms": rows, "corruptions": ["grey", "blur", "none", "noise"]},
        [f"class {c}" for c in range(classes)],
    ).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "0\ngrey",
        "1\nblur",
        "2\nnone",
        "3\nnoise",
    ]
    assert len(axes.patches) == classes
    for c, steps in enumerate(axes.patches):
        values, edges, baseline = steps.get_data()
        assert values[::2].tolist() == [sum(row[: c + 1]) for row in rows] and baseline[
            ::2
        ].tolist() == [sum(row[:c]) for row in rows]
        assert [
            (left + right) / 2 for left, right in zip(edges[::2], edges[1::2])
        ] == pytest.approx(range(len(rows)))


def test_trained_with_everything_and_gone_on_with(capsys, tmp_path):
    flags = [
        *JOB,
        "--method",
        "semanticfl",
        "--scenario",
        "pathological",
        "--set",
        "partition.classes_per_client=6",
        *EVERYTHING,
        "--clients-per-round",
        "3",
    ]
    assert (
        cli.main(["train", *flags, "--rounds", "2", "--out", str(tmp_path / "run"), "--json"]) == 0
    )
    capsys.readouterr()
    told, anchors = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text())
        for name in ("partition", "anchors")
    )
    assert anchors["image_count"] == sum(told["sizes"]) == 450 - sum(told["dropped"]), (
        "images of nobody make no anchor"
    )
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    visual = (
        sum(
            n for n, name in zip(told["sizes"], told["modalities"], strict=True) if "visual" in name
        )
        * anchors["width"]
    )
    text = sum("text" in name for name in told["modalities"]) * 10 * 64
    assert first["bytes_down"] - first["bytes_up"] == 4 * (visual + text), (
        "what was sent, and no more"
    )
    settings = settle(cli.parse(["train", *flags]))
    again = cli.parse(
        [word for word in shlex.split(prepare.build_command(settings))[3:] if word != "--rebuild"]
    )
    assert (
        prepare.load_data(settle(again), True)[0].sha256
        == prepare.load_data(settings, True)[0].sha256
    ), "the cache's own command makes that cache"
    assert cli.main(["features", "verify", *flags, "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["caches"][0]
    assert cache["id"] == anchors["cache"] and cache["images"] == anchors["image_count"]
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
