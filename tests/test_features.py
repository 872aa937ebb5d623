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

import pytest
from processes import ROOT, command, environment
from semanticfl_ref.commands.flags import settle

from semanticfl_ref import cli
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.diffusion import extract
from semanticfl_ref.run import setup as prepare

pytestmark = pytest.mark.skipif(
    not (ROOT / "semanticfl_ref" / "diffusion" / "tiny" / "unet").is_dir(),
    reason="the embedded diffusion model is not in this checkout",
)
DIGITS = ["--dataset", "digits", "--offline", "--json", "--set", "run.threads=1"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache with the digits' cache, and what the command printed."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(cache))
        printed, code = printed_by("features", "build", *DIGITS)
    assert code == 0
    return cache, printed


@pytest.fixture
def cache(built, tmp_path, monkeypatch):
    """A copy of that cache for a test of its own."""
    shutil.copytree(built[0], tmp_path / "cache")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def printed_by(*arguments: str) -> tuple[dict, int]:
    """What a command prints as JSON, and its exit code; in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(list(arguments))
    return json.loads(out.getvalue() or "{}"), code


def test_build_info_verify(built, cache, capsys):
    cache = built[1]["caches"][0]
    assert (
        cache["use"],
        cache["finished"],
        cache["images"],
        cache["images_done"],
        cache["layers"],
        cache["timestep"],
    ) == ("visual", True, 450, 450, ["mid"], 20)
    assert cache["bytes"] > 450 * 112 * 2
    for what in ("build", "info", "verify"):
        printed, code = printed_by("features", what, *DIGITS)
        again = printed["caches"][0]
        assert (
            code == 0
            and again["id"] == cache["id"]
            and again["bytes"] == cache["bytes"]
            and again.get("verified", False) == (what == "verify")
        )
    assert cli.main(["features", "verify", *[flag for flag in DIGITS if flag != "--json"]]) == 0
    assert "every byte checked; 450 images" in capsys.readouterr().out


def test_train_uses_the_bank_that_was_built(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract, "build", lambda *_a, **_k: pytest.fail("the cache was made again"))
    small = ["--set", "model.width=2", "--rounds", "1", "--local-epochs", "1"]
    assert cli.main(["train", *DIGITS, *small, "--out", str(tmp_path / "run")]) == 0
    assert "from the feature cache in the cache" in capsys.readouterr().err
    anchors = json.loads((tmp_path / "run" / "anchors.json").read_text())
    assert cache / "caches" / f"cache-{anchors['cache']}" in list((cache / "caches").iterdir())


@pytest.mark.parametrize(
    "command_", [["features", "verify"], ["features", "build"], ["train"]], ids=" ".join
)
def test_a_flipped_byte_is_exit_4_with_the_command_that_remakes_it(
    cache, tmp_path, capsys, command_
):
    shard = next((cache / "caches").glob("cache-*")) / "shard-00003.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    out = (
        ["--out", str(tmp_path / "run"), "--set", "model.width=2"] if command_ == ["train"] else []
    )
    assert cli.main([*command_, *DIGITS, *out]) == 4
    err = capsys.readouterr().err
    assert (
        "shard-00003.safetensors is damaged" in err
        and "make it rebuild with: python -m semanticfl_ref features build --rebuild --dataset digits"
        in err
    )
    if command_ == ["features", "verify"]:
        assert (
            cli.main(["features", "build", "--rebuild", *DIGITS]) == 0
            and shard.read_bytes() == good
        )
    assert not (tmp_path / "run").exists()


def test_a_bank_that_is_not_there_or_not_finished(built, cache, capsys):
    assert cli.main(["features", "verify", *DIGITS, "--set", "diffusion.timestep=30"]) == 3
    assert "there is no finished feature cache" in capsys.readouterr().err
    folder = next((cache / "caches").glob("cache-*"))
    (folder / "cache.json").unlink(), (folder / "shard-00002.safetensors").unlink()
    cache = printed_by("features", "info", *DIGITS)[0]["caches"][0]
    assert (cache["finished"], cache["images_done"]) == (False, 450 - 64)
    assert cli.main(["features", "info", *[flag for flag in DIGITS if flag != "--json"]]) == 0
    out = capsys.readouterr().out
    assert "386 of 450 images done" in out and "features build --dataset digits" in out


def test_the_command_that_remakes_a_bank_makes_that_bank():
    settings = {
        "data.name": "digits",
        "diffusion.timestep": 30,
        "diffusion.prompt": "one {} 'of' them",
        "anchors.images": "heldout:3",
        "run.seed": 4,
        "anchors.width": 8,
    }
    words = prepare.build_command(config.build(settings))
    arguments = cli.parse([word for word in shlex.split(words)[3:] if word != "--rebuild"])
    again = config.to_flat(settle(arguments))
    assert {name: again[name] for name in settings if name != "anchors.width"} == {
        name: value for name, value in settings.items() if name != "anchors.width"
    }
    assert "anchors.width" not in words, "it does not bear on the cache"


def test_the_embedded_model_stands_in_with_its_own_layers():
    """For any data set; what the user asks for wins, and the command that remakes the cache says so."""
    stand_in = config.build({"data.name": "cifar10", "diffusion.source": "tiny"})
    assert (
        stand_in.diffusion.layers,
        stand_in.diffusion.input_size,
        stand_in.anchors.aggregation,
        stand_in.model.width,
    ) == ("mid", 0, "equal", 64)
    assert config.build({"data.name": "cifar10"}).diffusion.layers == "up.1,up.2,up.3"
    asked = config.build(
        {"data.name": "cifar10", "diffusion.source": "tiny", "diffusion.timestep": 150}
    )
    words = shlex.split(prepare.build_command(asked))[3:]
    assert (
        settle(cli.parse([word for word in words if word != "--rebuild"])).diffusion
        == asked.diffusion
        and asked.diffusion.timestep == 150
    )


def test_text_anchors_from_the_unet(cache, tmp_path, monkeypatch):
    flags = [*DIGITS, "--set", "anchors.text=unet", "--set", "anchors.text_images=5"]
    caches = printed_by("features", "build", *flags)[0]["caches"]
    assert [(cache["use"], cache["condition"], cache["images"]) for cache in caches] == [
        ("visual", "null", 450),
        ("text", "own-class", 50),
    ]
    monkeypatch.setattr(extract, "build", lambda *_a, **_k: pytest.fail("a cache was made again"))
    assert (
        cli.main(
            [
                "train",
                *flags,
                "--set",
                "model.width=2",
                "--rounds",
                "1",
                "--local-epochs",
                "1",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    anchors = json.loads((tmp_path / "run" / "anchors.json").read_text())
    assert (anchors["text"], anchors["text_cache"]) == ("unet", caches[1]["id"])
    sizes = printed_by("train", *flags, "--dry-run")[0]
    assert sizes["row_entries"] > 0


@pytest.fixture(scope="module")
def probed(built):
    """The digits probed on a hundred images, two timesteps, with a figure."""
    figure = built[0] / "figure.png" if importlib.util.find_spec("matplotlib") else None
    drawn = ["--figure", str(figure)] if figure else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(built[0]))
        printed, code = printed_by(
            "features", "probe", *DIGITS, "--probe-images", "100", "--timesteps", "20,600", *drawn
        )
    assert code == 0
    return printed, figure


def test_probe(probed):
    printed, _ = probed
    assert printed["judged_part"] == "validation images" and printed["label_conditioned"] is False
    assert (printed["fitted_on"], printed["judged_on"]) == (100, 100)
    rows = {(row["timestep"], row["layer"]): row for row in printed["rows"]}
    assert list(rows) == [
        (None, "pixels"),
        *(
            (t, layer)
            for t in (20, 600)
            for layer in ("vae", "down.0", "down.1", "mid", "up.0", "up.1")
        ),
    ]
    assert (
        rows[20, "mid"]["linear_probe"] > rows[20, "vae"]["linear_probe"] + 0.1
        and rows[20, "mid"]["width"] == 112
    )
    assert rows[20, "mid"]["linear_probe"] > rows[600, "mid"]["linear_probe"], (
        "more noise, less to read"
    )
    assert all(
        1 <= row["effective_rank"] <= row["width"] and row["fisher_ratio"] > 0
        for row in rows.values()
    )


def test_a_damaged_bank_of_a_probe_is_named_with_what_helps(cache, capsys):
    asked = ["features", "probe", *DIGITS, "--probe-images", "100", "--layers", "down.0, vae"]
    before = set((cache / "caches").iterdir())
    assert cli.main(asked) == 0
    folder = (set((cache / "caches").iterdir()) - before).pop()
    (folder / "shard-00000.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert cli.main(asked) == 4
    err = capsys.readouterr().err
    assert (
        str(folder) in err and "delete its folder and probe again" in err and "--rebuild" not in err
    )
    shutil.rmtree(folder)
    assert cli.main(asked) == 0


def test_probe_draws_a_figure(probed):
    if probed[1] is None:
        pytest.skip("matplotlib is not installed here")
    from PIL import Image

    with Image.open(probed[1]) as image:
        assert (
            image.format == "PNG"
            and image.width > 1000
            and len(image.convert("L").getcolors()) > 10
        )


def test_probe_without_matplotlib_says_so_before_it_works(cache, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert cli.main(["features", "probe", *DIGITS, "--figure", "f.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_probe_words_say_when_the_label_is_in_the_features(probed):
    from semanticfl_ref.tools import features

    words = features.probe_words(probed[0])
    assert "| 20 | mid | 112 |" in words and "hold its label" not in words
    assert "hold its label" in features.probe_words({**probed[0], "label_conditioned": True})


def test_probe_without_a_validation_part_judges_on_other_training_images():
    from semanticfl_ref.tools import features

    dataset = prepare.load_images(config.build({"data.name": "digits"}), True)[0]
    bare = prepare.replace(
        dataset,
        validation_images=dataset.validation_images[:0],
        validation_labels=dataset.validation_labels[:0],
    )
    fitted, judged, part = features._two_sets(bare, 2000, 0)
    assert (
        len(fitted.train_labels) + len(judged.train_labels) == 450
        and 80 <= len(judged.train_labels) <= 100
        and part.startswith("other training images")
    )
    few = features._two_sets(dataset, 30, 0)[0]
    assert len(few.train_labels) <= 35 and len(few.train_labels.unique()) == 10


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["features"], "what"),
        (["features", "make"], "'make'"),
        (["features", "info", "--rebuild"], "--rebuild belongs to `features build`"),
        (["features", "build", "--figure", "x"], "--figure belongs to `features probe`"),
        (["features", "probe", "--timesteps", "a"], "--timesteps"),
        (["features", "probe", "--timestep", "20"], "--timesteps"),
        (
            ["features", "probe", *DIGITS, "--timesteps", "20,1000"],
            "diffusion.timestep = 1000: must be at most 999",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it(capsys, cache, arguments, words):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert (
        words in err.splitlines()[-1] and "Traceback" not in err and "feature cache of" not in err
    )


def test_killed_by_the_system_it_goes_on_with_the_same_bytes(built, tmp_path):
    """SIGKILL after the first shard, in a process of its own."""
    cache = tmp_path / "cache"
    build = command("features", "build", *DIGITS)
    process = subprocess.Popen(
        build,
        cwd=ROOT,
        env={**environment(), "SEMANTICFL_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(cache.glob("caches/*/shard-*.safetensors")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (folder,) = (cache / "caches").glob("cache-*")
    expected = built[0] / "caches" / folder.name  # other tests have built other caches beside it
    before = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*.safetensors")}
    assert 1 <= len(before) < 8 and not (folder / "cache.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(cache))
        assert printed_by("features", "build", *DIGITS)[1] == 0
    assert all(file.stat().st_mtime_ns == when for file, when in before.items()), (
        "a shard was made twice"
    )
    for file in expected.iterdir():
        assert (
            file.name == extract.LOCK or file.read_bytes() == (folder / file.name).read_bytes()
        ), file.name


def test_memory_does_not_grow_with_the_images(tmp_path):
    """Peak memory of a process that extracts and reads 64 images, and then 8 192; the images
    themselves are there from the start.
    """
    code = """
import sys
from pathlib import Path
import torch
from semanticfl_ref.diffusion import feature_cache as cache
from semanticfl_ref.diffusion import extract
from semanticfl_ref.diffusion.backbone import Backbone
torch.set_num_threads(1)
Backbone.features = lambda self, part, **options: {layer: torch.randn(len(part), width) for layer, width in self.widths(4).items()}
every = torch.ones(8192, 32, 32, 3, dtype=torch.uint8)
for count in (64, 8192):
    images = every[:count]
    recipe = cache.Recipe(layers=("mid",), pool=4, precision="fp32")
    wanted = cache.plan(images, torch.zeros(count, dtype=torch.long), ["a"], "d", recipe, cache_dir=Path(sys.argv[1]) / str(count), offline=True, device="cpu")
    extract.build(wanted, lambda text: None)
    assert sum(len(part) for part in cache.open_cache(wanted).chunks("mid", 512)) == count
    # not getrusage: its peak includes that of the process that started this one
    print([int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0])
"""
    done = subprocess.run(
        [*command()[:1], "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, done.stdout.split())
    assert last - first < 14, (
        f"{first:.0f} and {last:.0f} MiB: the features of 8 192 images take 28 MiB"
    )
