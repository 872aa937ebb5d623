"""Diffusion models with random weights in Stable Diffusion 1.5's folder layout: its architecture at
its real size, and smaller.

They cost what the real one costs, so speed, memory, loading, killing and resuming can be exercised
where no weights are at hand. What they say of an image is noise."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

# size -> (U-Net's channels, width of a caption, VAE's channels, layers and heads of the text
# encoder)
SIZES = {
    "sd15": ((320, 640, 1280, 1280), 768, (128, 256, 512, 512), 12),
    "small": ((96, 192, 384, 384), 128, (32, 64, 96, 96), 2),
}
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
OLD_NAMES = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}  # as Stable Diffusion 1.5's VAE file has them


def write_model(folder: Path, size: str = "sd15") -> Path:
    """Write a model folder as the hub serves Stable Diffusion 1.5: fp16 safetensors by their names,
    the VAE's attention and the text encoder under their old ones.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from semanticfl_ref.diffusion.make_tiny import make_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    channels, width, vae_channels, layers = SIZES[size]
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=width,
            block_out_channels=channels,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=vae_channels,
            layers_per_block=2,
            sample_size=512,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=layers,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    for part, module, file in (
        ("unet", unet, "diffusion_pytorch_model"),
        ("vae", vae, "diffusion_pytorch_model"),
        ("text_encoder", text, "model"),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        if part == "text_encoder":
            module.config.save_pretrained(folder / part)
        else:
            module.save_config(folder / part)
        weights = _random_weights(module)
        if part == "vae":
            weights = {_old(name): value for name, value in weights.items()}
        if (
            part == "text_encoder"
        ):  # names and a buffer of its file that today's library no longer has
            weights = {
                f"text_model.{name.removeprefix('text_model.')}": value
                for name, value in weights.items()
            }
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(weights, folder / part / f"{file}.fp16.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def _random_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """fp16 weights of a module without storage, scaled so that activations neither vanish nor
    overflow.
    """
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.ndim < 2:
            weights[name] = torch.full(
                value.shape, float(name.endswith("weight"))
            ).half()  # of norms; biases are zero
        else:
            spread = 0.02 if "embedding" in name else value[0].numel() ** -0.5
            weights[name] = torch.randn(value.shape, generator=generator).mul_(spread).half()
    return weights


def _old(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name
