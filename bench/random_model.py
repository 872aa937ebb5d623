"""Diffusion models with random weights in the folder layout of Stable Diffusion 1.5.

Its architecture at its real size, and smaller. They cost what the real one costs, so that speed,
memory, loading and resuming can be exercised without downloads. Their features mean nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from semanticfl_ref.diffusion.model_files import locate

CAPTION_TOKENS = 77
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
# Names in Stable Diffusion 1.5's VAE file, which are older than diffusers' own.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass(frozen=True)
class Size:
    """Sizes of a model's parts.

    Attributes:
        unet_channels, vae_channels: of their blocks.
        caption_width: of a token of the caption.
        text_layers: of the text encoder; it has as many heads.
    """

    unet_channels: tuple[int, ...]
    vae_channels: tuple[int, ...]
    caption_width: int
    text_layers: int


SIZES = {
    "sd15": Size((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12),
    "small": Size((96, 192, 384, 384), (32, 64, 96, 96), 128, 2),
}


def write_model(folder: Path, size: str = "sd15") -> Path:
    """Write a model folder as the hub has Stable Diffusion 1.5: fp16 safetensors, the VAE's
    attention and the text encoder under their old names."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(locate("tiny") / "tokenizer")
    tokenizer.model_max_length = CAPTION_TOKENS
    tokenizer.save_pretrained(folder / "tokenizer")
    modules = _empty_modules(SIZES[size], tokenizer)
    for part, module in modules.items():
        if part == "text_encoder":
            file = "model"
            module.config.save_pretrained(folder / part)
        else:
            file = "diffusion_pytorch_model"
            module.save_config(folder / part)
        weights = _file_names(part, _random_weights(module))
        save_file(weights, folder / part / f"{file}.fp16.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def _empty_modules(size: Size, tokenizer) -> dict[str, nn.Module]:
    """Part -> module without storage."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=size.caption_width,
            block_out_channels=size.unet_channels,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae_channels,
            layers_per_block=2,
            sample_size=512,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=size.caption_width,
                intermediate_size=4 * size.caption_width,
                num_hidden_layers=size.text_layers,
                num_attention_heads=size.text_layers,
                max_position_embeddings=CAPTION_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return {"unet": unet, "vae": vae, "text_encoder": text}


def _random_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """fp16 weights, scaled so that activations neither vanish nor overflow."""
    source, weights = torch.Generator().manual_seed(0), {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.ndim < 2:  # the weights of norms are one, biases zero
            weights[name] = torch.full(value.shape, float(name.endswith("weight"))).half()
        else:
            scale = 0.02 if "embedding" in name else value[0].numel() ** -0.5
            weights[name] = torch.randn(value.shape, generator=source).mul_(scale).half()
    return weights


def _file_names(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names that the hub's files have."""
    if part == "vae":
        return {_old_name(name): value for name, value in weights.items()}
    if part == "text_encoder":
        renamed = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
        # A buffer that today's library no longer has.
        positions = torch.arange(CAPTION_TOKENS)[None]
        return renamed | {"text_model.embeddings.position_ids": positions}
    return weights


def _old_name(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name
