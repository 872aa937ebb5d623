"""A frozen Stable Diffusion: images and captions in, one pooled vector per image and tapped layer out.

Any folder in diffusers' layout (scheduler, text_encoder, tokenizer, unet, vae; weights as safetensors) is read by the same code,
be it the small model in this package or Stable Diffusion 1.5. An image becomes uint8 -> [-1, 1] -> VAE latent (mean, times the VAE's
`scaling_factor`) -> noise at one timestep -> one U-Net pass, which ends at the deepest tapped block: what lies beyond is never computed.

Letters: B batch, C classes, D width of a vector, T tokens of a caption.
"""

import hashlib
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from semanticfl_ref.diffusion.weights import fingerprint, load_parts, locate
from semanticfl_ref.errors import NonFiniteError, UserError, unknown
from semanticfl_ref.randomness import generator

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _DeepestTapReached(Exception):
    """Ends a U-Net pass from inside the hook of the last block that is needed."""


class Backbone:
    """A loaded model; `Backbone.load` makes one."""

    # Every pass has this many images, the last one filled up: libraries choose their algorithm by the batch's size, so a pass of
    # another size would round differently. Large models take fewer, for memory.
    SMALL_PASS, LARGE_PASS = 64, 8

    def __init__(self, folder: Path, parts: dict, taps: tuple[str, ...], device: torch.device, dtype: torch.dtype):
        self.vae, self.unet, self.text_encoder = parts["vae"], parts["unet"], parts["text_encoder"]
        self.tokenizer, self.scheduler = parts["tokenizer"], parts["scheduler"]
        self.folder, self.device, self.dtype = folder, device, dtype
        self.stop_early = True
        self.batch = self.SMALL_PASS if self.unet.config.block_out_channels[-1] <= 256 else self.LARGE_PASS
        self._blocks = {f"down.{i}": block for i, block in enumerate(self.unet.down_blocks)}
        if self.unet.mid_block is not None:
            self._blocks["mid"] = self.unet.mid_block
        self._blocks |= {f"up.{i}": block for i, block in enumerate(self.unet.up_blocks)}
        for tap in taps:
            if tap not in self.tap_names():
                raise unknown("tap", tap, self.tap_names())
        if not taps or len(set(taps)) < len(taps):
            raise UserError(f"taps {list(taps)}: name at least one of {', '.join(self.tap_names())}, none twice")
        self.taps = tuple(taps)
        self._deepest = max(self.taps, key=self.tap_names().index)

    @classmethod
    def load(cls, source: str | Path = "tiny", *, taps, device="cpu", dtype: torch.dtype = torch.float32, offline: bool = False) -> "Backbone":
        """Load a frozen model.

        Args:
            source: "tiny" (the model in the package), a folder in diffusers' layout, or a hub id.
            taps: which layers to read, of `tap_names()`.
            device: where it runs.
            dtype: of the U-Net; the VAE (which overflows in fp16) and the text encoder stay in fp32.
            offline: open no socket.

        Raises:
            DataError: a part is missing or damaged. DownloadError: the weights are not here and cannot be fetched.
        """
        device = torch.device(device)
        if dtype == torch.float16 and device.type == "cpu":
            raise UserError("precision fp16 needs a CUDA device; on a CPU choose fp32 or bf16")
        folder = locate(source, offline=offline)
        parts = load_parts(folder, dtype)
        for part in ("vae", "unet", "text_encoder"):
            parts[part] = parts[part].eval().requires_grad_(False).to(device)
        if device.type == "cuda" or dtype == torch.bfloat16:
            parts["unet"].to(memory_format=torch.channels_last), parts["vae"].to(memory_format=torch.channels_last)
        return cls(folder, parts, tuple(taps), device, dtype)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's files, see `weights.fingerprint`."""
        return fingerprint(self.folder)

    def tap_names(self) -> list[str]:
        """The layers that can be tapped, in the order in which they are computed; "vae" is the latent itself."""
        return ["vae", *self._blocks]

    @torch.no_grad()
    def features(self, images, *, timestep: int, seed: int, prompt_embedding=None, pool: int = 1, input_size: int | None = None, first: int = 0):
        """Pooled features of images.

        An image's features depend on its bytes, the seed and these options, not on its neighbours in the batch: its noise is keyed by
        its own content, and every pass has the same number of images. What is left is the libraries' rounding by place in a batch.

        Args:
            images: uint8 [B, H, W, 3].
            timestep: of the scheduler, 0 (no noise) to its last.
            seed: of the noise.
            prompt_embedding: float32 [T, D] for all images or [B, T, D], see `hidden`; None for the empty caption.
            pool: each layer is averaged over a grid of pool x pool cells.
            input_size: resize the images (bicubic, antialiased) to this height and width first.
            first: the number of the first image, for messages.

        Returns:
            tap -> float32 [B, channels * pool * pool], on the CPU.

        Raises:
            UserError: a timestep, size or pool that the model does not admit. NonFiniteError: names image and tap.
        """
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[3] == 3 and len(images), (images.dtype, images.shape)
        self._check(timestep, pool, [input_size] * 2 if input_size else images.shape[1:3])
        if prompt_embedding is None:
            prompt_embedding = self.hidden([""])[0]
        prompts = prompt_embedding.expand(len(images), -1, -1) if prompt_embedding.ndim == 2 else prompt_embedding
        parts: dict[str, list[torch.Tensor]] = {tap: [] for tap in self.taps}
        for start in range(0, len(images), self.batch):
            count = min(self.batch, len(images) - start)
            fill = torch.arange(start, start + self.batch).clamp(max=start + count - 1)  # the last image again, where there is none
            pooled = self._pass(images[fill], prompts[fill.to(prompts.device)], timestep, seed, pool, input_size)
            for tap, values in pooled.items():
                values = values[:count].cpu()
                bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
                if bad:
                    raise NonFiniteError(
                        f"image {first + start + bad[0]}, tap {tap}: features are not finite in {str(self.dtype)[6:]}; choose precision fp32, or check the weights"
                    )
                parts[tap].append(values)
        return {tap: torch.cat(values) for tap, values in parts.items()}

    @torch.no_grad()
    def hidden(self, captions: list[str]) -> torch.Tensor:
        """What the U-Net attends to: the text encoder's last hidden states, float32 [len(captions), T, D]."""
        return torch.cat([self._encode(captions[i : i + 64]).last_hidden_state for i in range(0, len(captions), 64)])

    @torch.no_grad()
    def text(self, class_names, template: str = "a photo of a {}") -> torch.Tensor:
        """Text anchors: the text encoder's pooled output of each class's caption, float32 [C, D], on the CPU."""
        prompts = captions(template, class_names)
        return torch.cat([self._encode(prompts[i : i + 64]).pooler_output for i in range(0, len(prompts), 64)]).cpu()

    def _encode(self, prompts: list[str]):
        longest = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        tokens = self.tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.device))

    def _check(self, timestep: int, pool: int, size) -> None:
        last = self.scheduler.config.num_train_timesteps - 1
        if not 0 <= timestep <= last:
            raise UserError(f"timestep {timestep} is outside the scheduler's 0 ... {last}")
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if size[0] % shrink or size[1] % shrink:
            raise UserError(f"images of {size[0]}x{size[1]}: the VAE needs multiples of {shrink}; give an input size that is one")
        smallest = min(size) // shrink // (2 ** (len(self.unet.config.block_out_channels) - 1) if self.taps != ("vae",) else 1)
        if not 1 <= pool <= max(smallest, 1):
            raise UserError(f"pool {pool}: at input size {min(size)} the smallest layer has {max(smallest, 1)} cells a side; choose 1 ... {max(smallest, 1)}")

    def _pass(self, images, prompts, timestep: int, seed: int, pool: int, input_size: int | None) -> dict[str, torch.Tensor]:
        """One pass of exactly `self.batch` images: tap -> float32 [B, channels * pool * pool] on the device."""
        latents = self.vae.encode(self._scaled(images, input_size)).latent_dist.mean * self.vae.config.scaling_factor
        pooled = {"vae": _pool(latents, pool)} if "vae" in self.taps else {}
        if self._deepest == "vae" and self.stop_early:
            return pooled
        noise = torch.stack([_noise(image, latents.shape[1:], timestep, seed) for image in images]).to(self.device)
        steps = torch.full((len(images),), timestep, device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, steps).to(self.dtype)
        with self._hooks(pooled, pool):
            try:
                self.unet(noisy, steps, prompts.to(self.device, self.dtype), return_dict=False)
            except _DeepestTapReached:
                pass
        return pooled

    def _scaled(self, images: torch.Tensor, input_size: int | None) -> torch.Tensor:
        """uint8 [B, H, W, 3] in 0 ... 255 -> float32 [B, 3, H, W] in -1 ... 1. The only place that scales."""
        values = images.to(self.device).permute(0, 3, 1, 2).float()
        if input_size and values.shape[2:] != (input_size, input_size):
            values = F.interpolate(values, size=(input_size, input_size), mode="bicubic", antialias=True).clamp(0, 255)
        return values / 127.5 - 1

    @contextmanager
    def _hooks(self, pooled: dict[str, torch.Tensor], pool: int):
        """While it is open, tapped blocks put their pooled output into `pooled`; nothing is left behind, whatever happens."""

        def hook_of(tap: str):
            def hook(_module, _inputs, output):
                pooled[tap] = _pool(output[0] if isinstance(output, tuple) else output, pool)  # pooled at once: maps are large
                if tap == self._deepest and self.stop_early:
                    raise _DeepestTapReached

            return hook

        handles = []
        try:
            for tap in self.taps:
                if tap != "vae":
                    handles.append(self._blocks[tap].register_forward_hook(hook_of(tap)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def captions(template: str, class_names) -> list[str]:
    """The template's `{}` (or `{class}`) replaced by each class's name; underscores of file names become spaces."""
    if "{}" not in template and "{class}" not in template:
        raise UserError(f"prompt {template!r} has no place for the class: write {{}} where its name goes, as in 'a photo of a {{}}'")
    return [template.replace("{class}", "{}").replace("{}", name.replace("_", " ")) for name in class_names]


def _noise(image: torch.Tensor, shape, timestep: int, seed: int) -> torch.Tensor:
    content = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.cpu().contiguous().numpy().tobytes()).hexdigest()
    return torch.randn(shape, generator=generator(seed, f"noise/{timestep}/{content}"))


def _pool(values: torch.Tensor, pool: int) -> torch.Tensor:
    return F.adaptive_avg_pool2d(values.float(), pool).flatten(1)
