"""A random model in Stable Diffusion's folder layout, made once for all tests of this folder, and images to describe."""

import copy

import pytest
import torch


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
        make_tiny.save(folder, vae, make_tiny.new_unet(), make_tiny.new_text_encoder(tokenizer), tokenizer, scheduler)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder):
    from semanticfl_ref.diffusion.backbone import Backbone

    return Backbone.load(model_folder, taps=["vae", "down.1", "mid", "up.0"], offline=True)


@pytest.fixture
def backbone(loaded):
    """The loaded model; what a test changes on it is its own."""
    return copy.copy(loaded)


@pytest.fixture(scope="session")
def images():
    return torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
