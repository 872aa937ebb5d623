"""Partitions through the command line: shown, drawn, saved, loaded, trained.

The server's cache holds what the clients hold.
"""

import importlib.util
import json
import shlex

import pytest
from processes import JOB

from semanticfl_ref import cli
from semanticfl_ref.commands.partition import partition_table
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.run import setup

DIGITS = ["--dataset", "digits", "--clients", "4", "--clients-per-round", "2"]
EVERYTHING = [
    *("--set", "partition.imbalance=5"),
    *("--set", "partition.feature_shift=corruption"),
    *("--set", "partition.modality=mixed"),
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


def test_shown_with_everything_in_which_clients_differ(capsys):
    manifest = shown(capsys, *EVERYTHING)
    assert sum(manifest["sizes"]) + sum(manifest["dropped"]) == 450
    assert manifest["dropped"][0] == 0 < manifest["dropped"][9]
    assert len(manifest["corruptions"]) == len(manifest["modalities"]) == 4
    assert manifest["kl"] > 0
    assert len(manifest["sha256"]) == 64
    assert cli.main(["partition", "show", *DIGITS, *EVERYTHING]) == 0
    out = capsys.readouterr().out
    assert f"({sum(manifest['dropped'])} unused)" in out
    assert "corruption" in out
    assert any(name in out for name in manifest["corruptions"])


def test_a_map_for_other_tools(capsys, tmp_path):
    """What it says is read back as the same partition."""
    file = tmp_path / "map.json"
    manifest = shown(capsys, "--map", str(file))
    lists = json.loads(file.read_text())
    assert [len(lists[str(client)]) for client in range(4)] == manifest["sizes"]
    again = shown(capsys, "--set", f"partition.file={file}")
    assert again["sha256"] == manifest["sha256"]


def test_the_table():
    import torch

    from semanticfl_ref.data.partition import make_partition

    def table(**settings):
        labels = torch.arange(1000) % 10
        partition = make_partition(labels, PartitionSettings(**settings), classes=10, seed=0)
        return partition_table(partition.manifest(), tuple("abcdefghij"))

    text = table(scenario="nid2", clients=6)
    assert text.startswith("nid2, seed 0: 1000 training images, 6 clients\nskew 0.66")
    assert "a 83, b 83" in text
    assert "alpha 0.3" in table(alpha=0.3)


@pytest.mark.parametrize("scenario", ["pathological", "quantity"])
def test_a_saved_partition_is_loaded(capsys, tmp_path, scenario):
    file = tmp_path / "mine.json"
    flags = ["--scenario", scenario, "--set", "partition.classes_per_client=5"]
    flags += ["--set", "partition.held_out_share=0.2"]
    drawn = shown(capsys, *flags, "--save", str(file))
    loaded = shown(capsys, *flags, "--set", f"partition.file={file}")
    assert loaded["scenario"] == "file"
    assert loaded["sha256"] == drawn["sha256"]
    assert loaded["histograms"] == drawn["histograms"]


FROM_FILE = ["--set", "partition.file=FILE"]


@pytest.mark.parametrize(
    ("flags", "content", "code", "words"),
    [
        (FROM_FILE, None, 3, "cannot read partition.file"),
        (FROM_FILE, "[[0, 1], [1, 2], [3, 4], [5, 6]]", 3, "image 1 is listed twice"),
        (
            FROM_FILE,
            "[[0, 1]]",
            4,
            "has 1 clients, partition.clients = 4: use --clients 1",
        ),
        (
            FROM_FILE,
            '{"indices": [[0,1],[2,3],[4,5],[6,7]], "dataset_sha256": "x"}',
            4,
            "belongs to other training images",
        ),
        (
            ["--scenario", "pathological", "--set", "partition.classes_per_client=11"],
            None,
            2,
            "needs 44 shards",
        ),
        (["--scenario", "patological"], None, 2, "did you mean 'pathological'"),
        (
            ["--set", "partition.imbalance=0.5"],
            None,
            2,
            "partition.imbalance = 0.5: must be at least 1.0",
        ),
        (["--figure", "FILE"], None, 2, ".png or .svg"),
        (["--save", "FILE/p.json"], None, 3, "choose another --save"),
    ],
)
def test_mistakes(capsys, tmp_path, flags, content, code, words):
    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(content)
    flags = [flag.replace("FILE", str(file)) for flag in flags]
    assert cli.main(["partition", "show", *DIGITS, *flags]) == code
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
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content == (tmp_path / "two.png").read_bytes()
    assert len(content) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


@needs_matplotlib
@pytest.mark.parametrize("classes", [1, 10, 18])
def test_the_bars_are_the_histograms(classes):
    """Every class of every client is one step of its height, on top of the classes before it."""
    from semanticfl_ref.tools.report.figures import partition_figure

    rows = [[(m * 7 + c * 3) % 5 for c in range(classes)] for m in range(3)] + [[0] * classes]
    manifest = {"histograms": rows, "corruptions": ["grey", "blur", "none", "noise"]}
    (axes,) = partition_figure(manifest, [f"class {c}" for c in range(classes)]).axes
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["0\ngrey", "1\nblur", "2\nnone", "3\nnoise"]
    assert len(axes.patches) == classes
    for c, steps in enumerate(axes.patches):
        values, edges, baseline = steps.get_data()
        assert values[::2].tolist() == [sum(row[: c + 1]) for row in rows]
        assert baseline[::2].tolist() == [sum(row[:c]) for row in rows]
        middles = [sum(pair) / 2 for pair in zip(edges[::2], edges[1::2], strict=True)]
        assert middles == pytest.approx(range(len(rows)))


def test_trained_with_everything_and_resumed(capsys, tmp_path):
    flags = [*JOB, "--method", "semanticfl", "--scenario", "pathological"]
    flags += ["--set", "partition.classes_per_client=6", *EVERYTHING, "--clients-per-round", "3"]
    run = tmp_path / "run"
    assert cli.main(["train", *flags, "--rounds", "2", "--out", str(run), "--json"]) == 0
    capsys.readouterr()
    manifest = json.loads((run / "partition.json").read_text())
    anchors = json.loads((run / "anchors.json").read_text())
    trained = sum(manifest["sizes"])
    assert trained == 450 - sum(manifest["dropped"])
    assert anchors["image_count"] == trained, "unused images make no anchor"

    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    clients = list(zip(manifest["sizes"], manifest["modalities"], strict=True))
    visual = sum(size for size, modality in clients if "visual" in modality) * anchors["width"]
    text = sum("text" in modality for _, modality in clients) * 10 * 64
    sent = first["bytes_down"] - first["bytes_up"]
    assert sent == 4 * (visual + text), "what a client receives, and no more"

    config = settings_of(cli.parse(["train", *flags]))
    command = shlex.split(setup.rebuild_command(config))[3:]
    rebuilt = settings_of(cli.parse([word for word in command if word != "--rebuild"]))
    held = [setup.load_data(each, offline=True).dataset.sha256 for each in (config, rebuilt)]
    assert held[0] == held[1], "the cache's own command makes that cache"

    assert cli.main(["features", "verify", *flags, "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["caches"][0]
    assert cache["id"] == anchors["cache"]
    assert cache["images"] == anchors["image_count"]
    assert cli.main(["train", "--resume", str(run)]) == 0
