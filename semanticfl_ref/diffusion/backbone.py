"""A frozen Stable Diffusion: images in, one pooled vector per image and selected layer out.

Any folder in diffusers' layout (scheduler, text_encoder, tokenizer, unet, vae; weights as
safetensors) is read by the same code, be it the small model in this package or Stable Diffusion
1.5. An image becomes uint8 -> [-1, 1] -> VAE latent (times the VAE's `scaling_factor`) -> noise at
one timestep -> one U-Net pass, which ends at the deepest selected layer: what lies beyond is never
computed, and blocks beyond are not even loaded.

Letters: B batch, D width of a vector, T tokens of a caption.
"""

import hashlib
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from semanticfl_ref.device import vae_precision
from semanticfl_ref.diffusion.model_files import locate
from semanticfl_ref.diffusion.modules import (
    block_of,
    empty_unet,
    fill,
    unet_layers,
    load_scheduler,
    load_vae_encoder,
    parameters,
    prune,
)
from semanticfl_ref.diffusion.text import TextEncoder
from semanticfl_ref.errors import NonFiniteError, UserError, unknown
from semanticfl_ref.randomness import generator

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENTS = ("mean", "sample")


class _DeepestTapReached(Exception):
    """Ends a U-Net pass from inside the hook of the last layer that is needed."""


class Backbone:
    """A loaded model; `Backbone.load` makes one."""

    # Every pass has this many images, the last one filled up: libraries choose their algorithm by
    # the batch's size, so a pass of
    # another size would round differently. Large models take fewer, for memory.
    SMALL_PASS, LARGE_PASS = 64, 8

    def __init__(
        self,
        folder: Path,
        vae,
        unet,
        scheduler,
        layers: tuple[str, ...],
        names: list[str],
        device: torch.device,
        unet_parameters: int,
    ):
        self.folder, self.vae, self.unet, self.scheduler, self.device = (
            folder,
            vae,
            unet,
            scheduler,
            device,
        )
        self.layers, self._names, self.deepest = layers, names, max(layers, key=names.index)
        self.unet_parameters = unet_parameters  # before anything was cut off
        self.stop_early = True
        self.batch = (
            self.SMALL_PASS if unet.config.block_out_channels[-1] <= 256 else self.LARGE_PASS
        )

    @classmethod
    def load(
        cls,
        source: str | Path = "tiny",
        *,
        layers,
        device="cpu",
        precision: str = "fp32",
        offline: bool = False,
        pruned: bool = True,
    ) -> "Backbone":
        """Load a frozen model.

        Args:
            source: "tiny" (the model in the package), a folder in diffusers' layout, or a hub id.
            layers: which layers to read, of `layer_names()`; ["all"] reads the latent and every block.
            device: where it runs.
            precision: fp32, bf16 or fp16; of the U-Net. The VAE overflows in fp16: it runs in fp32
                beside an fp32 U-Net, else in bf16 (in fp32 on a GPU without it).
            offline: open no socket.
            pruned: leave out what lies behind the deepest layer; False is for comparisons.

        Raises:
            UserError: an unknown layer, or fp16 on a CPU. DataError: a part is missing or damaged.
                DownloadError: the weights are not here and cannot be fetched.
        """
        device, dtype = torch.device(device), PRECISIONS[precision]
        if dtype == torch.float16 and device.type == "cpu":
            raise UserError("precision fp16 needs a CUDA device; on a CPU choose fp32 or bf16")
        folder = locate(source, offline=offline)
        vae = load_vae_encoder(folder, PRECISIONS[vae_precision(precision, device)], device)
        unet = empty_unet(folder, vae.config.latent_channels)
        names, total = ["vae", *unet_layers(unet)], parameters(unet)
        layers = resolve_layers(layers, names)
        deepest = max(layers, key=names.index)
        if pruned and deepest != "vae":
            prune(unet, deepest)
        if not pruned or deepest != "vae":  # the latent alone needs no U-Net
            fill(unet, folder, "unet", dtype, device)
        if device.type == "cuda" or dtype == torch.bfloat16:
            unet.to(memory_format=torch.channels_last), vae.to(memory_format=torch.channels_last)
        return cls(folder, vae, unet, load_scheduler(folder), layers, names, device, total)

    def layer_names(self) -> list[str]:
        """The layers that can be selected, in the order in which they are computed; "vae" is the
        latent itself.
        """
        return list(self._names)

    @property
    def dtype(self) -> torch.dtype:
        """Of the U-Net."""
        return next(self.unet.parameters()).dtype

    def widths(self, pool: int = 1) -> dict[str, int]:
        """layer -> entries of its pooled vector."""
        channels = self.unet.config.block_out_channels
        blocks = {"vae": self.vae.config.latent_channels, "mid": channels[-1]}
        blocks |= {f"down.{i}": width for i, width in enumerate(channels)} | {
            f"up.{i}": width for i, width in enumerate(reversed(channels))
        }
        return {layer: blocks[block_of(layer)] * pool**2 for layer in self.layers}

    def memory(self) -> str:
        """What the U-Net takes, and would have taken, for a reader."""
        kept = 0 if self.deepest == "vae" else parameters(self.unet)
        whole, size = self.unet_parameters, self.dtype.itemsize
        bytes_of = (
            f"{kept * size / 2**20:.0f} of {whole * size / 2**20:.0f} MiB in {str(self.dtype)[6:]}"
        )
        return f"U-Net up to {self.deepest}: {kept / 1e6:.1f} of {whole / 1e6:.1f} M parameters, {bytes_of}"

    @cached_property
    def null_prompt(self) -> torch.Tensor:
        """The empty caption as the U-Net sees it: float32 [T, D]."""
        return TextEncoder(self.folder, self.device).encode([""])[0][0]

    @torch.no_grad()
    def features(
        self,
        images,
        *,
        timestep: int,
        seed: int,
        prompt_embedding=None,
        pool: int = 1,
        input_size: int | None = None,
        latent: str = "mean",
        first: int = 0,
    ):
        """Pooled features of images.

        An image's features depend on its bytes, the seed and these options, not on its neighbours
        in the batch: its noise is keyed by its own content, and every pass has the same number of
        images. What is left is the libraries' rounding by place in a batch.

        Args:
            images: uint8 [B, H, W, 3].
            timestep: of the scheduler, 0 (no noise) to its last.
            seed: of the noise.
            prompt_embedding: float32 [T, D] for all images or [B, T, D], see `TextEncoder.encode`;
                None for the empty caption.
            pool: each layer is averaged over a grid of pool x pool cells.
            input_size: resize the images (bicubic, antialiased) to this height and width first.
            latent: "mean" of the VAE's distribution, or a "sample" of it, keyed by the image's
                content too.
            first: the number of the first image, for messages.

        Returns:
            layer -> float32 [B, channels * pool * pool], on the CPU.

        Raises:
            UserError: a timestep, size or pool that the model does not admit. NonFiniteError: names
                image and layer.
        """
        assert (
            images.dtype == torch.uint8
            and images.ndim == 4
            and images.shape[3] == 3
            and len(images)
        ), (images.dtype, images.shape)
        self._check(timestep, pool, [input_size] * 2 if input_size else images.shape[1:3])
        assert latent in LATENTS, latent
        prompts = self.null_prompt if prompt_embedding is None else prompt_embedding
        prompts = prompts.expand(len(images), -1, -1) if prompts.ndim == 2 else prompts
        parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in self.layers}
        for start in range(0, len(images), self.batch):
            count = min(self.batch, len(images) - start)
            places = torch.arange(start, start + self.batch).clamp(
                max=start + count - 1
            )  # the last image again, where there is none
            pooled = self._pass(
                images[places],
                prompts[places.to(prompts.device)],
                timestep,
                seed,
                pool,
                input_size,
                latent,
            )
            for (
                layer,
                values,
            ) in (
                pooled.items()
            ):  # in the order of computation: the first layer that went wrong is named
                values = values[:count].cpu()
                bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
                if bad:
                    raise NonFiniteError(
                        f"image {first + start + bad[0]}, layer {layer}: features are not finite in {str(self.dtype)[6:]}; choose precision fp32, or check the weights"
                    )
                if layer in parts:
                    parts[layer].append(values)
        return {layer: torch.cat(values) for layer, values in parts.items()}

    def _check(self, timestep: int, pool: int, size) -> None:
        last = self.scheduler.config.num_train_timesteps - 1
        if not 0 <= timestep <= last:
            raise UserError(f"timestep {timestep} is outside the scheduler's 0 ... {last}")
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if size[0] % shrink or size[1] % shrink:
            raise UserError(
                f"images of {size[0]}x{size[1]}: the VAE needs multiples of {shrink}; give an input size that is one"
            )
        halvings = len(self.unet.config.block_out_channels) - 1 if self.layers != ("vae",) else 0
        smallest = -(-min(size) // (shrink * 2**halvings))  # the U-Net rounds odd sizes up
        if not 1 <= pool <= smallest:
            raise UserError(
                f"pool {pool}: at input size {min(size)} the smallest layer has {smallest} cells a side; choose 1 ... {smallest}"
            )

    def _pass(
        self,
        images,
        prompts,
        timestep: int,
        seed: int,
        pool: int,
        input_size: int | None,
        latent: str,
    ) -> dict[str, torch.Tensor]:
        """One pass of exactly `self.batch` images: layer -> float32 [B, channels * pool * pool] on
        the device; "vae" always among them.

        Equation (noised-latent) [S, t; the scheduler is Stable Diffusion's]: z_t = sqrt(abar_t) z +
            sqrt(1 - abar_t) noise,  z = scaling_factor * VAE(image)
        Test: tests/diffusion/test_backbone.py::test_the_noise_level_is_the_timestep
        """
        found = self.vae.encode(self._scaled(images, input_size)).latent_dist
        latents = found.mean.float()
        keys = [_content(image) for image in images]
        if latent == "sample":
            latents = latents + found.std.float() * _noise(
                keys, latents.shape[1:], seed, "vae-sample"
            ).to(self.device)
        latents = latents * self.vae.config.scaling_factor
        pooled = {"vae": _pool(latents, pool)}
        if self.deepest == "vae" and self.stop_early:
            return pooled
        noise = _noise(keys, latents.shape[1:], seed, f"noise/{timestep}").to(self.device)
        steps = torch.full((len(images),), timestep, device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, steps).to(self.dtype)
        with self._hooks(pooled, pool):
            try:
                self.unet(noisy, steps, prompts.to(self.device, self.dtype), return_dict=False)
            except _DeepestTapReached:
                pass
        return pooled

    def _scaled(self, images: torch.Tensor, input_size: int | None) -> torch.Tensor:
        """uint8 [B, H, W, 3] in 0 ... 255 -> [B, 3, H, W] in -1 ... 1, in the VAE's dtype. The only
        place that scales.
        """
        values = images.to(self.device).permute(0, 3, 1, 2).float()
        if input_size and values.shape[2:] != (input_size, input_size):
            values = F.interpolate(
                values, size=(input_size, input_size), mode="bicubic", antialias=True
            ).clamp(0, 255)
        values = values / 127.5 - 1
        assert values.min() >= -1 and values.max() <= 1, "the VAE was trained on -1 ... 1"
        return values.to(next(self.vae.parameters()).dtype)

    @contextmanager
    def _hooks(self, pooled: dict[str, torch.Tensor], pool: int):
        """While it is open, selected layers put their pooled output into `pooled`; nothing is left
        behind, whatever happens.
        """

        def hook_of(layer: str):
            def hook(_module, _inputs, output):
                pooled[layer] = _pool(
                    output[0] if isinstance(output, tuple) else output, pool
                )  # pooled at once: maps are large
                if layer == self.deepest and self.stop_early:
                    raise _DeepestTapReached

            return hook

        modules, handles = unet_layers(self.unet), []
        try:
            for layer in self.layers:
                if layer != "vae":
                    handles.append(modules[layer].register_forward_hook(hook_of(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def resolve_layers(layers, names: list[str]) -> tuple[str, ...]:
    """Taps as asked for, checked against the model's layers; "all" alone means the latent and every
    whole block.

    Raises:
        UserError: an unknown layer, none, or one twice.
    """
    layers = tuple(layers)
    if layers == ("all",):
        return tuple(
            name for name in names if "s." not in name
        )  # neither resnets.0 nor attentions.0
    for layer in layers:
        if layer not in names:
            raise unknown("layer", layer, names)
    if not layers or len(set(layers)) < len(layers):
        raise UserError(
            f"layers {list(layers)}: name at least one of {', '.join(names)}, none twice"
        )
    return layers


def _content(image: torch.Tensor) -> str:
    return hashlib.sha256(
        f"{tuple(image.shape)}".encode() + image.cpu().contiguous().numpy().tobytes()
    ).hexdigest()


def _noise(keys: list[str], shape, seed: int, purpose: str) -> torch.Tensor:
    """float32 [B, *shape] of standard normal numbers, each image's from a generator of its own."""
    return torch.stack(
        [torch.randn(shape, generator=generator(seed, f"{purpose}/{key}")) for key in keys]
    )


def _pool(values: torch.Tensor, pool: int) -> torch.Tensor:
    return F.adaptive_avg_pool2d(values.float(), pool).flatten(1)
