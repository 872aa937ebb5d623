"""Make the embedded small diffusion model: `python -m semanticfl_ref.diffusion.make_tiny --work
DIR`.

Three stages, each resumable from DIR after a kill: captioned glyph masks are drawn, a small
`AutoencoderKL` learns the scenes, then a small `UNet2DConditionModel` and a `CLIPTextModel` learn
together to denoise its latents from captions. The result is written in Stable Diffusion's folder
layout (scheduler, text_encoder, tokenizer, unet, vae), weights as fp16 safetensors.

Beside the denoising loss, the U-Net's middle block is taught to recognise its image: on the inputs
whose caption was dropped, its pooled features are matched with the caption's embedding
(contrastive, over all captions). Stable Diffusion learned from billions of captioned images and a
text encoder that had been matched with pictures; this stands in for that, at a scale of minutes.
`--align 0` leaves it out.

Letters: B batch, C captions, D width of a caption's embedding.
"""

import argparse
import copy
import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from glyphs import NAMES, captioned_glyphs, usable_fonts
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from semanticfl_ref.data.scenes import scenes

PROMPT = "a photo of a {}"
MASKS = 40_000
BATCH = 64
NULL_SHARE = 0.6  # of the inputs lose their caption: the anchors are read from such passes
VAE_STEPS, VAE_RATE = 1_200, 2e-3
UNET_STEPS, UNET_RATE, EMA = 8_000, 8e-4, 0.999
COOL_DOWN = 0.3  # of the steps, at the end, over which the rate falls to zero
WIDTHS = (48, 112)  # channels of the U-Net at 8x8 and 4x4
TEXT_WIDTH, TEXT_LENGTH = 64, 32


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("tiny"),
        help="where the model folder goes",
    )
    parser.add_argument("--steps", type=int, default=UNET_STEPS, help="U-Net steps in all")
    parser.add_argument(
        "--align",
        type=float,
        default=0.5,
        help="weight of matching the middle block with the caption; 0 = denoising alone",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)

    masks, classes = _glyphs(options.work, options.seed)
    vae = _train_vae(options.work, masks, options.seed)
    tokenizer = make_tokenizer(options.work / "tokenizer")
    unet, text_encoder, scheduler = _train_unet(
        options.work, vae, tokenizer, masks, classes, options.steps, options.align, options.seed
    )
    save(options.out, vae, unet, text_encoder, tokenizer, scheduler)


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
    """A byte-level CLIP tokenizer whose only merges spell the words of the captions; any other text
    falls to bytes.
    """
    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    words = sorted(
        {word for name in NAMES for word in PROMPT.format(name).split()},
        key=lambda word: (len(word), word),
    )  # the same in every process
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges.setdefault(("".join(pieces[:i]), pieces[i]))
    tokens = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        pad_token="<|endoftext|>",
        model_max_length=TEXT_LENGTH,
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


def _glyphs(work: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    file = work / "glyphs.pt"
    if not file.exists():
        fonts = usable_fonts()
        print(f"drawing {MASKS} glyphs with {len(fonts)} fonts", flush=True)
        (work / "fonts.txt").write_text("\n".join(fonts) + "\n")
        with multiprocessing.Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = pool.starmap(
                captioned_glyphs,
                [(MASKS // 20, 1000 * seed + i, fonts) for i in range(20)],
                chunksize=1,
            )
        _save(tuple(torch.cat(column) for column in zip(*parts, strict=True)), file)
    return torch.load(file, weights_only=True)


def _train_vae(work: Path, masks: torch.Tensor, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), VAE_RATE)
    file, start, began = work / "vae.pt", 0, time.time()
    if file.exists():
        state = torch.load(file, weights_only=True)
        vae.load_state_dict(state["vae"]), optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, VAE_STEPS):
        optimizer.param_groups[0]["lr"] = (
            VAE_RATE * min(1, (step + 1) / 50) * (1 - step / VAE_STEPS)
        )
        generator = torch.Generator().manual_seed(seed * 10**9 + step)
        images = (
            scenes(masks[torch.randint(len(masks), (BATCH,), generator=generator)], generator) * 2
            - 1
        )
        latent = vae.encode(images).latent_dist
        restored = vae.decode(
            latent.mean + latent.std * torch.randn(latent.mean.shape, generator=generator)
        ).sample
        loss = (
            F.mse_loss(restored, images)
            + 0.5 * F.l1_loss(restored, images)
            + 1e-5 * latent.kl().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"vae {step + 1}/{VAE_STEPS} loss {loss.item():.4f} {time.time() - began:.0f} s",
                flush=True,
            )
            _save(
                {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                file,
            )
    with torch.no_grad():
        images = scenes(masks[:2000], torch.Generator().manual_seed(seed)) * 2 - 1
        vae.register_to_config(
            scaling_factor=1
            / torch.cat([vae.encode(b).latent_dist.mean for b in images.split(250)]).std().item()
        )
    return vae.eval().requires_grad_(False)


def _train_unet(work, vae, tokenizer, masks, classes, steps: int, align: float, seed: int):
    torch.manual_seed(seed + 1)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    model = torch.nn.ModuleDict(
        {
            "unet": new_unet(),
            "text": new_text_encoder(tokenizer),
            "align": torch.nn.Linear(WIDTHS[1], TEXT_WIDTH),
        }
    )
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), UNET_RATE, fused=True)
    file, start, began = work / f"unet-align{align:g}.pt", 0, time.time()
    if file.exists():
        state = torch.load(file, weights_only=True)
        (
            model.load_state_dict(state["model"]),
            average.load_state_dict(state["average"]),
            optimizer.load_state_dict(state["optimizer"]),
        )
        start = state["step"]
    captions = [PROMPT.format(name) for name in NAMES] + [""]
    tokens = tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    tokens = tokens[:, : int((tokens != tokenizer.pad_token_id).sum(1).max()) + 1]
    null = len(NAMES)
    middle: dict[str, torch.Tensor] = {}
    model["unet"].mid_block.register_forward_hook(
        lambda _module, _inputs, output: middle.__setitem__("features", output)
    )
    losses = torch.zeros(3)
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = (
            UNET_RATE * min(1, (step + 1) / 200) * min(1, (steps - step) / (COOL_DOWN * steps))
        )
        generator = torch.Generator().manual_seed(seed * 10**9 + 10**8 + step)
        i = torch.randint(len(masks), (BATCH,), generator=generator)
        with torch.no_grad():
            latent = (
                vae.encode(scenes(masks[i], generator) * 2 - 1).latent_dist.mean
                * vae.config.scaling_factor
            )
        t = (
            1000 * torch.rand(BATCH, generator=generator) ** 1.5
        ).long()  # more of the low noise, where features are read
        noise = torch.randn(latent.shape, generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < NULL_SHARE
        text = model["text"](tokens)
        hidden = text.last_hidden_state[torch.where(dropped, null, classes[i])]
        predicted = model["unet"](
            scheduler.add_noise(latent, noise, t), t, hidden, return_dict=False
        )[0]
        denoising = F.mse_loss(predicted, noise)
        pooled_BD = model["align"](F.layer_norm(middle["features"].mean((2, 3)), (WIDTHS[1],)))
        names_CD = text.pooler_output[:null]
        names_CD = names_CD - names_CD.mean(
            0
        )  # a young text encoder says nearly the same of every caption (cosine 0.9)
        logits_BC = F.normalize(pooled_BD, dim=1) @ F.normalize(names_CD, dim=1).T / 0.07
        signal = (
            scheduler.alphas_cumprod[t] * dropped
        )  # what is drowned in noise, or was told, need not be recognised
        matching = (
            F.cross_entropy(logits_BC, classes[i], reduction="none") * signal
        ).sum() / signal.sum()
        loss = denoising + align * matching
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses += torch.stack([denoising.detach(), matching.detach(), torch.ones(())])
        if (step + 1) % 200 == 0 or step + 1 == steps:
            seen = losses / losses[2]
            print(
                f"unet {step + 1}/{steps} denoising {seen[0]:.4f} matching {seen[1]:.4f} {time.time() - began:.0f} s",
                flush=True,
            )
            losses.zero_()
            _save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
                file,
            )
    return average["unet"].eval(), average["text"].eval(), scheduler


def _save(state, file: Path) -> None:
    temporary = file.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
