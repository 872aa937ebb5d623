"""Fused norms against diffusers' own modules and forward, and where a backbone has them."""

import copy

import pytest
import torch
from torch import nn

from semanticfl_ref.diffusion import backbone as backbone_module
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.fused_norms import FusedGroupNorm, SiLUOfVectors, fuse_norms
from semanticfl_ref.kernels.dispatch import IMPORT_ERROR

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(IMPORT_ERROR is not None, reason="no Triton")
OPTIONS = {"timestep": 150, "seed": 3}
DTYPES = {torch.float64: ("auto", 1e-12), torch.float32: ("triton", 1e-5)}


@pytest.fixture(params=DTYPES, ids=str)
def precision(request) -> tuple:
    """A dtype, the implementation that computes in it, and the error allowed: in float64 that is
    torch, so that nothing but the replacement counts.
    """
    if request.param == torch.float32:
        pytest.importorskip("triton")
    return request.param, *DTYPES[request.param]


def test_a_vae_encoder(precision):
    """Residual blocks with and without a shortcut, attention, and the norm before the last
    convolution.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    plain, fused = pair(vae.encoder, precision)
    assert_equal_results(plain, fused, precision, (normal(1, 3, 20, 24),))
    kinds = silu_of_norms(fused)
    assert kinds.pop("conv_norm_out") and not kinds.pop("mid_block.attentions.0.group_norm")
    assert len(kinds) == 8 and all(kinds.values())
    assert all(block.conv1.bias is None for block in residual_blocks(fused))


def test_a_unet(precision):
    """Also the SiLU of the timestep's embedding, and the norms of the transformers."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    plain, fused = pair(unet, precision)
    inputs = (normal(2, 4, 4, 6), torch.tensor([3, 800]), normal(2, 5, 12))
    assert_equal_results(plain, fused, precision, inputs)
    kinds = silu_of_norms(fused)
    assert all(has_silu != name.endswith(".norm") for name, has_silu in kinds.items())
    assert sum(kinds.values()) == 17 and list(kinds.values()).count(False) == 4
    assert all(block.norm2.shift is None for block in residual_blocks(fused))


@pytest.mark.parametrize(
    "options",
    [
        {"temb_channels": 6},
        {"temb_channels": None},
        {"temb_channels": 6, "out_channels": 12},
        {"temb_channels": 6, "down": True},
        {"temb_channels": 6, "up": True},
        {"temb_channels": 6, "skip_time_act": True},
        {"temb_channels": 6, "time_embedding_norm": "scale_shift"},
        {"temb_channels": 6, "non_linearity": "gelu"},
    ],
    ids=str,
)
def test_a_residual_block(options, precision):
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=8, groups=4, **options)
    plain, fused = pair(block, precision)
    embedding = normal(2, 6) if options["temb_channels"] else None
    assert_equal_results(plain, fused, precision, (normal(2, 8, 6, 4), embedding))
    stays = "time_embedding_norm" in options or "non_linearity" in options
    assert silu_of_norms(fused) == {"norm1": not stays, "norm2": not stays}
    assert isinstance(fused.nonlinearity, SiLUOfVectors) is not stays
    assert (fused.norm2.shift is None) is not (options == {"temb_channels": None})


def test_a_second_time_nothing_is_replaced():
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=6).requires_grad_(False)
    fuse_norms(block)
    modules, bias = list(block.modules()), block.time_emb_proj.bias.clone()
    fuse_norms(block)
    assert list(map(id, modules)) == list(map(id, block.modules()))
    assert torch.equal(block.time_emb_proj.bias, bias)


def test_on_a_cpu_a_backbone_keeps_the_modules_of_diffusers(backbone):
    """So its features are what they were, bit for bit."""
    for module in (backbone.vae, backbone.unet):
        kinds = {type(each) for each in module.modules()}
        assert nn.GroupNorm in kinds and not kinds & {FusedGroupNorm, SiLUOfVectors}


def test_on_a_gpu_a_backbone_has_fused_norms(deep_folder, monkeypatch):
    """The weights stay on the CPU here. Layers behind the deepest one have no storage."""
    for name in ("load_vae_encoder", "load_weights"):
        load = getattr(backbone_module, name)

        def on_cpu(*given, load=load, **options):
            devices = [isinstance(each, torch.device) for each in given]
            assert devices.count(True) == 1
            cpu = torch.device("cpu")
            return load(
                *(cpu if is_it else g for g, is_it in zip(given, devices, strict=True)), **options
            )

        monkeypatch.setattr(backbone_module, name, on_cpu)
    monkeypatch.setattr(backbone_module, "vae_precision", lambda *given: "fp32")
    for fused in (None, False):
        made = Backbone(deep_folder, layers=["up.0"], device="cuda", offline=True, fused=fused)
        norms = [
            type(module)
            for part in (made.vae.encoder, made.unet)
            for module in part.modules()
            if isinstance(module, nn.GroupNorm)
        ]
        assert set(norms) == {nn.GroupNorm if fused is False else FusedGroupNorm}


@needs_triton
def test_features_by_the_kernel(deep_folder, images, monkeypatch):
    """The kernel runs at every norm, channels-last throughout; features differ by rounding."""
    layers, images = ["vae", "down.1"], images[:1]
    plain = Backbone(deep_folder, layers=layers, offline=True)
    kernel = Backbone(deep_folder, layers=layers, offline=True, fused=True)
    plain.batch = kernel.batch = 1
    for module in (kernel.vae, kernel.unet):
        module.to(memory_format=torch.channels_last)
        for norm in module.modules():
            if isinstance(norm, FusedGroupNorm):
                norm.impl = "triton"  # an error, where the maps are not channels-last
    expected = plain.features(images, **OPTIONS)
    found = kernel.features(images, prompt_embedding=plain.null_prompt, **OPTIONS)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-5)


def pair(module: nn.Module, precision: tuple) -> tuple[nn.Module, nn.Module]:
    """A frozen module with random weights in some precision, channels-last, as diffusers has it and
    with fused norms.
    """
    dtype, impl, _ = precision
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():  # also of norms: ones and zeros would hide mistakes
            weight.add_(0.3 * torch.randn(weight.shape, generator=source))
    module = module.eval().requires_grad_(False).to(dtype)
    module = module.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(module)
    fuse_norms(fused, impl)
    return module, fused


def assert_equal_results(plain, fused, precision: tuple, inputs: tuple) -> None:
    dtype, _, tolerance = precision
    given = [
        each.to(dtype) if each is not None and each.is_floating_point() else each for each in inputs
    ]
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    results = []
    for module in (plain, fused):
        with torch.no_grad():
            result = module(*given)
        results.append(getattr(result, "sample", result))
    assert results[0].abs().max() > 0.1
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert error <= tolerance, f"{error:.2g}"


def residual_blocks(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if hasattr(each, "conv1")]


def silu_of_norms(module: nn.Module) -> dict[str, bool]:
    """Name of each norm -> whether it applies SiLU; all are fused."""
    norms = {n: m for n, m in module.named_modules() if isinstance(m, nn.GroupNorm)}
    assert {type(norm) for norm in norms.values()} == {FusedGroupNorm}
    return {name: norm.silu for name, norm in norms.items()}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))
