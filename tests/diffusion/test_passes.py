"""Passes: how many images, what does not depend on them, and what nobody waits for."""

import copy
import json
from collections import namedtuple

import pytest
import torch
from cache_files import LABELS, NAMES, dataset_of, settings_for
from torch.utils._python_dispatch import TorchDispatchMode

from semanticfl_ref.diffusion import backbone as backbone_module
from semanticfl_ref.diffusion.backbone import Backbone, PassOptions
from semanticfl_ref.diffusion.expected import expected, load_backbone
from semanticfl_ref.diffusion.extract import build_cache, images_left, open_or_build
from semanticfl_ref.diffusion.feature_cache import open_cache, plan_cache
from semanticfl_ref.diffusion.modules import KeptProjection
from semanticfl_ref.diffusion.passes import device_pass_size, host_pass_size
from semanticfl_ref.errors import DataError

OPTIONS = {"timestep": 150, "seed": 3}
GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """A function that sets the memory of the CUDA device that torch reports."""

    def card(gib):
        properties = namedtuple("Properties", "total_memory")(int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)

    return card


@pytest.fixture
def sd_folder(tmp_path):
    """The description of Stable Diffusion's VAE."""
    (tmp_path / "vae").mkdir()
    config = {"block_out_channels": [128, 256, 512, 512]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("gib", "side", "precision", "images"),
    [
        (80, 224, "bf16", 256),
        (80, 224, "fp32", 128),
        (80, 512, "bf16", 64),
        (24, 224, "bf16", 64),
        (16, 224, "bf16", 64),
        (8, 224, "bf16", 32),
        (4, 1024, "fp32", 8),
        (80, 32, "bf16", 256),
    ],
)
def test_the_pass_on_cuda_follows_memory_and_input_size(
    card, sd_folder, gib, side, precision, images
):
    card(gib)
    device = torch.device("cuda")
    assert device_pass_size(sd_folder, device, side**2, precision) == images
    for content in ("", "[]", "{}", '{"block_out_channels": [0]}'):
        (sd_folder / "vae" / "config.json").write_text(content)
        with pytest.raises(DataError, match="vae of the model folder"):
            device_pass_size(sd_folder, device, side**2, precision)


def test_the_pass_on_a_cpu(monkeypatch):
    assert host_pass_size({"block_out_channels": [320, 640, 1280, 1280]}) == 8
    monkeypatch.undo()
    assert host_pass_size({"block_out_channels": [48, 112]}) == 16  # 64 outside of these tests


def test_the_pass_names_the_cache_and_fills_the_shard_on_cuda(card, model_folder, images, tmp_path):
    """Two cards with other passes never share a cache; nor do a card and a CPU."""

    def plan(device, **options):
        return plan_cache(
            dataset_of(images, LABELS, NAMES),
            settings_for(model_folder, **options),
            seed=0,
            device=torch.device(device),
            folder=tmp_path,
            offline=True,
        )

    ids = {plan("cpu").id}
    # The test's VAE has 8 channels at 32x32 pixels: 256 KiB an image in fp32.
    for memory, size in ((1, 256), (1 / 16, 128), (1 / 64, 32)):
        card(memory)
        on_card = plan("cuda")
        ids.add(on_card.id)
        assert (on_card.meta["pass"], on_card.meta["shard"]) == (size, max(64, size))
    assert len(ids) == 4
    assert "pass" not in plan("cpu").meta and plan("cpu").meta["shard"] == 64
    assert plan("cpu", compile=True).id != plan("cpu").id and "compile" not in plan("cpu").meta


def test_features_of_any_part_of_a_run_are_those_of_the_whole(backbone, images):
    """Bitwise at the same place of a pass, whatever its neighbours are."""
    whole = backbone.features(images, **OPTIONS)
    backbone.batch = 4
    parts = [backbone.features(images[start : start + 4], **OPTIONS) for start in (0, 4, 8)]
    for layer, values in backbone.features(images, **OPTIONS).items():
        assert torch.equal(torch.cat([part[layer] for part in parts]), values)
        torch.testing.assert_close(values, whole[layer], rtol=1e-4, atol=1e-5)
    swapped = images.clone()
    swapped[[1, 2, 3]] = 255 - images[[1, 2, 3]]
    mixed = backbone.features(swapped[:4], **OPTIONS)
    assert all(torch.equal(mixed[layer][0], parts[0][layer][0]) for layer in mixed)
    assert not torch.equal(mixed["mid"][1], parts[0]["mid"][1])


def unkept(backbone):
    """The same model whose projections of the prompt are computed in every pass."""
    plain = copy.copy(backbone)
    plain.unet = copy.deepcopy(backbone.unet)
    for module in list(plain.unet.modules()):
        for name in ("to_k", "to_v"):
            if isinstance(getattr(module, name, None), KeptProjection):
                setattr(module, name, getattr(module, name).projection)
    return plain


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_prompts_keys_and_values_are_computed_once(
    deep_folder, text_encoder, images, precision
):
    """Exactly equal to computing them in every pass; again for another prompt, and in every pass
    for prompts per image.
    """
    backbone = Backbone(deep_folder, layers=["up.1", "up.3"], precision=precision, offline=True)
    backbone.batch = 4
    plain, counts = unkept(backbone), []
    kept = [each for each in backbone.unet.modules() if isinstance(each, KeptProjection)]
    assert len(kept) == 2 * (3 * 2 + 1 + 3 * 3), "keys and values of every cross-attention"
    kept[0].projection.register_forward_hook(lambda *_: counts.append(1))
    hidden = text_encoder.encode(["one", "two", "three"])[0]
    for prompts, times in (
        (None, 1),
        (None, 0),
        (hidden[0], 1),
        (hidden[1], 1),
        (hidden[LABELS], 3),
    ):
        found = backbone.features(images, prompt_embedding=prompts, **OPTIONS)
        expected = plain.features(images, prompt_embedding=prompts, **OPTIONS)
        assert all(torch.equal(found[layer], expected[layer]) for layer in found)
        assert len(counts) == times
        counts.clear()
    changed = hidden[1].mul_(2)
    found = backbone.features(images, prompt_embedding=changed, **OPTIONS)["up.3"]
    assert torch.equal(found, plain.features(images, prompt_embedding=changed, **OPTIONS)["up.3"])


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a CUDA device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        if name.startswith("index") and isinstance(arguments[1], (list, tuple)):
            assert all(each is None or each.dtype != torch.bool for each in arguments[1])
        return function(*arguments, **(options or {}))


@torch.no_grad()
@pytest.mark.parametrize("latent", ["mean", "sample"])
def test_nothing_in_a_pass_waits_for_the_device(backbone, images, latent):
    filled = images[torch.arange(backbone.batch).clamp(max=len(images) - 1)]
    prompts = backbone.null_prompt.expand(len(filled), -1, -1)
    options = PassOptions(timestep=150, seed=3, latent=latent, input_size=32)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(torch.ones(1).sum())
    with NoWaiting():
        found = backbone.pass_once(filled, [prompts], options)
    assert set(found[0]) == {"vae", "down.1", "mid", "up.0"}


def test_the_host_runs_one_shard_ahead_of_a_cuda_device(built, plan_for, tmp_path, monkeypatch):
    """The order of calls with a device that is named CUDA; the bytes stay."""
    plan, events, real = plan_for(tmp_path), [], Backbone.start

    def start(self, part, first, **options):
        features = real(self, part, first=first, **options)
        events.append(("start", first))
        return lambda: events.append(("wait", first)) or features()

    monkeypatch.setattr(Backbone, "start", start)
    build_cache(plan, print)
    assert events == [(what, first) for first in (0, 4, 8) for what in ("start", "wait")]
    events.clear()
    named = namedtuple("Device", "type")("cuda")
    backbone = load_backbone(plan)
    monkeypatch.setattr("semanticfl_ref.diffusion.extract.load_backbone", lambda _plan: backbone)
    for file in plan.path.glob("[ms]*"):
        file.unlink()
    real_encoder = backbone_module.TextEncoder
    monkeypatch.setattr(
        "semanticfl_ref.diffusion.extract.TextEncoder", lambda folder, _: real_encoder(folder)
    )
    object.__setattr__(plan, "device", named)
    build_cache(plan, print)
    order = [("start", 0), ("start", 4), ("wait", 0), ("start", 8), ("wait", 4), ("wait", 8)]
    assert events == order
    for file in built.files:
        assert (plan.path / file.name).read_bytes() == file.read_bytes()


def test_a_compiled_encoder_is_another_cache_of_nearly_the_same_features(
    built, plan_for, tmp_path, monkeypatch
):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda call, *_a, **_k: compiled.append(call) or (lambda *a: call(*a))
    )
    plan = plan_for(tmp_path, compile=True)
    assert plan.id != built.id and plan.meta["compile"] is True
    cache = open_or_build(plan)
    assert len(compiled) == 1, "the encoder's forward"
    assert torch.equal(cache.read("mid"), open_cache(built).read("mid"))


@pytest.mark.parametrize("every_class", [False, True])
def test_time_and_space_are_known_before(plan_for, tmp_path, every_class):
    plan, said = plan_for(tmp_path, every_class=every_class), []
    assert images_left(plan) == 12
    to_come = expected(plan, 12)
    build_cache(plan, said.append)
    assert images_left(plan) == 0
    shards = sum(sum(v.nbytes for v in _tensors(file)) for file in plan.shards)
    assert to_come["bytes"] == shards
    assert 0 < to_come["seconds"] < 60


def _tensors(file):
    from safetensors.torch import load_file

    return load_file(file).values()
