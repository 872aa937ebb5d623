"""The parts of a model folder as modules; only what the selected layers need is ever in memory.

A module is laid out without storage, on torch's device "meta". The weights that are needed are then
read one tensor at a time, in their final precision; the others stay without storage. diffusers and
transformers take seconds to import: they are imported here only, inside functions.
"""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from semanticfl_ref.diffusion.model_files import weight_files
from semanticfl_ref.errors import DataError

# Names of the VAE's attention in files from before 2023, such as Stable Diffusion 1.5's.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
# A description may be larger than the files, which may lack blocks that are not used: this many
# times, and by so many tensors and entries.
TIMES, MORE_TENSORS, MORE_ENTRIES = 10, 1000, 10**7
MOST_TIMESTEPS = 100_000


class KeptProjection(nn.Module):
    """A projection of the prompt, computed once for all passes with the same prompt.

    Equals the projection; its last result is returned for the same tensor (the object, not its
    values).
    """

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection
        self.prompt = self.kept = None

    def forward(self, prompt: torch.Tensor) -> torch.Tensor:
        if prompt is not self.prompt:
            self.prompt, self.kept = prompt, self.projection(prompt)
        return self.kept


def keep_prompt_projections(unet: nn.Module) -> None:
    """Let every cross-attention of the U-Net keep the keys and values of the prompt."""
    for module in list(unet.modules()):
        if getattr(module, "is_cross_attention", False):
            module.to_k, module.to_v = KeptProjection(module.to_k), KeptProjection(module.to_v)


def empty_unet(folder: Path, latent_channels: int) -> nn.Module:
    """The whole U-Net without storage.

    Raises:
        DataError: its configuration cannot be read, or needs other inputs (inpainting, SDXL).
    """
    from diffusers import UNet2DConditionModel

    unet = _laid_out(UNet2DConditionModel, folder, "unet")
    config = unet.config
    others = (config.addition_embed_type, config.class_embed_type, config.encoder_hid_dim_type)
    if config.in_channels != latent_channels or any(others):
        raise DataError(
            f"the model folder {folder} is not a text-to-image Stable Diffusion 1.x or 2.x: its "
            f"U-Net needs other inputs, as for inpainting or in SDXL; use another model"
        )
    return unet


def unet_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Layer -> module of all layers that can be selected, in the order in which they end.

    `down.0.resnets.0`, `down.0.attentions.0`, ..., `down.0`, ..., `mid`, ..., `up.3`.
    """
    blocks = {f"down.{i}": block for i, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        blocks["mid"] = unet.mid_block
    blocks |= {f"up.{i}": block for i, block in enumerate(unet.up_blocks)}
    layers = {}
    for name, block in blocks.items():
        pairs = zip_longest(block.resnets, getattr(block, "attentions", ()))
        for i, (resnet, attention) in enumerate(pairs):
            layers[f"{name}.resnets.{i}"] = resnet
            if attention is not None:
                layers[f"{name}.attentions.{i}"] = attention
        layers[name] = block
    return layers


def block_of(layer: str) -> str:
    """The block that a layer is or is part of; "vae" for the latent; "" for no layer's name."""
    return (re.match(r"vae|mid|(?:down|up)\.\d+", layer) or [""])[0]


def weights_behind(unet: nn.Module, deepest: str) -> tuple[str, ...]:
    """Prefixes of the names of weights that a pass up to the layer `deepest` does not use."""
    if deepest == "vae":
        return ("",)  # the latent needs no U-Net
    blocks = [layer for layer in unet_layers(unet) if layer == block_of(layer)]
    behind = blocks[blocks.index(block_of(deepest)) + 1 :]
    # mid is mid_block, up.1 is up_blocks.1.
    return "conv_norm_out.", "conv_out.", *(name.replace(".", "_blocks.") for name in behind)


def load_weights(
    module: nn.Module,
    folder: Path,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    without: tuple[str, ...] = (),
) -> nn.Module:
    """Give a module without storage its weights; no other tensor of the files is read.

    Args:
        module: on the device "meta".
        folder: the model's folder.
        part: vae or unet.
        dtype: dtype of the weights.
        device: device of the weights.
        without: prefixes of the names of weights that are not needed; these get no storage.

    Raises:
        DataError: a file is damaged or lacks a weight.
    """
    shapes = {
        name: list(value.shape)
        for name, value in module.state_dict().items()
        if not name.startswith(without)
    }
    tensors = {}
    for file in weight_files(folder, part):
        with _reading(folder, part), safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118 (not a dict)
                name = OLD_NAME.sub(lambda old: RENAMED[old[0]], stored)
                if opened.get_slice(stored).get_shape() == shapes.get(name):
                    # A copy, not a page of the file, which may change.
                    tensors[name] = opened.get_tensor(stored).to(device, dtype, copy=True)
    _refuse_absent(shapes.keys() - tensors.keys(), folder, part)
    module.load_state_dict(tensors, strict=False, assign=True)
    return module.eval().requires_grad_(False)


def load_vae_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The `AutoencoderKL`; its decoder is not read."""
    from diffusers import AutoencoderKL

    vae, decoder = _laid_out(AutoencoderKL, folder, "vae"), ("decoder.", "post_quant_conv.")
    return load_weights(vae, folder, "vae", dtype, device, without=decoder)


def load_scheduler(folder: Path):
    """The noise schedule; any scheduler's file describes it."""
    from diffusers import DDPMScheduler

    with _reading(folder, "scheduler"):
        config = DDPMScheduler.load_config(folder / "scheduler", local_files_only=True)
        if config.get("num_train_timesteps", 0) > MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is above {MOST_TIMESTEPS}")
        return DDPMScheduler.from_config(config)


def load_text_encoder(folder: Path, device: torch.device) -> tuple:
    """The tokenizer, and the text encoder in fp32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def read(cls, part: str):
        return cls.from_pretrained(folder / part, local_files_only=True)

    part, weights = "text_encoder", {}
    files = weight_files(folder, part)
    # Initial weights, soon overwritten, must not move the global generator.
    with _reading(folder, part), _bounded(files), torch.random.fork_rng(devices=[]):
        for file in files:
            weights |= load_file(file)
        encoder, report = CLIPTextModel.from_pretrained(
            None, config=read(CLIPTextConfig, part), state_dict=weights, output_loading_info=True
        )
    # The library only warns, and leaves random weights.
    absent = [str(name) for name in (*report["missing_keys"], *report["mismatched_keys"])]
    _refuse_absent(absent, folder, part)
    encoder = encoder.float().eval().requires_grad_(False).to(device)
    with _reading(folder, "tokenizer"):
        return read(CLIPTokenizer, "tokenizer"), encoder


def _laid_out(cls, folder: Path, part: str) -> nn.Module:
    files = weight_files(folder, part)
    with _reading(folder, part), _bounded(files), torch.device("meta"):
        return cls.from_config(cls.load_config(folder / part, local_files_only=True))


@contextmanager
def _bounded(files: list[Path]) -> Iterator[None]:
    """Modules made inside may not be many times as large as the files: a number in a damaged
    description would keep the processor busy for hours, or fill the memory.
    """
    tensors, entries = MORE_TENSORS, MORE_ENTRIES
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensors += TIMES
                entries += TIMES * prod(opened.get_slice(name).get_shape())

    def check(_module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, entries
        tensors -= 1
        entries -= 0 if parameter is None else parameter.numel()
        if min(tensors, entries) < 0:
            raise ValueError("config.json describes a much larger model than the weights are")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _refuse_absent(absent: Collection[str], folder: Path, part: str) -> None:
    if absent:
        raise DataError(
            f"{part} of the model folder {folder} lacks {len(absent)} of its weights, such as "
            f"{min(absent)}: download it again"
        )


@contextmanager
def _reading(folder: Path, part: str) -> Iterator[None]:
    """Errors inside become a DataError; the libraries' warnings and progress bars are off.

    What they would say about missing weights is checked here instead.
    """
    from transformers.utils import logging as transformers_logging

    level, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    # A damaged file raises one of many classes: safetensors', json's, torch's, OSError ...
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DataError(
            f"{part} of the model folder {folder} cannot be read: {reason}; download it again"
        ) from error
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()
