"""The parts of a Stable Diffusion folder as modules: only what a run of the layers needs is ever in
memory.

Modules are laid out without storage first, what is not needed is cut off, and then the weights that
are left are read, one tensor at a time and in their final precision. diffusers and transformers
take seconds to import; they are imported here alone, inside functions."""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from semanticfl_ref.diffusion.model_files import inventory
from semanticfl_ref.errors import DataError

# Names of the VAE's attention in files of before 2023, Stable Diffusion 1.5's among them.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def empty_unet(folder: Path, latent_channels: int) -> nn.Module:
    """The whole U-Net without storage (on torch's "meta" device), for latents of so many channels.

    Raises:
        DataError: its description cannot be read, or asks for inputs that are not given here
            (inpainting, SDXL).
    """
    from diffusers import UNet2DConditionModel

    unet = _laid_out(UNet2DConditionModel, folder, "unet")
    config = unet.config
    if (
        config.in_channels != latent_channels
        or config.addition_embed_type
        or config.class_embed_type
        or config.encoder_hid_dim_type
    ):
        raise DataError(
            f"model folder {folder} is not a plain text-to-image Stable Diffusion 1.x or 2.x (inpainting, SDXL and others need inputs that are not given here)"
        )
    return unet


def unet_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be selected, in the order in which they end: `down.0.resnets.0`,
    `down.0.attentions.0`, ..., `down.0`, ..., `mid`, ..., `up.3`.
    """
    blocks = {f"down.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {"mid": unet.mid_block} if unet.mid_block is not None else {}
    blocks |= {f"up.{i}": block for i, block in enumerate(unet.up_blocks)}
    found = {}
    for name, block in blocks.items():
        for i, resnet in enumerate(getattr(block, "resnets", None) or []):
            found[f"{name}.resnets.{i}"] = resnet
            attentions = getattr(block, "attentions", None) or []
            if i < len(attentions) and attentions[i] is not None:
                found[f"{name}.attentions.{i}"] = attentions[i]
        found[name] = block
    return found


def block_of(layer: str) -> str:
    """The block that a layer is, or is in; "vae" for the latent."""
    return re.match(r"vae|mid|(?:down|up)\.\d+", layer)[0]


def prune(unet: nn.Module, deepest: str) -> None:
    """Cut off every block behind the one that holds the layer `deepest`, and the way out.

    The lists of blocks keep their lengths: diffusers' forward treats the last one of `up_blocks`
    differently at odd sizes."""
    blocks = [name for name in unet_layers(unet) if "s." not in name]
    for name in blocks[blocks.index(block_of(deepest)) + 1 :]:
        kind, _, place = name.partition(".")
        if kind == "mid":
            unet.mid_block = nn.Identity()
        else:
            getattr(unet, f"{kind}_blocks")[int(place)] = nn.Identity()
    unet.conv_norm_out = unet.conv_act = None
    unet.conv_out = nn.Identity()


def fill(module: nn.Module, folder: Path, part: str, dtype: torch.dtype, device) -> nn.Module:
    """Give an empty module its weights; of the files, only its own tensors are read.

    Raises:
        DataError: a file is damaged, or lacks a weight.
    """
    wanted, tensors = module.state_dict(), {}
    try:
        for file in inventory(folder)[1][part]:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118 (not a dict)
                    name = (
                        re.sub(
                            r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
                            lambda found: RENAMED[found[0]],
                            stored,
                        )
                        if part == "vae"
                        else stored
                    )
                    if name in wanted:
                        tensors[name] = opened.get_tensor(stored).to(
                            device, dtype, copy=True
                        )  # a copy: else pages of the file, which may change
    # a damaged file surfaces as one of many classes: safetensors', json's, torch's, OSError ...
    except Exception as error:
        raise _unreadable(folder, part, error) from error
    absent = sorted(
        name for name in wanted if name not in tensors or tensors[name].shape != wanted[name].shape
    )
    if absent:
        raise DataError(
            f"{part} of model folder {folder} has no weights for {absent[0]} ({len(absent)} such): fetch it again"
        )
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def load_vae_encoder(folder: Path, dtype: torch.dtype, device) -> nn.Module:
    """The `AutoencoderKL` without its decoder, of which nothing is read."""
    from diffusers import AutoencoderKL

    vae = _laid_out(AutoencoderKL, folder, "vae")
    vae.decoder = vae.post_quant_conv = None
    return fill(vae, folder, "vae", dtype, device)


def load_scheduler(folder: Path):
    """The noise schedule; any scheduler's file describes it."""
    from diffusers import DDPMScheduler

    return _pretrained(DDPMScheduler, folder, "scheduler")


def load_text_parts(folder: Path, device):
    """Tokenizer and text encoder, the latter in fp32."""
    from transformers import CLIPTextModel, CLIPTokenizer

    variant = "fp16" if ".fp16" in inventory(folder)[1]["text_encoder"][0].name else None
    encoder, report = _pretrained(
        CLIPTextModel,
        folder,
        "text_encoder",
        use_safetensors=True,
        variant=variant,
        output_loading_info=True,
    )
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:  # the library only warns, and leaves random weights
        raise DataError(
            f"text_encoder of model folder {folder} has no weights for {absent[0]} ({len(absent)} such): fetch it again"
        )
    return _pretrained(CLIPTokenizer, folder, "tokenizer"), encoder.float().eval().requires_grad_(
        False
    ).to(device)


def parameters(module: nn.Module) -> int:
    """How many parameters a module has, with or without storage."""
    return sum(parameter.numel() for parameter in module.parameters())


def _laid_out(cls, folder: Path, part: str) -> nn.Module:
    try:
        with torch.device("meta"), _quiet():
            return cls.from_config(cls.load_config(folder / part, local_files_only=True))
    except (
        Exception
    ) as error:  # an unreadable description: json's errors, TypeError, ValueError ...
        raise _unreadable(folder, part, error) from error


def _pretrained(cls, folder: Path, part: str, **options):
    try:
        with (
            torch.random.fork_rng(devices=[]),
            _quiet(),
        ):  # initial weights, soon overwritten, must not move the global generator
            return cls.from_pretrained(folder / part, local_files_only=True, **options)
    except Exception as error:
        raise _unreadable(folder, part, error) from error


def _unreadable(folder: Path, part: str, error: Exception) -> DataError:
    return DataError(
        f"{part} of model folder {folder} cannot be read: {(str(error).strip() or repr(error)).splitlines()[0]}; fetch it again"
    )


@contextmanager
def _quiet():
    """Loading reports and bars of both libraries are off; what they would say about missing weights
    is checked by the caller.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = (
        diffusers_logging.get_verbosity(),
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    (
        diffusers_logging.set_verbosity_error(),
        transformers_logging.set_verbosity_error(),
        transformers_logging.disable_progress_bar(),
    )
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0]), transformers_logging.set_verbosity(before[1])
        if before[2]:
            transformers_logging.enable_progress_bar()
