"""The backbone against diffusers' own forward, and against what must not happen to images, hooks and generators."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from semanticfl_ref.diffusion.backbone import Backbone, captions
from semanticfl_ref.errors import DataError, DownloadError, NonFiniteError, UserError

OPTIONS = {"timestep": 150, "seed": 3}


def hook_count(backbone):
    return sum(len(module._forward_hooks) for module in backbone.unet.modules())


def test_early_stop_is_bitwise_the_full_forward(backbone, images):
    early = backbone.features(images, **OPTIONS)
    backbone.stop_early = False
    full = backbone.features(images, **OPTIONS)
    assert list(early) == ["vae", "down.1", "mid", "up.0"]
    assert all(torch.equal(early[tap], full[tap]) for tap in early)


def test_early_stop_leaves_out_what_lies_beyond(model_folder, images):
    backbone = Backbone.load(model_folder, taps=["mid"], offline=True)
    backbone.unet.up_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("a block beyond the deepest tap ran"))
    assert backbone.features(images, **OPTIONS)["mid"].shape == (12, 112)
    backbone = Backbone.load(model_folder, taps=["vae"], offline=True)
    backbone.unet.register_forward_pre_hook(lambda *_: pytest.fail("the latent alone needs no U-Net"))
    assert backbone.features(images, pool=2, **OPTIONS)["vae"].shape == (12, 16)


@torch.no_grad()
def test_taps_equal_hooks_on_diffusers_own_forward(backbone, images):
    """The whole chain once more with plain calls; the noise is taken from the backbone, at the size of its passes."""
    from semanticfl_ref.diffusion.backbone import _noise

    fill = torch.arange(backbone.batch).clamp(max=len(images) - 1)
    latent = backbone.vae.encode(images[fill].permute(0, 3, 1, 2).float() / 255 * 2 - 1).latent_dist.mean * 0.7
    noise = torch.stack([_noise(image, latent.shape[1:], 150, 3) for image in images[fill]])
    share = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)[150]
    tokens = backbone.tokenizer([""], padding="max_length", max_length=32, return_tensors="pt").input_ids
    hidden = backbone.text_encoder(tokens).last_hidden_state.expand(len(fill), -1, -1)
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, tap=tap: seen.__setitem__(tap, out[0] if isinstance(out, tuple) else out))
        for tap, module in {"down.1": backbone.unet.down_blocks[1], "mid": backbone.unet.mid_block, "up.0": backbone.unet.up_blocks[0]}.items()
    ]
    backbone.unet(latent * share.sqrt().float() + noise * (1 - share).sqrt().float(), 150, hidden)
    for handle in handles:
        handle.remove()
    features = backbone.features(images, **OPTIONS)
    for tap, values in {"vae": latent, **seen}.items():
        torch.testing.assert_close(features[tap], values[: len(images)].mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batch_or_order(backbone, images):
    """Every pass has the same size, so what is left is rounding by place (none where this was written): below 2e-6 of the largest value."""
    whole = backbone.features(images, **OPTIONS)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = backbone.features(images[order], **OPTIONS)
    alone = backbone.features(images[5:6], **OPTIONS)
    backbone.batch = 8  # another size of pass, which the user cannot choose: looser
    small = backbone.features(images, **OPTIONS)
    for tap, values in whole.items():
        bound = values.abs().max() * 2e-6
        assert (shuffled[tap] - values[order]).abs().max() <= bound
        assert (alone[tap] - values[5:6]).abs().max() <= bound
        assert (small[tap] - values).abs().max() <= 10 * bound


def test_own_prompts_reach_the_unet_in_their_order(backbone, images):
    hidden = backbone.hidden(captions("a photo of a {}", ["one", "two"]))
    labels = torch.arange(12) % 2
    mixed = backbone.features(images, prompt_embedding=hidden[labels], **OPTIONS)
    for label in (0, 1):
        single = backbone.features(images, prompt_embedding=hidden[label], **OPTIONS)
        torch.testing.assert_close(mixed["up.0"][labels == label], single["up.0"][labels == label], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mixed["up.0"][labels != label], single["up.0"][labels != label], rtol=1e-4, atol=1e-4)


def test_noise_follows_content_seed_and_timestep(backbone, images):
    base = backbone.features(images[:2], **OPTIONS)["mid"]
    assert not torch.equal(base, backbone.features(images[:2], timestep=150, seed=4)["mid"])
    assert not torch.equal(base, backbone.features(images[:2], timestep=151, seed=3)["mid"])
    twins = backbone.features(images[[0, 0]], **OPTIONS)["mid"]
    torch.testing.assert_close(twins[0], twins[1], rtol=1e-5, atol=1e-6)


def test_the_vae_sees_minus_one_to_one_once(backbone, monkeypatch):
    seen = []
    encode = backbone.vae.encode
    monkeypatch.setattr(backbone.vae, "encode", lambda values: seen.append(values) or encode(values))
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    images[1], images[2] = 255, 128
    backbone.features(images, **OPTIONS)
    assert seen[0].shape == (16, 3, 32, 32) and seen[0].dtype == torch.float32
    assert [float(value) for value in seen[0][:3, 0, 0, 0]] == [-1.0, 1.0, pytest.approx(128 / 127.5 - 1, abs=1e-6)]
    backbone.features(images[:, ::2, ::2], input_size=32, **OPTIONS)  # resized, and still in range
    assert seen[1].shape == (16, 3, 32, 32) and float(seen[1].min()) == -1 and float(seen[1].max()) == 1


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


def test_a_non_finite_image_is_named(model_folder, images):
    backbone = Backbone.load(model_folder, taps=["down.0", "mid"], offline=True)
    encode = backbone.vae.encode

    def spoilt(values):
        result = encode(values)
        result.latent_dist.mean[4] = float("nan")
        return result

    backbone.vae.encode = spoilt
    with pytest.raises(NonFiniteError, match=r"image 104, tap down\.0"):
        backbone.features(images, first=100, **OPTIONS)


def test_text_is_the_pooled_output_of_the_caption(backbone):
    text = backbone.text(["one", "letter_a"], "a photo of a {}")
    tokens = backbone.tokenizer(["a photo of a letter a"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    torch.testing.assert_close(text[1:], backbone.text_encoder(tokens).pooler_output)
    assert text.shape == (2, 64) and text.dtype == torch.float32


def test_bf16_is_near_fp32(model_folder, backbone, images):
    half = Backbone.load(model_folder, taps=["mid"], dtype=torch.bfloat16, offline=True).features(images, **OPTIONS)["mid"]
    full = backbone.features(images, **OPTIONS)["mid"]
    assert half.dtype == torch.float32
    assert (half - full).norm() / full.norm() < 0.03


def test_loading_leaves_the_global_generator_alone(model_folder, images):
    before = torch.get_rng_state()
    Backbone.load(model_folder, taps=["mid"], offline=True).features(images[:1], **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timestep": 1000, "seed": 0}, "timestep 1000 is outside"),
        ({"timestep": -1, "seed": 0}, "timestep -1 is outside"),
        ({"timestep": 1, "seed": 0, "pool": 9}, "pool 9"),
        ({"timestep": 1, "seed": 0, "input_size": 30}, "multiples of 4"),
    ],
)
def test_options_out_of_range(backbone, images, options, message):
    with pytest.raises(UserError, match=message):
        backbone.features(images, **options)


def test_unknown_tap_and_prompt_without_a_place(model_folder):
    with pytest.raises(UserError, match="did you mean 'mid'"):
        Backbone.load(model_folder, taps=["midd"], offline=True)
    with pytest.raises(UserError, match="none twice"):
        Backbone.load(model_folder, taps=["mid", "mid"], offline=True)
    with pytest.raises(UserError, match="no place for the class"):
        captions("a photo", ["one"])
    assert captions("a {class}, {}", ["sea_lion"]) == ["a sea lion, sea lion"]


@pytest.mark.parametrize("name", ["runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base"])
def test_vanished_ids_name_their_successor(name):
    with pytest.raises(UserError, match="withdrawn.*--sd (stable-diffusion-v1-5|sd2-community)/") as caught:
        Backbone.load(name, taps=["mid"])
    assert caught.value.exit_code == 2


def forbid_sockets(monkeypatch):
    def forbidden(*_arguments, **_options):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", forbidden)


def test_missing_weights_offline_name_the_command_and_open_no_socket(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    forbid_sockets(monkeypatch)
    with pytest.raises(DownloadError, match=r"hf download somebody/model .*--include unet/diffusion_pytorch_model.safetensors") as caught:
        Backbone.load("somebody/model", taps=["mid"], offline=True)
    assert "--sd tiny" in str(caught.value) and caught.value.exit_code == 5


def test_a_local_folder_opens_no_socket(model_folder, images, monkeypatch):
    forbid_sockets(monkeypatch)
    Backbone.load(model_folder, taps=["mid"]).features(images[:1], **OPTIONS)


def test_no_network_is_a_download_error(monkeypatch, tmp_path):
    def unreachable(*_arguments, local_files_only=False, **_options):
        raise FileNotFoundError("not cached") if local_files_only else ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(DownloadError, match="could not be fetched .Name or service not known.*\n.*hf download somebody/model"):
        Backbone.load("somebody/model", taps=["mid"])


@pytest.mark.parametrize("part", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_named(model_folder, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    target = folder / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(DataError, match=f"lacks {part}"):
        Backbone.load(folder, taps=["mid"], offline=True)


def test_damaged_or_partial_weights_are_refused(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_in.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"unet of model folder .* has no weights for conv_in\.weight"):
        Backbone.load(folder, taps=["mid"], offline=True)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match="unet of model folder .* cannot be read"):
        Backbone.load(folder, taps=["mid"], offline=True)


def test_an_fp16_variant_folder_is_read(model_folder, tmp_path, backbone, images):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    variant = Backbone.load(folder, taps=backbone.taps, offline=True)
    assert torch.equal(variant.features(images[:4], **OPTIONS)["up.0"], backbone.features(images[:4], **OPTIONS)["up.0"])
    assert variant.fingerprint != backbone.fingerprint  # file names count


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Backbone.load(tmp_path / "none", taps=["mid"])


def test_modules_import_neither_library():
    code = "import sys; import semanticfl_ref.diffusion.backbone, semanticfl_ref.diffusion.bank, semanticfl_ref.diffusion.anchors; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_pooling_is_the_mean_of_cells(backbone, images):
    fine = backbone.features(images, pool=4, **OPTIONS)["mid"].view(12, 112, 4, 4)
    torch.testing.assert_close(F.avg_pool2d(fine, 2).flatten(1), backbone.features(images, pool=2, **OPTIONS)["mid"], rtol=1e-5, atol=1e-5)
