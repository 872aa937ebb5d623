"""A random model in Stable Diffusion's folder layout, made once for all tests of this folder, and
images to describe.
"""

import copy
import shutil

import pytest
import torch
from bank_files import LABELS, NAMES, RECIPE


@pytest.fixture(scope="session", autouse=True)
def small_passes():
    """The tests describe a dozen images: passes of 64 would be mostly filling."""
    from semanticfl_ref.diffusion.backbone import Backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "SMALL_PASS", 16)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from diffusers import AutoencoderKL, DDPMScheduler

    from semanticfl_ref.diffusion import make_tiny

    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.7,
        )
        tokenizer = make_tiny.make_tokenizer(folder / "words")
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        make_tiny.save(
            folder,
            vae,
            make_tiny.new_unet(),
            make_tiny.new_text_encoder(tokenizer),
            tokenizer,
            scheduler,
        )
    return folder


@pytest.fixture(scope="session")
def deep_folder(model_folder, tmp_path_factory):
    """The same but for the U-Net, which has Stable Diffusion 1.5's blocks (two layers each,
    attention in three of four levels) at small widths.
    """
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(model_folder, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8, 16, 16),
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder):
    from semanticfl_ref.diffusion.backbone import Backbone

    return Backbone.load(model_folder, layers=["vae", "down.1", "mid", "up.0"], offline=True)


@pytest.fixture(scope="session")
def text_encoder(model_folder):
    from semanticfl_ref.diffusion.text import TextEncoder

    return TextEncoder(model_folder)


@pytest.fixture
def backbone(loaded):
    """The loaded model; what a test changes on it is its own."""
    return copy.copy(loaded)


@pytest.fixture(scope="session")
def images():
    return torch.randint(
        0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module")
def small_shards(small_passes):
    """A dozen images in three shards, one pass each."""
    from semanticfl_ref.diffusion import extract
    from semanticfl_ref.diffusion import feature_cache as cache
    from semanticfl_ref.diffusion.backbone import Backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "SMALL_PASS", 4)
        for module in (cache, extract):
            patch.setattr(module, "SHARD", 4)
        yield


@pytest.fixture(scope="module")
def want(model_folder, images, small_shards):
    """A function: options of a recipe -> the plan of its cache."""
    from semanticfl_ref.diffusion.feature_cache import Recipe, plan

    def want(cache_dir, **options):
        given = {"source": str(model_folder), **RECIPE} | options
        chosen = given.pop("images", images)
        return plan(
            chosen,
            given.pop("labels", LABELS),
            given.pop("names", NAMES),
            "data",
            Recipe(**given),
            cache_dir=cache_dir,
            offline=True,
            device="cpu",
            remedy="remake it",
        )

    return want


@pytest.fixture(scope="module")
def made(want, tmp_path_factory):
    from semanticfl_ref.diffusion.feature_cache import open_or_build

    wanted = want(tmp_path_factory.mktemp("cache"))
    open_or_build(wanted)
    return wanted


@pytest.fixture
def cached(made, want, tmp_path):
    """The plan of a finished cache in a cache folder of the test's own."""
    shutil.copytree(made.path, tmp_path / made.path.name)
    return want(tmp_path)
