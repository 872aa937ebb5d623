"""The backbone against diffusers' own forward, and against what must not happen to images, hooks
and generators.
"""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch

from semanticfl_ref.device import resolve_precision, vae_precision
from semanticfl_ref.diffusion.backbone import (
    Backbone,
    PassOptions,
    image_noise,
    resolve_layers,
    scale_images,
)
from semanticfl_ref.diffusion.modules import unet_layers
from semanticfl_ref.diffusion.text import captions
from semanticfl_ref.errors import NonFiniteError, UserError

OPTIONS = {"timestep": 150, "seed": 3}


def hook_count(backbone):
    return sum(len(module._forward_hooks) for module in backbone.unet.modules())


def noise_of(images, shape, purpose):
    return image_noise(images, shape, OPTIONS["seed"], purpose)


def parameters(module):
    """Number of the parameters that are in memory."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)


@pytest.mark.parametrize("size", [32, 40], ids=["even", "odd"])
@pytest.mark.parametrize(
    "layers",
    [
        ["down.0.resnets.0"],
        ["down.1.attentions.1", "down.2"],
        ["mid.attentions.0"],
        ["vae", "down.3", "mid"],
        ["up.0"],
        ["up.1", "up.2", "up.3"],
        ["up.2.attentions.1", "up.1.resnets.2"],
    ],
    ids=lambda layers: layers[-1],
)
def test_early_stop_behind_a_pruned_unet_is_bitwise_the_full_forward(
    deep_folder, whole_unet, layers, size
):
    """Stable Diffusion's blocks; at 40 pixels the levels are 10, 5, 3 and 2 a side, where diffusers
    treats the last up-block differently.
    """
    source = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=source)
    early = Backbone(deep_folder, layers=layers, offline=True)
    full = copy.copy(whole_unet)
    full.deepest = None
    expected = full.features(images, prompt_embedding=full.null_prompt, **OPTIONS)
    found = early.features(images, prompt_embedding=full.null_prompt, **OPTIONS)
    assert list(found) == layers
    assert all(torch.equal(found[layer], expected[layer]) for layer in layers)
    assert {layer: values.shape[1] for layer, values in found.items()} == early.widths()
    assert hook_count(early) == 0


@pytest.fixture(scope="module")
def whole_unet(deep_folder):
    """Every layer of the deep model selected, nothing cut off."""
    latent_alone = Backbone(deep_folder, layers=["vae"], offline=True)
    layers = ["vae", *unet_layers(latent_alone.unet)]
    whole = Backbone(deep_folder, layers=layers, offline=True, whole=True)
    whole.null_prompt  # noqa: B018 (kept by every copy)
    return whole


def test_layers_are_named_in_the_order_in_which_they_end(whole_unet, images):
    names = list(whole_unet.layers)
    assert len(names) == 1 + (4 * 2 + 3 * 2 + 4) + (2 + 1 + 1) + (4 * 3 + 3 * 3 + 4)
    ended, handles = ["vae"], []
    for name, module in unet_layers(whole_unet.unet).items():
        handles.append(module.register_forward_hook(lambda *_, name=name: ended.append(name)))
    whole = copy.copy(whole_unet)
    whole.batch = 1
    whole.features(images[:1], **OPTIONS)
    for handle in handles:
        handle.remove()
    assert ended == names


def test_the_pruned_unet_is_smaller_by_what_lies_behind(deep_folder, whole_unet):
    sizes = {}
    for layer in ("down.0", "down.3", "mid", "up.0", "up.3"):
        backbone = Backbone(deep_folder, layers=[layer], offline=True)
        sizes[layer] = parameters(backbone.unet)
        assert backbone.unet.num_parameters() == parameters(whole_unet.unet) > sizes[layer]
        assert f"U-Net up to {layer}: " in backbone.memory()
    assert list(sizes.values()) == sorted(sizes.values())
    blocks = {f"up.{i}": parameters(block) for i, block in enumerate(whole_unet.unet.up_blocks)}
    assert sizes["up.3"] - sizes["up.0"] == blocks["up.1"] + blocks["up.2"] + blocks["up.3"]
    alone = Backbone(deep_folder, layers=["vae"], offline=True)
    assert all(parameter.is_meta for parameter in alone.unet.parameters())
    assert "0.0 of" in alone.memory()


def test_early_stop_leaves_out_what_lies_beyond(model_folder, images):
    backbone = Backbone(model_folder, layers=["mid"], offline=True, whole=True)
    backbone.unet.up_blocks[0].register_forward_pre_hook(
        lambda *_: pytest.fail("a block beyond the deepest layer ran")
    )
    assert backbone.features(images, **OPTIONS)["mid"].shape == (12, 112)
    backbone = Backbone(model_folder, layers=["vae"], offline=True)
    backbone.unet.register_forward_pre_hook(
        lambda *_: pytest.fail("the latent alone needs no U-Net")
    )
    assert backbone.features(images, vae_pool=2, **OPTIONS)["vae"].shape == (12, 16)


@torch.no_grad()
def test_layers_equal_hooks_on_diffusers_own_pipeline_parts(model_folder, backbone, images):
    """The whole chain once more with diffusers' own loading and plain calls; the noise is taken
    from the backbone, at the size of its passes.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(model_folder / "vae")
    unet = UNet2DConditionModel.from_pretrained(model_folder / "unet")
    filled = images[torch.arange(backbone.batch).clamp(max=len(images) - 1)]
    pixels = filled.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    latent = vae.encode(pixels).latent_dist.mean * 0.7
    noise = noise_of(filled, latent.shape[1:], "noise/150")
    deviations = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    signal = (1 - deviations.square()).cumprod(0)[150]
    assert float(signal) == pytest.approx(
        float(backbone.scheduler.alphas_cumprod[150]), rel=1e-5
    ), "t is the noise level"
    start, end = backbone_tokens(model_folder)
    tokens = torch.full((1, 32), end)
    tokens[0, 0] = start
    encoder = CLIPTextModel.from_pretrained(model_folder / "text_encoder").float()
    hidden = encoder(tokens).last_hidden_state.expand(len(filled), -1, -1)
    seen = {}

    def keep(layer, _module, _inputs, output):
        seen[layer] = output[0] if isinstance(output, tuple) else output

    modules = {"down.1": unet.down_blocks[1], "mid": unet.mid_block, "up.0": unet.up_blocks[0]}
    for layer, module in modules.items():
        module.register_forward_hook(partial(keep, layer))
    unet(latent * signal.sqrt().float() + noise * (1 - signal).sqrt().float(), 150, hidden)
    features = backbone.features(images, **OPTIONS)
    for layer, values in {"vae": latent, **seen}.items():
        expected = values[: len(images)].mean((2, 3))
        torch.testing.assert_close(features[layer], expected, rtol=1e-4, atol=1e-4)


def backbone_tokens(folder) -> tuple[int, int]:
    """Start and end of a caption; the empty one is a start and ends, which also fill it up."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return tokenizer.bos_token_id, tokenizer.eos_token_id


def test_the_noise_level_is_the_timestep(backbone, images, monkeypatch):
    """The input of the U-Net is the clean latent times sqrt(alphas_cumprod[t]), plus noise: nearly
    all of it at 0, next to nothing at 999.
    """
    noised, distributions = [], []
    encode = backbone.vae.encode

    def forward(inputs, *_args, **_options):
        noised.append(inputs)
        return (inputs,)

    def encode_and_keep(values):
        distributions.append(encode(values))
        return distributions[-1]

    monkeypatch.setattr(backbone.unet, "forward", forward)
    monkeypatch.setattr(backbone.vae, "encode", encode_and_keep)
    prompts = backbone.null_prompt.expand(12, -1, -1)
    for timestep, low, high in ((0, 0.999, 1), (150, 0.7, 0.9), (999, 0, 0.01)):
        backbone.pass_once(images, [prompts], PassOptions(timestep=timestep, seed=OPTIONS["seed"]))
        clean = distributions[-1].latent_dist.mean * 0.7
        noise = noise_of(images, clean.shape[1:], f"noise/{timestep}")
        signal = backbone.scheduler.alphas_cumprod[timestep]
        expected = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        torch.testing.assert_close(noised[-1], expected, rtol=1e-5, atol=1e-5)
        assert low < signal < high


def test_features_do_not_depend_on_batch_or_order(backbone, images):
    """Every pass has the same size, so what is left is rounding by place (none where this was
    written): below 2e-6 of the largest value.
    """
    whole = backbone.features(images, **OPTIONS)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = backbone.features(images[order], **OPTIONS)
    alone = backbone.features(images[5:6], **OPTIONS)
    backbone.batch = 8  # another size of pass, which users cannot choose: a looser bound
    small = backbone.features(images, **OPTIONS)
    for layer, values in whole.items():
        bound = values.abs().max() * 2e-6
        assert (shuffled[layer] - values[order]).abs().max() <= bound
        assert (alone[layer] - values[5:6]).abs().max() <= bound
        assert (small[layer] - values).abs().max() <= 10 * bound


def test_own_prompts_reach_the_unet_in_their_order(backbone, text_encoder, images):
    hidden = text_encoder.encode(captions("a photo of a {}", ["one", "two"]))[0]
    labels = torch.arange(12) % 2
    mixed = backbone.features(images, prompt_embedding=hidden[labels], **OPTIONS)["up.0"]
    for label in (0, 1):
        single = backbone.features(images, prompt_embedding=hidden[label], **OPTIONS)["up.0"]
        own, other = labels == label, labels != label
        torch.testing.assert_close(mixed[own], single[own], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mixed[other], single[other], rtol=1e-4, atol=1e-4)


def test_noise_follows_content_seed_and_timestep(backbone, images):
    base = backbone.features(images[:2], **OPTIONS)["mid"]
    assert not torch.equal(base, backbone.features(images[:2], timestep=150, seed=4)["mid"])
    assert not torch.equal(base, backbone.features(images[:2], timestep=151, seed=3)["mid"])
    twins = backbone.features(images[[0, 0]], **OPTIONS)["mid"]
    torch.testing.assert_close(twins[0], twins[1], rtol=1e-5, atol=1e-6)


def test_the_vae_sees_minus_one_to_one_once(backbone, monkeypatch):
    seen = []
    encode = backbone.vae.encode

    def encode_and_keep(values):
        seen.append(values)
        return encode(values)

    monkeypatch.setattr(backbone.vae, "encode", encode_and_keep)
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    images[1], images[2] = 255, 128
    backbone.features(images, **OPTIONS)
    assert seen[0].shape == (16, 3, 32, 32) and seen[0].dtype == torch.float32
    black, white, grey = seen[0][:3, 0, 0, 0].tolist()
    assert (black, white) == (-1, 1) and grey == pytest.approx(128 / 127.5 - 1, abs=1e-6)
    backbone.features(images[:, ::2, ::2], input_size=32, **OPTIONS)  # resized, and still in range
    assert seen[1].shape == (16, 3, 32, 32)
    assert float(seen[1].min()) == -1 and float(seen[1].max()) == 1


def test_hooks_are_gone_after_an_exception(backbone, images, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("broken block")

    monkeypatch.setattr(backbone.unet.mid_block, "forward", broken)
    with pytest.raises(RuntimeError, match="broken block"):
        backbone.features(images, **OPTIONS)
    assert hook_count(backbone) == 0
    monkeypatch.undo()
    backbone.features(images, **OPTIONS)
    assert hook_count(backbone) == 0


@pytest.mark.parametrize("layer", ["vae", "down.0", "mid"])
def test_a_non_finite_image_is_named_with_its_first_layer(model_folder, images, layer):
    backbone = Backbone(model_folder, layers=["down.0", "mid"], offline=True)

    def spoil(_module, _inputs, output):
        (output[0] if isinstance(output, tuple) else output)[4] = float("nan")

    modules = {"vae": backbone.vae.quant_conv, **unet_layers(backbone.unet)}
    modules[layer].register_forward_hook(spoil)
    message = rf"image 104, layer {layer}: .* in fp32; use diffusion\.precision=fp32"
    with pytest.raises(NonFiniteError, match=message):
        backbone.features(images, first=100, **OPTIONS)


def test_a_sampled_latent_is_keyed_by_content_and_seed(backbone, images):
    mean, sample = (
        backbone.features(images, latent=latent, **OPTIONS) for latent in ("mean", "sample")
    )
    assert not torch.equal(mean["vae"], sample["vae"])
    again = backbone.features(images[3:5], latent="sample", **OPTIONS)
    assert (again["vae"] - sample["vae"][3:5]).abs().max() <= sample["vae"].abs().max() * 2e-6
    other_seed = backbone.features(images, latent="sample", timestep=150, seed=4)
    assert not torch.equal(other_seed["vae"], sample["vae"])
    found = backbone.vae.encode(scale_images(images, 0)).latent_dist
    noise = noise_of(images, found.mean.shape[1:], "vae-sample")
    expected = ((found.mean + found.std * noise) * 0.7).mean((2, 3))
    torch.testing.assert_close(sample["vae"], expected, rtol=1e-4, atol=1e-5)


def test_text_is_the_pooled_output_of_the_caption(text_encoder):
    hidden, pooled = text_encoder.encode(captions("a photo of a {}", ["one", "letter_a"]))
    tokens = text_encoder.tokenizer(
        ["a photo of a letter a"], padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    torch.testing.assert_close(pooled[1:], text_encoder.model(tokens).pooler_output)
    assert hidden.shape == (2, 32, 64) and pooled.shape == (2, 64)
    assert pooled.dtype == hidden.dtype == torch.float32
    many = text_encoder.encode(["zero"] * 65)[1]
    torch.testing.assert_close(many[64], many[0])


def test_bf16_is_near_fp32(model_folder, backbone, images):
    in_bf16 = Backbone(model_folder, layers=["mid"], precision="bf16", offline=True)
    half = in_bf16.features(images, **OPTIONS)["mid"]
    full = backbone.features(images, **OPTIONS)["mid"]
    assert half.dtype == torch.float32
    assert (half - full).norm() / full.norm() < 0.03


def test_loading_leaves_the_global_generator_alone(model_folder, images):
    before = torch.get_rng_state()
    Backbone(model_folder, layers=["mid"], offline=True).features(images[:1], **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timestep": 1000, "seed": 0}, "timestep = 1000 is outside"),
        ({"timestep": -1, "seed": 0}, "timestep = -1 is outside"),
        ({"timestep": 1, "seed": 0, "pool": 9}, "has 4 cells per side; choose 1 ... 4"),
        ({"timestep": 1, "seed": 0, "pool": 6, "input_size": 36}, "has 5 cells per side"),
        ({"timestep": 1, "seed": 0, "vae_pool": 9}, "vae_pool = 9: .* the latent has 8 cells"),
        ({"timestep": 1, "seed": 0, "input_size": 30}, "to a multiple of 4"),
    ],
)
def test_options_out_of_range(backbone, images, options, message):
    with pytest.raises(UserError, match=message):
        backbone.features(images, **options)


def test_unknown_layer_and_prompt_without_a_place(model_folder):
    with pytest.raises(UserError, match="did you mean 'mid'"):
        Backbone(model_folder, layers=["midd"], offline=True)
    with pytest.raises(UserError, match="each once"):
        Backbone(model_folder, layers=["mid", "mid"], offline=True)
    with pytest.raises(UserError, match="no place for the class"):
        captions("a photo", ["one"])
    assert captions("a {class}, {}", ["sea_lion"]) == ["a sea lion, sea lion"]
    with pytest.raises(UserError, match="at least one"):
        Backbone(model_folder, layers=[], offline=True)
    names = ["vae", "down.0.resnets.0", "down.0", "mid.attentions.0", "mid"]
    assert resolve_layers(["all"], names) == ("vae", "down.0", "mid")


def test_precisions():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", cuda, "fp16") == "fp16"
    assert resolve_precision("auto", cpu, "fp16") in ("bf16", "fp32")
    assert resolve_precision("fp32", cuda, "fp16") == "fp32"
    assert vae_precision("fp32", cpu) == vae_precision("fp32", cuda) == "fp32"
    assert vae_precision("bf16", cpu) == "bf16"
    assert vae_precision("fp16", cuda) != "fp16", "the VAE overflows there"


def test_modules_import_neither_library():
    code = """
import sys
from semanticfl_ref.diffusion import anchors, backbone, extract, feature_cache
print([name for name in ("diffusers", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "precision, layout", [("bf16", torch.channels_last), ("fp32", torch.contiguous_format)]
)
def test_half_precision_is_channels_last(model_folder, precision, layout):
    """fp32 on a CPU gains nothing by it."""
    backbone = Backbone(model_folder, layers=["mid"], precision=precision, offline=True)
    for part in (backbone.unet, backbone.vae):
        kernels = [
            weight
            for weight in part.parameters()
            if weight.ndim == 4 and min(weight.shape[1], weight.shape[2]) > 1
        ]
        assert kernels and all(weight.is_contiguous(memory_format=layout) for weight in kernels)
