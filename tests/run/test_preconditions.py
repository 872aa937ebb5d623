"""What can be known before the work is refused before it: no image passes the model, and no method
is trained for nothing.
"""

import re

import pytest
import torch

from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.data.dataset import load_dataset
from semanticfl_ref.diffusion import model_files
from semanticfl_ref.errors import DataError, DownloadError, UserError
from semanticfl_ref.run import dry_run, setup, train
from semanticfl_ref.run.preconditions import check_anchors
from semanticfl_ref.run.setup import build_anchors, load_data, training_subset
from semanticfl_ref.tools.compare.experiment import run_grid
from semanticfl_ref.tools.compare.grid import Grid

DIGITS = {"data.name": "digits"}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def eighty():
    """Eighty training images of digits."""
    return training_subset(load_dataset(resolve(DIGITS).data), torch.arange(80))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Stable Diffusion is not on this machine, and no feature is extracted."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path))
    monkeypatch.setattr(setup, "open_or_build", lambda *_: pytest.fail("images passed the model"))

    def from_hub(name: str, offline: bool):
        raise DownloadError(name)

    monkeypatch.setattr(model_files, "_from_hub", from_hub)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "layer mid has 79 PCA components (80 images), 96 are requested"),
        ({"diffusion.layers": "vae,mid", "anchors.width": 160}, "anchors.width=128"),
        ({"diffusion.layers": "up.7"}, "unknown layer 'up.7'"),
        ({"diffusion.layers": "nonsense"}, "unknown layer 'nonsense'"),
        ({"diffusion.vae_pool": 40, "diffusion.layers": "vae"}, "choose 1 ... 8"),
        ({"diffusion.input_size": 30}, "a multiple of 4"),
        ({"diffusion.precision": "fp16"}, "use fp32 or bf16"),
        ({"diffusion.prompt": "a photo"}, "has no place for the class"),
        ({"diffusion.source": "./nowhere"}, "does not exist"),
    ],
)
def test_settings_that_no_anchor_can_be_made_with(eighty, settings, message):
    config = resolve({**DIGITS, "run.device": "cpu", **settings})
    with pytest.raises(UserError, match=re.escape(message)):
        check_anchors(config, eighty)


def test_the_value_that_a_message_names_works(eighty):
    paper = {**DIGITS, "diffusion.source": SD15, "diffusion.layers": "up.1,up.2,up.3"}
    paper |= {"anchors.width": 512, "anchors.aggregation": "256-128-128"}
    with pytest.raises(UserError) as caught:
        check_anchors(resolve(paper), eighty)
    named = dict(re.findall(r"--set (\S+?)=(\w+)", str(caught.value)))
    assert named == {"anchors.width": "237", "anchors.aggregation": "equal"}
    check_anchors(resolve({**paper, **named}), eighty)
    with pytest.raises(UserError, match="240"):
        check_anchors(resolve({**paper, **named, "anchors.width": 240}), eighty)


def test_a_class_without_images_has_no_anchor_of_its_own(eighty):
    without = training_subset(eighty, eighty.train_labels != 3)
    settings = {**DIGITS, "anchors.width": 20}
    check_anchors(resolve(settings), without)
    with pytest.raises(UserError, match="class 3 has no image"):
        check_anchors(resolve({**settings, "anchors.per": "class"}), without)


@pytest.mark.parametrize("entry", ["train", "dry run", "build_anchors"])
def test_every_way_in_checks_first(entry, tmp_path):
    config = resolve({**DIGITS, "anchors.width": 4000})
    data = load_data(config)
    start = {
        "train": lambda: train.train(config, tmp_path / "run", data=data),
        "dry run": lambda: dry_run.dry_run(config, data),
        "build_anchors": lambda: build_anchors(config, data),
    }
    with pytest.raises(UserError, match=r"anchors\.width = 4000"):
        start[entry]()


def test_a_folder_of_anchor_images_is_looked_for_by_a_dry_run():
    with pytest.raises(DataError, match="there is no such folder"):
        dry_run.dry_run(resolve({**DIGITS, "anchors.images": "nowhere"}))


def test_the_device_comes_before_the_data(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "load_data", lambda *_, **__: pytest.fail("data were read"))
    config = resolve({**DIGITS, "run.device": "cuda"})
    with pytest.raises(UserError, match="finds no CUDA device; use run"):
        train.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="no CUDA device"):
        dry_run.dry_run(config)


def test_a_model_that_does_not_fit_is_refused_before_the_anchors(tmp_path):
    config = resolve({**DIGITS, "semanticfl.visual_head": False, "model.width": 4})
    with pytest.raises(UserError, match="visual_head = false needs anchors as wide"):
        train.train(config, tmp_path / "run")


def test_a_comparison_trains_nothing_if_one_of_its_methods_cannot_start(tmp_path):
    grid = Grid(
        methods=["fedavg", "semanticfl[anchors.width=4000]"],
        seeds=2,
        settings=DIGITS,
        out=tmp_path / "grid",
        baseline="fedavg",
    )
    with pytest.raises(UserError, match=r"semanticfl\[anchors\.width=4000\], nid1: anchors\.width"):
        run_grid(grid, lambda text: None)
    assert not list(tmp_path.glob("grid/runs/*"))
