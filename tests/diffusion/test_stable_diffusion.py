"""Stable Diffusion 1.5's real architecture (random weights, 860 M parameters) through the command
line: build, kill, resume, train.

pytest -m heavy tests/diffusion/test_stable_diffusion.py -s
"""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from data.synthetic_archives import cifar_members, sha256, tar_gz
from processes import ROOT, command, environment
from safetensors.torch import load_file

from bench.random_model import write_model
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.model_files import fingerprint
from semanticfl_ref.diffusion.modules import parameters
from semanticfl_ref.run import setup as prepare

pytestmark = pytest.mark.heavy
SIZE = os.environ.get(
    "SEMANTICFL_HEAVY_MODEL", "sd15"
)  # "small" while one works on the test itself
IMAGES = 70  # one whole shard and six more
THREADS = int(
    os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
)  # features repeat bit for bit at equal threads
# pixels; the default 224 costs ten times as much and makes the same kind of odd sizes in the U-Net:
# 9, 5, 3, 2
INPUT = 72


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sd"), SIZE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An archive in CIFAR-10's format, and the flags that name it."""
    folder = tmp_path_factory.mktemp("cifar")
    archive = tar_gz(cifar_members(per_batch=IMAGES // 5))
    (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    return folder, [
        "--dataset",
        "cifar10",
        "--data-dir",
        str(folder),
        "--data-sha256",
        sha256(archive),
        "--offline",
        "--set",
        f"diffusion.input_size={INPUT}",
    ]


def run(cache, *arguments: str) -> subprocess.Popen:
    surroundings = {**environment(), "SEMANTICFL_CACHE": str(cache)}
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(cache, *arguments: str) -> tuple[str, str]:
    process = run(cache, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def built(sd, place, tmp_path_factory):
    """The cache's folder: its building was killed behind the first shard and resumed. And what the
    resumed command said.
    """
    cache = tmp_path_factory.mktemp("cache")
    flags = ["features", "build", *place[1], "--sd", str(sd), "--set", f"run.threads={THREADS}"]
    process = run(cache, *flags)
    while process.poll() is None and not list(cache.glob("caches/*/shard-*.safetensors")):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    first = next(cache.glob("caches/*/shard-00000.safetensors"))
    when = first.stat().st_mtime_ns
    assert not (first.parent / "cache.json").exists()
    _, err = finish(cache, *flags)
    assert first.stat().st_mtime_ns == when, "the shard before the kill was made again"
    assert f"feature cache of {IMAGES} images, 64 of them done before" in err and "images/s" in err
    print(
        "\n"
        + "\n".join(
            line
            for line in err.splitlines()
            if "U-Net" in line or ("images" in line and "features" not in line.split(":")[0])
        )
    )
    return cache, first.parent, err


@pytest.fixture
def as_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def test_the_bank_holds_what_the_whole_forward_gives(built, sd, place, as_many_threads):
    """Its last, resumed rows against the U-Net run to its end with nothing cut off: bitwise on this
    processor. In another order: within bf16's rounding.
    """
    settings = config.build(
        {
            "data.name": "cifar10",
            "data.dir": str(place[0]),
            "data.sha256": place[1][5],
            "diffusion.source": str(sd),
            "diffusion.input_size": INPUT,
        }
    )
    dataset = prepare.load_images(settings, offline=True)[0]
    manifest = json.loads((built[1] / "cache.json").read_text())
    assert (
        manifest["meta"]["weights_sha256"] == fingerprint(sd)
        and manifest["meta"]["timestep"] == 150
        and manifest["meta"]["input_size"] == INPUT
    )
    stored = load_file(built[1] / "shard-00001.safetensors")
    whole = Backbone.load(
        sd,
        layers=["up.1", "up.2", "up.3"],
        precision=manifest["meta"]["precision"],
        offline=True,
        pruned=False,
    )
    whole.stop_early = False
    seen = []
    encode = whole.vae.encode
    whole.vae.encode = lambda values: seen.append(values) or encode(values)
    features = whole.features(dataset.train_images[64:], timestep=150, seed=0, input_size=INPUT)
    assert all(torch.equal(features[layer].half(), stored[layer]) for layer in features) and set(
        features
    ) == set(stored)
    assert (
        seen[0].shape == (8, 3, INPUT, INPUT)
        and -1 <= seen[0].min() < -0.5
        and 0.5 < seen[0].max() <= 1
    )
    if SIZE == "sd15":
        assert whole.unet_parameters == parameters(whole.unet) == 859_520_964
        assert [values.shape[1] for values in features.values()] == [1280, 640, 320]
    shuffled = whole.features(
        dataset.train_images[64:].flip(0), timestep=150, seed=0, input_size=INPUT
    )
    for layer, values in features.items():
        assert (shuffled[layer].flip(0) - values).norm() <= 2e-2 * values.norm()


def test_the_pruned_unet_needs_less_memory(sd):
    """Peak memory of a process that loads the U-Net for `mid`, whole and pruned; both printed."""
    code = """
import sys
from pathlib import Path
from semanticfl_ref.diffusion.backbone import Backbone
backbone = Backbone.load(sys.argv[1], layers=["mid"], precision="bf16", offline=True, pruned=sys.argv[2] == "pruned")
print(backbone.memory() if sys.argv[2] == "pruned" else "U-Net whole")
print([int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0])
"""
    peaks = {}
    for kind in ("whole", "pruned"):
        done = subprocess.run(
            [*command()[:1], "-c", code, str(sd), kind],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        words, peak = done.stdout.splitlines()
        peaks[kind] = float(peak)
        print(f"\n{words}; peak memory of the process {peaks[kind]:.0f} MiB")
    if SIZE == "sd15":
        assert peaks["whole"] - peaks["pruned"] > 600


def test_train_uses_the_bank(built, sd, place, tmp_path):
    few = [
        "--clients",
        "2",
        "--clients-per-round",
        "2",
        "--rounds",
        "1",
        "--local-epochs",
        "1",
        "--set",
        "anchors.width=24",
        "--set",
        "anchors.aggregation=equal",
    ]
    before = {file: file.stat().st_mtime_ns for file in built[1].iterdir()}
    _, err = finish(
        built[0], "train", *place[1], "--sd", str(sd), *few, "--out", str(tmp_path / "run")
    )
    assert (
        "from the feature cache in the cache" in err
        and {file: file.stat().st_mtime_ns for file in built[1].iterdir()} == before
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"cache-{summary['anchors']['cache']}" == built[1].name and summary["anchors"][
        "layers"
    ] == [
        "up.1",
        "up.2",
        "up.3",
    ]
