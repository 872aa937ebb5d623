"""Make the embedded diffusion model.

    python scripts/make_tiny.py --work DIR

Three stages, each of which continues from DIR after a kill: captioned glyphs are drawn; a small
`AutoencoderKL` learns their scenes; a small `UNet2DConditionModel` and a `CLIPTextModel` learn
together to denoise its latents, given captions. The result has Stable Diffusion's folder layout
(scheduler, text_encoder, tokenizer, unet, vae), with weights as fp16 safetensors. About an hour on
two CPU cores.

Beside denoising, the U-Net's middle block learns to recognise its image: on inputs without caption,
its pooled features are matched with the caption's embedding (contrastive, over all captions).
Stable Diffusion learned from billions of captioned images, with a text encoder that had been
matched with images; this stands in for that at a scale of minutes. `--align 0` leaves it out.

Letters: B batch, C captions, D width of a caption's embedding, T tokens of a caption.
"""

import argparse
import copy
import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from glyphs import NAMES, captioned_glyphs, usable_fonts
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the package need not be installed

from semanticfl_ref.data.scenes import scenes  # noqa: E402 (needs the path)

PROMPT = "a photo of a {}"
MASKS = 40_000
BATCH = 64
NULL_SHARE = 0.6  # of the inputs lose their caption: anchors are read from such passes
VAE_STEPS, VAE_RATE = 1_200, 2e-3
UNET_STEPS, UNET_RATE = 8_000, 8e-4
EMA = 0.999  # decay of the moving average of the weights
COOL_DOWN = 0.3  # share of the steps, at the end, over which the learning rate falls to zero
TEMPERATURE = 0.07  # of the matching loss
WIDTHS = (48, 112)  # channels of the U-Net at 8x8 and 4x4
TEXT_WIDTH, TEXT_LENGTH = 64, 32


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    masks, classes = draw_glyphs(options)
    vae = train_vae(options, masks)
    tokenizer = make_tokenizer(options.work / "tokenizer")
    unet, text_encoder, scheduler = train_unet(options, vae, tokenizer, masks, classes)
    save(options.out, vae, unet, text_encoder, tokenizer, scheduler)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "semanticfl_ref" / "diffusion" / "tiny",
        help="model folder to write (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=UNET_STEPS, help="U-Net steps (default: %(default)s)"
    )
    parser.add_argument(
        "--align",
        type=float,
        default=0.5,
        help="weight of matching the middle block with the caption; 0: denoising alone (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for all random generators (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def save(folder: Path, vae, unet, text_encoder, tokenizer, scheduler) -> None:
    """Write the parts in Stable Diffusion's layout, weights as fp16."""
    for name, part in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        shutil.rmtree(folder / name, ignore_errors=True)
        copy.deepcopy(part).half().save_pretrained(folder / name, safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges spell the captions' words; other text becomes bytes.

    Args:
        folder: where the vocabulary is written.
    """
    letters = sorted(ByteLevel.alphabet())
    words = {word for name in NAMES for word in PROMPT.format(name).split()}
    merges: dict[tuple[str, str], None] = {}
    # Sorted, so that every process numbers the tokens alike.
    for word in sorted(words, key=lambda word: (len(word), word)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges.setdefault(("".join(pieces[:i]), pieces[i]))
    tokens = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        pad_token="<|endoftext|>",
        model_max_length=TEXT_LENGTH,
    )


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=28,
        norm_num_groups=8,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def draw_glyphs(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks uint8 [MASKS, 8, 8] and classes int64 [MASKS]."""
    file = options.work / "glyphs.pt"
    if not file.exists():
        fonts = usable_fonts()
        print(f"drawing {MASKS} glyphs with {len(fonts)} fonts", flush=True)
        (options.work / "fonts.txt").write_text("\n".join(fonts) + "\n")
        tasks = [(MASKS // 20, 1000 * options.seed + i, fonts) for i in range(20)]
        with multiprocessing.Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = pool.starmap(captioned_glyphs, tasks, chunksize=1)
        _save_state(tuple(torch.cat(column) for column in zip(*parts, strict=True)), file)
    return torch.load(file, weights_only=True)


def train_vae(options: argparse.Namespace, masks: torch.Tensor) -> AutoencoderKL:
    """The VAE, frozen, with the `scaling_factor` that gives its latents unit deviation."""
    torch.manual_seed(options.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), VAE_RATE)
    file, start, began = options.work / "vae.pt", 0, time.time()
    if file.exists():
        state = torch.load(file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, VAE_STEPS):
        warm_up, decay = min(1, (step + 1) / 50), 1 - step / VAE_STEPS
        optimizer.param_groups[0]["lr"] = VAE_RATE * warm_up * decay
        generator = torch.Generator().manual_seed(options.seed * 10**9 + step)
        loss = vae_loss(vae, masks, generator)
        _descend(loss, vae, optimizer)
        if (step + 1) % 100 == 0:
            seconds = time.time() - began
            print(f"vae {step + 1}/{VAE_STEPS} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            _save_state({**state, "step": step + 1}, file)
    with torch.no_grad():
        images = scenes(masks[:2000], torch.Generator().manual_seed(options.seed)) * 2 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(250)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae.eval().requires_grad_(False)


def vae_loss(vae: AutoencoderKL, masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Reconstruction of a batch of scenes, and a little KL divergence."""
    i = torch.randint(len(masks), (BATCH,), generator=generator)
    images = scenes(masks[i], generator) * 2 - 1
    latent = vae.encode(images).latent_dist
    noise = torch.randn(latent.mean.shape, generator=generator)
    restored = vae.decode(latent.mean + latent.std * noise).sample
    squared, absolute = F.mse_loss(restored, images), F.l1_loss(restored, images)
    return squared + 0.5 * absolute + 1e-5 * latent.kl().mean()


@dataclass
class Inputs:
    """What the last stage trains on: glyphs, and the frozen parts that make inputs of them.

    `middle` holds the output of the U-Net's middle block after a forward pass.
    """

    masks: torch.Tensor
    classes: torch.Tensor
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    tokens_CT: torch.Tensor
    middle: dict[str, torch.Tensor] = field(default_factory=dict)


def train_unet(
    options: argparse.Namespace,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    masks: torch.Tensor,
    classes: torch.Tensor,
) -> tuple[nn.Module, nn.Module, DDPMScheduler]:
    """U-Net and text encoder, each the moving average of its weights, and the scheduler."""
    torch.manual_seed(options.seed + 1)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    inputs = Inputs(masks, classes, vae, scheduler, caption_tokens(tokenizer))
    model = nn.ModuleDict(
        {
            "unet": new_unet(),
            "text": new_text_encoder(tokenizer),
            "align": nn.Linear(WIDTHS[1], TEXT_WIDTH),
        }
    )
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), UNET_RATE, fused=True)
    saved = {"model": model, "average": average, "optimizer": optimizer}
    file, start, began = options.work / f"unet-align{options.align:g}.pt", 0, time.time()
    if file.exists():
        state = torch.load(file, weights_only=True)
        for name, part in saved.items():
            part.load_state_dict(state[name])
        start = state["step"]
    model["unet"].mid_block.register_forward_hook(
        lambda _module, _inputs, output: inputs.middle.update(features=output)
    )
    sums, steps = torch.zeros(3), options.steps
    for step in range(start, steps):
        warm_up, cool_down = min(1, (step + 1) / 200), min(1, (steps - step) / (COOL_DOWN * steps))
        optimizer.param_groups[0]["lr"] = UNET_RATE * warm_up * cool_down
        generator = torch.Generator().manual_seed(options.seed * 10**9 + 10**8 + step)
        denoising, matching = unet_losses(model, inputs, generator)
        _descend(denoising + options.align * matching, model, optimizer)
        decay = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        sums += torch.stack([denoising.detach(), matching.detach(), torch.ones(())])
        if (step + 1) % 200 == 0 or step + 1 == steps:
            denoising, matching, _ = (sums / sums[2]).tolist()
            print(
                f"unet {step + 1}/{steps} denoising {denoising:.4f} matching {matching:.4f} "
                f"{time.time() - began:.0f} s",
                flush=True,
            )
            sums.zero_()
            state = {name: part.state_dict() for name, part in saved.items()}
            _save_state({**state, "step": step + 1}, file)
    return average["unet"].eval(), average["text"].eval(), scheduler


def caption_tokens(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Tokens int64 [C + 1, T] of all captions, the empty one last, without the common padding."""
    captions = [PROMPT.format(name) for name in NAMES] + [""]
    tokens = tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    longest = int((tokens != tokenizer.pad_token_id).sum(1).max())
    return tokens[:, : longest + 1]


def unet_losses(
    model: nn.ModuleDict, inputs: Inputs, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoising and matching losses of a batch."""
    scheduler, null = inputs.scheduler, len(NAMES)
    i = torch.randint(len(inputs.masks), (BATCH,), generator=generator)
    classes_B = inputs.classes[i]
    with torch.no_grad():
        images = scenes(inputs.masks[i], generator) * 2 - 1
        latent = inputs.vae.encode(images).latent_dist.mean * inputs.vae.config.scaling_factor
    # More of the low noise, where features are read.
    t_B = (1000 * torch.rand(BATCH, generator=generator) ** 1.5).long()
    noise = torch.randn(latent.shape, generator=generator)
    is_dropped_B = torch.rand(BATCH, generator=generator) < NULL_SHARE
    text = model["text"](inputs.tokens_CT)
    hidden_BTD = text.last_hidden_state[torch.where(is_dropped_B, null, classes_B)]
    noised = scheduler.add_noise(latent, noise, t_B)
    predicted = model["unet"](noised, t_B, hidden_BTD, return_dict=False)[0]

    middle = inputs.middle["features"].mean((2, 3))
    pooled_BD = model["align"](F.layer_norm(middle, (WIDTHS[1],)))
    # Centred: a young text encoder says nearly the same of every caption (cosine 0.9).
    names_CD = text.pooler_output[:null]
    names_CD = names_CD - names_CD.mean(0)
    cosines_BC = F.normalize(pooled_BD, dim=1) @ F.normalize(names_CD, dim=1).T
    matching_B = F.cross_entropy(cosines_BC / TEMPERATURE, classes_B, reduction="none")
    # What is drowned in noise, or was told by the caption, need not be recognised.
    signal_B = scheduler.alphas_cumprod[t_B] * is_dropped_B
    return F.mse_loss(predicted, noise), (matching_B * signal_B).sum() / signal_B.sum()


def _descend(loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _save_state(state, file: Path) -> None:
    temporary = file.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(file)


if __name__ == "__main__":
    main()
