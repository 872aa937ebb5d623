"""`features build | info | verify | probe` on the embedded model, and `train` on the cache that was
built.
"""

import contextlib
import importlib.util
import io
import json
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from PIL import Image
from processes import ROOT, command, environment

from semanticfl_ref import cli
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import to_flat
from semanticfl_ref.diffusion import extract
from semanticfl_ref.run.setup import load_images, rebuild_command
from semanticfl_ref.tools.features import split_for_probe, table

pytestmark = pytest.mark.skipif(
    not (ROOT / "semanticfl_ref" / "diffusion" / "tiny" / "unet").is_dir(),
    reason="the embedded diffusion model is not in this checkout",
)
WORDS = ["--dataset", "digits", "--offline", "--set", "run.threads=1"]
DIGITS = [*WORDS, "--json"]
SMALL = ["--set", "model.width=2", "--rounds", "1", "--local-epochs", "1"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder with the digits' cache, and what the command printed."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(folder))
        printed, code = printed_by("features", "build", *DIGITS)
    assert code == 0
    return folder, printed


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    """A copy of that cache folder for a test of its own."""
    shutil.copytree(built[0], tmp_path / "cache")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def printed_by(*arguments: str) -> tuple[dict, int]:
    """What a command prints as JSON, and its exit code; in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(list(arguments))
    return json.loads(out.getvalue() or "{}"), code


def caches_in(folder) -> set:
    return set((folder / "features").glob("features-*"))


def no_extraction(monkeypatch) -> None:
    monkeypatch.setattr(
        extract, "build_cache", lambda *_a, **_k: pytest.fail("the cache was built again")
    )


def test_build_info_verify(built, folder, capsys):
    cache = built[1]["caches"][0]
    assert cache["use"] == "visual" and cache["complete"] is True
    assert (cache["images"], cache["images_done"]) == (450, 450)
    assert (cache["layers"], cache["timestep"]) == (["mid"], 20)
    assert cache["bytes"] > 450 * 112 * 2
    for what in ("build", "info", "verify"):
        printed, code = printed_by("features", what, *DIGITS)
        again = printed["caches"][0]
        assert code == 0
        assert again["id"] == cache["id"] and again["bytes"] == cache["bytes"]
        assert printed["verified"] == (what == "verify")
    assert cli.main(["features", "verify", *WORDS]) == 0
    out = capsys.readouterr().out
    assert "450 of 450 images" in out and "every byte checked" in out


def test_train_uses_the_cache_that_was_built(folder, tmp_path, monkeypatch, capsys):
    no_extraction(monkeypatch)
    assert cli.main(["train", *DIGITS, *SMALL, "--out", str(tmp_path / "run")]) == 0
    assert "from the feature cache" in capsys.readouterr().err
    anchors = json.loads((tmp_path / "run" / "anchors.json").read_text())
    assert folder / "features" / f"features-{anchors['cache']}" in caches_in(folder)


@pytest.mark.parametrize(
    "command_", [["features", "verify"], ["features", "build"], ["train"]], ids=" ".join
)
def test_a_flipped_byte_is_exit_4_with_the_command_that_rebuilds_it(
    folder, tmp_path, capsys, command_
):
    (cache,) = caches_in(folder)
    shard = cache / "shard-00003.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    out = ["--out", str(tmp_path / "run"), *SMALL] if command_ == ["train"] else []
    assert cli.main([*command_, *DIGITS, *out]) == 4
    err = capsys.readouterr().err
    assert "shard-00003.safetensors is damaged" in err
    rebuild = "python -m semanticfl_ref features build --rebuild --dataset digits"
    assert f"build it again with: {rebuild}" in err
    if command_ == ["features", "verify"]:
        assert cli.main(["features", "build", "--rebuild", *DIGITS]) == 0
        assert shard.read_bytes() == good
    assert not (tmp_path / "run").exists()


def test_a_cache_that_is_absent_or_incomplete(folder, capsys):
    assert cli.main(["features", "verify", *DIGITS, "--set", "diffusion.timestep=30"]) == 3
    assert "there is no complete feature cache" in capsys.readouterr().err
    (path,) = caches_in(folder)
    (path / "manifest.json").unlink()
    (path / "shard-00002.safetensors").unlink()
    cache = printed_by("features", "info", *DIGITS)[0]["caches"][0]
    assert (cache["complete"], cache["images_done"]) == (False, 450 - 64)
    to_come = cache["expected"]
    assert to_come["bytes"] == 450 * 112 * 2 and 0 < to_come["seconds"] < 100
    assert cli.main(["features", "info", *WORDS]) == 0
    out = capsys.readouterr().out
    assert "386 of 450 images" in out and "features build --dataset digits" in out
    assert "to make: about " in out and "measured on one pass; 98.4 KiB in all" in out
    assert "--rebuild" not in out


def without_rebuild(words: str) -> list[str]:
    return [word for word in shlex.split(words)[3:] if word != "--rebuild"]


def test_the_command_that_rebuilds_a_cache_builds_that_cache():
    settings = {
        "data.name": "digits",
        "diffusion.timestep": 30,
        "diffusion.prompt": "one {} 'of' them",
        "anchors.images": "heldout:3",
        "run.seed": 4,
        "anchors.width": 8,
    }
    words = rebuild_command(resolve(settings))
    again = to_flat(settings_of(cli.parse(without_rebuild(words))))
    del settings["anchors.width"]
    assert {name: again[name] for name in settings} == settings
    assert "anchors.width" not in words, "it does not affect the cache"


def test_the_embedded_model_stands_in_with_its_own_layers():
    """For any data set; what the user asks for wins, and the command that rebuilds the cache says
    so.
    """
    stand_in = resolve({"data.name": "cifar10", "diffusion.source": "tiny"})
    assert (stand_in.diffusion.layers, stand_in.diffusion.input_size) == ("mid", 0)
    assert (stand_in.anchors.aggregation, stand_in.model.width) == ("equal", 64)
    assert resolve({"data.name": "cifar10"}).diffusion.layers == "vae,up.1,up.2,up.3"
    asked = resolve({"data.name": "cifar10", "diffusion.source": "tiny", "diffusion.timestep": 150})
    again = settings_of(cli.parse(without_rebuild(rebuild_command(asked))))
    assert again.diffusion == asked.diffusion and asked.diffusion.timestep == 150


def test_text_anchors_from_the_unet(folder, tmp_path, monkeypatch):
    flags = [*DIGITS, "--set", "anchors.text=unet", "--set", "anchors.text_images=5"]
    caches = printed_by("features", "build", *flags)[0]["caches"]
    assert [(cache["use"], cache["condition"], cache["images"]) for cache in caches] == [
        ("visual", "null", 450),
        ("text", "own-class", 50),
    ]
    no_extraction(monkeypatch)
    assert cli.main(["train", *flags, *SMALL, "--out", str(tmp_path / "run")]) == 0
    anchors = json.loads((tmp_path / "run" / "anchors.json").read_text())
    assert (anchors["text"], anchors["text_cache"]) == ("unet", caches[1]["id"])
    sizes = printed_by("train", *flags, "--dry-run")[0]
    assert sizes["parameters"] > 0


@pytest.fixture(scope="module")
def probed(built):
    """The digits probed on a hundred images, two timesteps, with a figure."""
    figure = built[0] / "figure.png" if importlib.util.find_spec("matplotlib") else None
    asked = [*DIGITS, "--probe-images", "100", "--timesteps", "20,600"]
    asked += ["--set", "diffusion.vae_pool=1"]
    if figure is not None:
        asked += ["--figure", str(figure)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(built[0]))
        printed, code = printed_by("features", "probe", *asked)
    assert code == 0
    return printed, figure


def test_probe(probed):
    printed, _ = probed
    assert printed["evaluated_part"] == "validation" and printed["notes"] == []
    assert (printed["fitted_on"], printed["evaluated_on"]) == (100, 100)
    rows = {(row["timestep"], row["layer"]): row for row in printed["rows"]}
    layers = ("vae", "down.0", "down.1", "mid", "up.0", "up.1")
    assert list(rows) == [(None, "pixels"), *((t, layer) for t in (20, 600) for layer in layers)]
    mid = rows[20, "mid"]
    assert mid["width"] == 112
    assert mid["linear_probe"] > rows[20, "vae"]["linear_probe"] + 0.1
    assert mid["linear_probe"] > rows[600, "mid"]["linear_probe"], "more noise, less to read"
    assert all(1 <= row["effective_rank"] <= row["width"] for row in rows.values())
    assert all(row["fisher_ratio"] > 0 for row in rows.values())


def test_a_damaged_cache_of_a_probe_is_named_with_what_helps(folder, capsys):
    asked = ["features", "probe", *DIGITS, "--probe-images", "100", "--layers", "down.0, vae"]
    before = caches_in(folder)
    assert cli.main(asked) == 0
    path = (caches_in(folder) - before).pop()
    (path / "shard-00000.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert cli.main(asked) == 4
    err = capsys.readouterr().err
    assert str(path) in err and "delete its folder and probe again" in err
    assert "--rebuild" not in err
    shutil.rmtree(path)
    assert cli.main(asked) == 0


def test_probe_draws_a_figure(probed):
    if probed[1] is None:
        pytest.skip("matplotlib is not installed here")
    with Image.open(probed[1]) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("L").getcolors()) > 10


def test_probe_without_matplotlib_says_so_before_it_works(folder, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert cli.main(["features", "probe", *DIGITS, "--figure", "f.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_tables_say_when_the_label_is_in_the_features(probed, folder):
    text = table(probed[0])
    assert "| 20 | mid | 112 |" in text and "contain its label" not in text
    row = next(line for line in text.splitlines() if line.startswith("|  | pixels |"))
    cells, pixels = row.split(" | "), probed[0]["rows"][0]
    assert cells[3] == f"{pixels['linear_probe']:.1%}"
    assert cells[5:7] == [f"{pixels['fisher_ratio']:.3f}", f"{pixels['effective_rank']:.1f}"]
    assert row.endswith("|  |"), "pixels have no text alignment"
    asked = ["--condition", "own-class", "--probe-images", "30", "--layers", "vae"]
    own_class, _ = printed_by("features", "probe", *DIGITS, *asked)
    assert "contain its label" in table(own_class)
    caches, _ = printed_by("features", "info", *DIGITS)
    assert "contain its label" not in table(caches)
    caches, _ = printed_by("features", "info", *DIGITS, "--condition", "own-class")
    assert "contain its label" in table(caches)


def test_probe_without_a_validation_part_evaluates_on_other_training_images():
    dataset, _ = load_images(resolve({"data.name": "digits"}), offline=True)
    bare = replace(
        dataset,
        validation_images=dataset.validation_images[:0],
        validation_labels=dataset.validation_labels[:0],
    )
    fitted, evaluated, part = split_for_probe(bare, 2000, 0)
    assert len(fitted.train_labels) + len(evaluated.train_labels) == 450
    assert 80 <= len(evaluated.train_labels) <= 100 and part == "held-out training"
    few = split_for_probe(dataset, 30, 0)[0]
    assert len(few.train_labels) <= 35 and len(few.train_labels.unique()) == 10


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["features"], "build|info|verify|probe"),
        (["features", "make"], "argument build|info|verify|probe: invalid choice: 'make'"),
        (["features", "info", "--rebuild"], "--rebuild belongs to `features build`"),
        (["features", "build", "--figure", "x"], "--figure belongs to `features probe`"),
        (["features", "probe", "--timesteps", "a"], "--timesteps"),
        (["features", "probe", "--timestep", "20"], "--timesteps"),
        (["features", "probe", *DIGITS, "--probe-images", "19"], "at least 20 are needed"),
        (
            ["features", "probe", *DIGITS, "--timesteps", "20,1000"],
            "diffusion.timestep = 1000: must be at most 999",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it(capsys, folder, arguments, words):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err and "feature cache of" not in err


@pytest.mark.heavy
def test_killed_by_the_system_it_goes_on_with_the_same_bytes(built, tmp_path):
    """SIGKILL after the first shard, in a process of its own."""
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        command("features", "build", *DIGITS),
        cwd=ROOT,
        env={**environment(), "SEMANTICFL_CACHE": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(folder.glob("features/*/shard-*.safetensors")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (cache,) = caches_in(folder)
    expected = built[0] / "features" / cache.name  # other tests have built other caches beside it
    before = {file: file.stat().st_mtime_ns for file in cache.glob("shard-*.safetensors")}
    assert 1 <= len(before) < 8 and not (cache / "manifest.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(folder))
        assert printed_by("features", "build", *DIGITS)[1] == 0
    assert all(file.stat().st_mtime_ns == when for file, when in before.items()), (
        "a shard was built twice"
    )
    for file in expected.iterdir():
        if file.name != extract.LOCK:
            assert file.read_bytes() == (cache / file.name).read_bytes(), file.name


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_images(tmp_path):
    """Peak memory of a process that extracts and reads 64 images, and then 8 192; the images
    themselves are there from the start.
    """
    code = """
import sys
from pathlib import Path
import torch
from semanticfl_ref.config.settings import DiffusionSettings
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.diffusion import extract, feature_cache
from semanticfl_ref.diffusion.backbone import Backbone
torch.set_num_threads(1)
Backbone.start = lambda self, part, **options: lambda: {
    layer: torch.randn(len(part), width) for layer, width in self.widths(4).items()
}
every = torch.ones(8192, 32, 32, 3, dtype=torch.uint8)
settings = DiffusionSettings(
    source="tiny", layers="mid,down.1,up.0", pool=4, input_size=0, precision="fp32"
)
for count in (64, 8192):
    images, labels = every[:count], torch.zeros(count, dtype=torch.long)
    dataset = Dataset(
        name="test",
        class_names=("a",),
        train_images=images,
        train_labels=labels,
        validation_images=images[:0],
        validation_labels=labels[:0],
        test_images=images[:0],
        test_labels=labels[:0],
        sha256="d",
    )
    plan = feature_cache.plan_cache(
        dataset,
        settings,
        seed=0,
        device=torch.device("cpu"),
        folder=Path(sys.argv[1]) / str(count),
        offline=True,
    )
    extract.build_cache(plan, lambda text: None)
    chunks = feature_cache.open_cache(plan).chunks("mid", 512)
    assert sum(len(part) for part in chunks) == count
    # not getrusage: its peak includes that of the process that started this one
    status = Path("/proc/self/status").read_text().splitlines()
    print([int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")][0])
print(sum(file.stat().st_size for file in plan.files) / 2**20)
"""
    done = subprocess.run(
        [*command()[:1], "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, last, size = map(float, done.stdout.split())
    assert size > 75
    assert last - first < size / 2, f"{first:.0f} and {last:.0f} MiB for features of {size:.0f} MiB"
