"""Folders that users have: other architectures than Stable Diffusion 1.5's, against diffusers' own
classes, with random weights at small widths; other files than a single one of safetensors; and
damaged descriptions.

docs/backbone.md has a table of these.
"""

import json
import re
import shlex
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from semanticfl_ref.diffusion.backbone import Backbone, image_noise
from semanticfl_ref.diffusion.model_files import WEIGHTS, locate
from semanticfl_ref.diffusion.modules import unet_layers
from semanticfl_ref.diffusion.text import TextEncoder
from semanticfl_ref.errors import DataError

OPTIONS = {"timestep": 150, "seed": 3}
STEM = "diffusion_pytorch_model"
FOUR = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 8}
SD_1 = {"unet": {**FOUR, "cross_attention_dim": 64, "attention_head_dim": 2}}
SD_2 = {
    "unet": {
        **FOUR,
        "cross_attention_dim": 1024,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "text": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
}
DISTILLED = {
    "unet": {
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 4,
        "sample_size": 8,
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    }
}
OTHER_VAE = {**SD_1, "vae": {"scaling_factor": 0.36, "shift_factor": 0.25, "use_quant_conv": False}}
ARCHITECTURES = {
    "Stable Diffusion 1.5": (SD_1, "PNDMScheduler", {"skip_prk_steps": True}),
    "Stable Diffusion 2.1": (SD_2, "DDIMScheduler", {"prediction_type": "v_prediction"}),
    "SD-Turbo": (SD_2, "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "distilled, no middle block": (DISTILLED, "DDIMScheduler", {}),
    "VAE with a shift, without quant_conv": (OTHER_VAE, "DDIMScheduler", {}),
}


def write_folder(folder, model_folder, parts, scheduler, options):
    """A model folder of that architecture, as diffusers saves it."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    shutil.copytree(model_folder, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = {"unet": diffusers.UNet2DConditionModel(**parts["unet"])}
        if "vae" in parts:
            config = diffusers.AutoencoderKL.load_config(folder / "vae")
            made["vae"] = diffusers.AutoencoderKL.from_config({**config, **parts["vae"]})
        if "text" in parts:
            config = CLIPTextConfig.from_pretrained(folder / "text_encoder").to_dict()
            made["text_encoder"] = CLIPTextModel(
                CLIPTextConfig(**{**config, **parts["text"], "num_hidden_layers": 1})
            )
    for part, module in made.items():
        shutil.rmtree(folder / part)
        module.save_pretrained(folder / part)
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    getattr(diffusers, scheduler)(**schedule, **options).save_pretrained(folder / "scheduler")
    return folder


@torch.no_grad()
def plain_features(folder, images, scheduler, hidden):
    """The latent and every block by diffusers' own classes and full forward."""
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    signals = getattr(diffusers, scheduler).from_pretrained(folder / "scheduler").alphas_cumprod
    latent = vae.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
    latent = (latent - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    found = {"vae": latent.mean((2, 3))}
    for name, module in unet_layers(unet).items():
        if re.fullmatch(r"mid|(down|up)\.\d", name):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: found.update(
                    {name: (output[0] if isinstance(output, tuple) else output).mean((2, 3))}
                )
            )
    signal, noise = signals[150], image_noise(images, latent.shape[1:], 3, "noise/150")
    noised = latent * signal.sqrt() + noise * (1 - signal).sqrt()
    unet(noised, 150, hidden.expand(len(images), -1, -1))
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_gives_what_diffusers_gives(model_folder, tmp_path, images, name):
    parts, scheduler, options = ARCHITECTURES[name]
    folder = write_folder(tmp_path / "model", model_folder, parts, scheduler, options)
    backbone = Backbone(folder, layers=["all"], offline=True)
    hidden, text = TextEncoder(folder).encode([""])
    assert text.shape == (1, parts["unet"]["cross_attention_dim"])
    features = backbone.features(images[:3], **OPTIONS)
    expected = plain_features(folder, images[:3], scheduler, hidden)
    assert features.keys() == expected.keys()
    assert ("mid" in features) == (parts is not DISTILLED)
    for layer, values in expected.items():
        torch.testing.assert_close(features[layer], values, rtol=1e-4, atol=1e-5)
    assert {layer: values.shape[1] for layer, values in features.items()} == backbone.widths()


@pytest.fixture
def folder(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def expected(model_folder, images):
    return features_of(model_folder, images)


def features_of(folder, images):
    """The latent, a U-Net layer and the empty caption: what each part with weights gives."""
    backbone = Backbone(folder, layers=["vae", "up.0"], offline=True)
    return {**backbone.features(images[:3], **OPTIONS), "text": backbone.null_prompt}


def same(one, other) -> bool:
    return all(torch.equal(one[layer], other[layer]) for layer in one)


def in_shards(file, form: str, index: str, stale: bool = False):
    """Replace a weight file by two shards and their index, and by a third shard of no index."""
    stored = list(load_file(file).items())
    names = [form.format(number) for number in ("00001-of-00002", "00002-of-00002")]
    for i, name in enumerate(names):
        save_file(dict(stored[i::2]), file.with_name(name), metadata={"format": "pt"})
    shards = {name: names[i % 2] for i, (name, _) in enumerate(stored)}
    file.with_name(index).write_text(json.dumps({"weight_map": shards}))
    file.with_name(form.format("00003-of-00003")).write_bytes(b"stale")
    file.unlink()


@pytest.mark.parametrize(
    ("form", "index"),
    [
        ("{stem}-{{}}.safetensors", "{stem}.safetensors.index.json"),
        ("{stem}.fp16-{{}}.safetensors", "{stem}.safetensors.index.fp16.json"),
        ("{stem}-{{}}.fp16.safetensors", "{stem}.safetensors.index.fp16.json"),
        ("{stem}.bf16-{{}}.safetensors", "{stem}.bf16.safetensors.index.json"),
    ],
)
def test_weights_are_what_their_index_says(folder, images, expected, form, index):
    for part, stem in WEIGHTS.items():
        in_shards(
            folder / part / f"{stem}.safetensors", form.format(stem=stem), index.format(stem=stem)
        )
    assert same(features_of(folder, images), expected)


def test_any_variant_is_read_fp16_first(folder, images, expected):
    for part, stem in WEIGHTS.items():
        file = folder / part / f"{stem}.safetensors"
        file.rename(file.with_name(f"{stem}.bf16.safetensors"))
    assert same(features_of(folder, images), expected)
    for part, stem in WEIGHTS.items():
        file = folder / part / f"{stem}.bf16.safetensors"
        file.rename(file.with_name(f"{stem}.fp16.safetensors"))
        for other in ("", ".bf16", ".non_ema"):
            file.with_name(f"{stem}{other}.safetensors").write_bytes(b"nothing may read this")
    assert same(features_of(folder, images), expected)


@pytest.mark.parametrize("part", WEIGHTS)
def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    folder, images, expected, part
):
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    pickled = "pytorch_model.bin" if part == "text_encoder" else f"{WEIGHTS[part]}.bin"
    torch.save(load_file(file), file.with_name(pickled))
    file.unlink()
    with pytest.raises(DataError, match=f"{pickled} can run code; convert it with: ") as caught:
        locate(folder)
    python, flag, code = shlex.split(str(caught.value).partition("convert it with: ")[2])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert same(features_of(folder, images), expected)


def test_a_git_lfs_pointer_is_named(folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167534\n")
    with pytest.raises(DataError, match=r"unet.* is a git-LFS pointer.*git lfs pull"):
        locate(folder)


def test_a_single_file_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    """The command is not run: diffusers' loader fetches the architecture's description."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "v1-5-pruned.safetensors").write_bytes(b"weights")
    for name in ("models/v1-5-pruned.safetensors", "./models/v1-5-pruned.safetensors"):
        with pytest.raises(DataError, match="is a single file") as caught:
            locate(name)
        command = str(caught.value).partition("convert it with: ")[2].partition(" and use ")[0]
        code = shlex.split(command)[2]
        assert name in code and "save_pretrained('models/v1-5-pruned')" in code
        assert "diffusers.StableDiffusionPipeline.from_single_file" in code
    with pytest.raises(DataError, match="models/not-there does not exist"):
        locate("models/not-there")


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("unet/config.json", "layers_per_block"),
        ("unet/config.json", "transformer_layers_per_block"),
        ("vae/config.json", "layers_per_block"),
        ("unet/config.json", "cross_attention_dim"),
        ("text_encoder/config.json", "num_hidden_layers"),
        ("text_encoder/config.json", "vocab_size"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
    ],
)
def test_absurd_sizes_are_refused_at_once(folder, file, field):
    description = folder / file
    config = json.loads(description.read_text())
    description.write_text(json.dumps({**config, field: 10**9}))
    began = time.perf_counter()
    with pytest.raises(DataError, match=rf"{file.split('/')[0]} of the model folder .* read"):
        TextEncoder(folder)
        Backbone(folder, layers=["vae"], offline=True)
    assert time.perf_counter() - began < 20
