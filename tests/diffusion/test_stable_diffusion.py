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
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.model_files import fingerprint
from semanticfl_ref.run.setup import load_images

pytestmark = pytest.mark.heavy
# "small" while one works on the test itself.
SIZE = os.environ.get("SEMANTICFL_HEAVY_MODEL", "sd15")
IMAGES = 70  # one whole shard and six more
# Features repeat bit for bit at equal threads.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
# Pixels; the default 224 costs ten times as much and makes the same kind of odd sizes in the U-Net:
# 9, 5, 3, 2.
INPUT = 72
CELLS = 6  # per side, of the latent's 9


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sd"), SIZE)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The settings of an archive in CIFAR-10's format."""
    folder = tmp_path_factory.mktemp("cifar")
    content = tar_gz(cifar_members(per_batch=IMAGES // 5))
    (folder / "cifar-10-python.tar.gz").write_bytes(content)
    return {"data.name": "cifar10", "data.dir": str(folder), "data.sha256": sha256(content)}


@pytest.fixture(scope="module")
def flags(archive, sd):
    """The archive and the model as flags."""
    settings = {
        **archive,
        "diffusion.source": str(sd),
        "diffusion.input_size": INPUT,
        "diffusion.vae_pool": CELLS,
        "run.threads": THREADS,
    }
    assignments = [word for name in settings for word in ("--set", f"{name}={settings[name]}")]
    return ["--offline", *assignments]


def start(cache, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env={**environment(), "SEMANTICFL_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(cache, *arguments: str) -> tuple[str, str]:
    process = start(cache, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def built(flags, tmp_path_factory):
    """The cache folder and the cache in it, whose building was killed behind the first shard and
    resumed.
    """
    cache = tmp_path_factory.mktemp("cache")
    process = start(cache, "features", "build", *flags)
    while process.poll() is None and not list(cache.glob("features/*/shard-*.safetensors")):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    first = next(cache.glob("features/*/shard-00000.safetensors"))
    when = first.stat().st_mtime_ns
    assert not (first.parent / "manifest.json").exists()
    _, err = finish(cache, "features", "build", *flags)
    assert first.stat().st_mtime_ns == when, "the shard before the kill was built again"
    assert f"feature cache of {IMAGES} images, 64 of them already done" in err
    for line in err.splitlines():
        if "U-Net" in line or ("images" in line and "features" not in line.split(":")[0]):
            print(f"\n{line}")
    return cache, first.parent


@pytest.fixture
def as_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def test_the_cache_holds_what_the_whole_forward_gives(built, sd, archive, as_many_threads):
    """Its last, resumed rows against the U-Net run to its end with nothing cut off: bitwise on this
    processor. In another order: within bf16's rounding.
    """
    dataset, _ = load_images(resolve(archive), offline=True)
    images = dataset.train_images[64:]
    manifest = json.loads((built[1] / "manifest.json").read_text())
    assert manifest["meta"]["weights_sha256"] == fingerprint(sd)
    assert manifest["meta"]["timestep"] == 150 and manifest["meta"]["input_size"] == INPUT
    stored = load_file(built[1] / "shard-00001.safetensors")
    whole = Backbone(
        sd,
        layers=["vae", "up.1", "up.2", "up.3"],
        precision=manifest["meta"]["precision"],
        offline=True,
        whole=True,
    )
    whole.deepest = None
    seen = []
    encode = whole.vae.encode

    def encode_and_keep(values):
        seen.append(values)
        return encode(values)

    whole.vae.encode = encode_and_keep
    options = {"timestep": 150, "seed": 0, "input_size": INPUT, "vae_pool": CELLS}
    features = whole.features(images, **options)
    assert set(features) == set(stored)
    assert all(torch.equal(features[layer].half(), stored[layer]) for layer in features)
    assert seen[0].shape == (8, 3, INPUT, INPUT)
    assert -1 <= seen[0].min() < -0.5 and 0.5 < seen[0].max() <= 1
    if SIZE == "sd15":
        parameters = sum(parameter.numel() for parameter in whole.unet.parameters())
        assert whole.unet.num_parameters() == parameters == 859_520_964
        assert [values.shape[1] for values in features.values()] == [144, 1280, 640, 320]
    shuffled = whole.features(images.flip(0), **options)
    for layer, values in features.items():
        assert (shuffled[layer].flip(0) - values).norm() <= 2e-2 * values.norm()


def test_the_pruned_unet_needs_less_memory(sd):
    """Peak memory of a process that loads the U-Net for `mid`, whole and pruned; both printed."""
    code = """
import sys
from pathlib import Path
from semanticfl_ref.diffusion.backbone import Backbone
pruned = sys.argv[2] == "pruned"
backbone = Backbone(
    sys.argv[1], layers=["mid"], precision="bf16", offline=True, whole=not pruned
)
print(backbone.memory() if pruned else "U-Net whole")
status = Path("/proc/self/status").read_text().splitlines()
print([int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")][0])
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


def test_train_uses_the_cache(built, flags, tmp_path):
    cache, folder = built
    few = [
        *("--clients", "2", "--clients-per-round", "2", "--rounds", "1", "--local-epochs", "1"),
        *("--set", "anchors.width=24", "--set", "anchors.aggregation=equal"),
    ]
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    _, err = finish(cache, "train", *flags, *few, "--out", str(tmp_path / "run"))
    assert "from the feature cache" in err
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    anchors = json.loads((tmp_path / "run" / "summary.json").read_text())["anchors"]
    assert f"features-{anchors['cache']}" == folder.name
    assert anchors["layers"] == ["vae", "up.1", "up.2", "up.3"]
