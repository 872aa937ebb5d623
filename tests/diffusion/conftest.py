"""A random model in Stable Diffusion's folder layout, made once for all tests of this folder, and
images to describe.
"""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from cache_files import LABELS, NAMES, dataset_of, settings_for


@pytest.fixture(scope="module", autouse=True)
def small_passes():
    """The tests describe a dozen images: passes of 64 would be mostly filling."""
    from semanticfl_ref.diffusion import passes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "SMALL_PASS", 16)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    import make_tiny
    from diffusers import AutoencoderKL, DDPMScheduler

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
        unet = make_tiny.new_unet()
        text_encoder = make_tiny.new_text_encoder(tokenizer)
        make_tiny.save(folder, vae, unet, text_encoder, tokenizer, scheduler)
    return folder


@pytest.fixture(scope="session")
def deep_folder(model_folder, tmp_path_factory):
    """The same except for the U-Net, which has Stable Diffusion 1.5's blocks (two layers each,
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


@pytest.fixture(scope="module")
def loaded(model_folder):
    from semanticfl_ref.diffusion.backbone import Backbone

    return Backbone(model_folder, layers=["vae", "down.1", "mid", "up.0"], offline=True)


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
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=source)


@pytest.fixture(scope="module")
def small_shards(small_passes):
    """A dozen images in three shards, one pass each."""
    from semanticfl_ref.diffusion import feature_cache, passes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "SMALL_PASS", 4)
        patch.setattr(feature_cache, "SHARD", 4)
        yield


@pytest.fixture(scope="module")
def plan_for(model_folder, images, small_shards):
    """A function: a cache folder, and options of the section `diffusion` -> the plan of a cache."""
    from semanticfl_ref.diffusion.feature_cache import plan_cache

    def plan_for(
        folder,
        *,
        images=images,
        labels=LABELS,
        names=NAMES,
        seed=0,
        every_class=False,
        basis=None,
        **options,
    ):
        plan = plan_cache(
            dataset_of(images, labels, names),
            settings_for(model_folder, **options),
            seed=seed,
            device=torch.device("cpu"),
            folder=folder,
            offline=True,
            every_class=every_class,
            basis=basis,
        )
        return replace(plan, remedy="remake it")

    return plan_for


@pytest.fixture(scope="module")
def built(plan_for, tmp_path_factory):
    """The plan of a cache that has been built."""
    from semanticfl_ref.diffusion.extract import open_or_build

    plan = plan_for(tmp_path_factory.mktemp("cache"))
    open_or_build(plan)
    return plan


@pytest.fixture
def copied(built, plan_for, tmp_path):
    """The plan of a copy of that cache, in a cache folder of the test's own."""
    shutil.copytree(built.path, tmp_path / built.path.name)
    return plan_for(tmp_path)
