"""A frozen Stable Diffusion: images in, one pooled vector per image and selected layer out.

    image -> latent -> noised latent -> U-Net, with a hook on every selected layer -> pooled layers

`Backbone.pass_once` is this line. The U-Net's pass ends at the deepest selected layer; blocks
behind it are not even loaded. Any folder in diffusers' layout (scheduler, text_encoder, tokenizer,
unet, vae; weights as safetensors) is read by the same code, be it the embedded model or Stable
Diffusion 1.5.

Letters: B batch, D width of a vector, T tokens of a caption.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from semanticfl_ref.device import require_precision, vae_precision
from semanticfl_ref.diffusion.model_files import locate
from semanticfl_ref.diffusion.modules import (
    block_of,
    empty_unet,
    load_scheduler,
    load_vae_encoder,
    load_weights,
    unet_layers,
    weights_behind,
)
from semanticfl_ref.diffusion.sizes import ModelSizes
from semanticfl_ref.diffusion.text import TextEncoder
from semanticfl_ref.errors import NonFiniteError, UserError, unknown
from semanticfl_ref.randomness import generator

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """What a feature depends on beside image, caption and model.

    Attributes:
        timestep: noise level, from 0 (no noise) to the scheduler's last.
        seed: seed of the noise.
        pool: every layer of the U-Net is averaged over pool x pool cells.
        vae_pool: the latent is averaged over vae_pool x vae_pool cells.
        input_size: height and width to which images are resized first (bicubic, antialiased); 0:
            not resized.
        latent: "mean" of the VAE's distribution, or a "sample" of it.
    """

    timestep: int
    seed: int
    pool: int = 1
    vae_pool: int = 1
    input_size: int = 0
    latent: str = "mean"


class Backbone:
    """A frozen model.

    Attributes:
        folder: the model's folder.
        vae: its decoder has no storage.
        unet: weights behind the deepest selected layer have no storage.
        scheduler: the noise schedule.
        device: where the model runs.
        precision: the U-Net's precision.
        sizes: the model's sizes.
        layers: the selected layers.
        deepest: the one that is computed last, where a pass ends; None: at the U-Net's end, for
            comparisons.
        batch: images per pass. Every pass has this many, the last one filled up: libraries choose
            their algorithm by the batch size, so a smaller pass would round differently.
    """

    SMALL_PASS = 64
    LARGE_PASS = 8  # of a large model, to save memory

    def __init__(
        self,
        source: str | Path,
        *,
        layers: Sequence[str],
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        offline: bool = False,
        whole: bool = False,
    ):
        """Load a model.

        Args:
            source: "tiny" (the embedded model), a folder in diffusers' layout, or a hub id.
            layers: layers to read; ["all"]: the latent and every block.
            device: where the model runs.
            precision: the U-Net's: fp32, bf16 or fp16. The VAE overflows in fp16, see
                `vae_precision`.
            offline: no network access.
            whole: load also what lies behind the deepest layer, for comparisons.

        Raises:
            UserError: an unknown layer, or fp16 on a CPU.
            DataError: a part is missing or damaged.
            DownloadError: the weights are not on this machine and cannot be downloaded.
        """
        self.device, self.precision = torch.device(device), precision
        dtype = PRECISIONS[precision]
        require_precision(precision, self.device)
        self.folder = locate(source, offline=offline)
        self.scheduler = load_scheduler(self.folder)
        vae_dtype = PRECISIONS[vae_precision(precision, self.device)]
        self.vae = load_vae_encoder(self.folder, vae_dtype, self.device)
        self.unet = empty_unet(self.folder, self.vae.config.latent_channels)
        configs = (part.config for part in (self.unet, self.vae, self.scheduler))
        self.sizes = ModelSizes.of_configs(*configs)
        names = ["vae", *unet_layers(self.unet)]
        self.layers = resolve_layers(layers, names)
        self.deepest = max(self.layers, key=names.index)
        unused = () if whole else weights_behind(self.unet, self.deepest)
        load_weights(self.unet, self.folder, "unet", dtype, self.device, without=unused)
        if self.device.type == "cuda" or dtype == torch.bfloat16:
            for module in (self.unet, self.vae):
                module.to(memory_format=torch.channels_last)
        small = self.unet.config.block_out_channels[-1] <= 256
        self.batch = self.SMALL_PASS if small else self.LARGE_PASS

    @torch.no_grad()
    def features(
        self,
        images: torch.Tensor,
        *,
        prompt_embedding: torch.Tensor | None = None,
        first: int = 0,
        every_caption: bool = False,
        **options,
    ) -> dict[str, torch.Tensor]:
        """Pooled features of images.

        An image's features do not depend on its neighbours in the batch, except for rounding: its
        noise is keyed by its own content, and every pass has the same number of images.

        Args:
            images: uint8 [B, H, W, 3].
            prompt_embedding: float32 [T, D] or [1, T, D] for all images, or [B, T, D], see
                `TextEncoder.encode`; None: the empty caption.
            first: number of the first image, for messages.
            every_caption: each image has a U-Net pass under every one of the captions
                `prompt_embedding` [C, T, D], all with the same noise.
            options: the fields of `PassOptions`.

        Returns:
            layer -> float32 [B, channels * cells], or with `every_caption` [B, C, channels *
            cells]; on the CPU.

        Raises:
            UserError: a timestep, size or pool that the model does not admit.
            NonFiniteError: names image and layer.
        """
        assert images.dtype == torch.uint8
        count, height, width, _ = images.shape
        options = PassOptions(**options)
        self.sizes.check(options, self.layers, height, width)
        prompts = self.null_prompt if prompt_embedding is None else prompt_embedding
        captions = prompts[:, None] if every_caption else [prompts]
        captions = [each.expand(count, *prompts.shape[-2:]) for each in captions]  # [B, T, D]
        passes = []
        for start in range(0, count, self.batch):
            # The last image again, where there is none.
            indices = torch.arange(start, start + self.batch).clamp(max=count - 1)
            batches = (each[indices.to(each.device)] for each in captions)
            found = self.pass_once(images[indices], batches, options)
            pooled = {
                layer: torch.stack([one[layer] for one in found], 1)[: count - start].cpu()
                for layer in found[0]
            }
            check_finite(
                pooled,
                first + start,
                f"features are not finite in {self.precision}; use diffusion.precision=fp32, or "
                f"check the weights",
            )
            passes.append(pooled)
        features = {layer: torch.cat([pooled[layer] for pooled in passes]) for layer in self.layers}
        return features if every_caption else {k: values[:, 0] for k, values in features.items()}

    def pass_once(
        self, images: torch.Tensor, captions: Iterable[torch.Tensor], options: PassOptions
    ) -> list[dict[str, torch.Tensor]]:
        """One pass of exactly `batch` images through the VAE, and one through the U-Net for each of
        `captions`, the prompts [B, T, D].

        Equation (noised-latent) [S, t; the scheduler is Stable Diffusion's]:
            z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise,  z = scaling_factor * VAE(image)
        Test: tests/diffusion/test_backbone.py::test_the_noise_level_is_the_timestep

        Returns:
            For each caption layer -> float32 [B, channels * cells] on the device, in the order of
            computation; "vae" is always among them.
        """
        pixels = scale_images(images.to(self.device), options.input_size)  # [B, 3, H, W]
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latent = distribution.mean.float()  # [B, 4, H / 8, W / 8] in Stable Diffusion
        if options.latent == "sample":
            noise = image_noise(images, latent.shape[1:], options.seed, "vae-sample")
            latent = latent + distribution.std.float() * noise.to(self.device)
        latent = latent * self.vae.config.scaling_factor
        vae = {"vae": pool_cells(latent, options.vae_pool)}
        if self.deepest == "vae":
            return [vae for _ in captions]
        noise = image_noise(images, latent.shape[1:], options.seed, f"noise/{options.timestep}")
        timesteps = torch.full((len(images),), options.timestep, device=self.device)
        noised_latent = self.scheduler.add_noise(latent, noise.to(self.device), timesteps)
        inputs, found = noised_latent.to(self.unet.dtype), []
        for prompts_BTD in captions:
            prompts_BTD = prompts_BTD.to(self.device, inputs.dtype)
            pooled = dict(vae)
            with self._hooks(pooled, options.pool):
                self.unet(inputs, timesteps, prompts_BTD, return_dict=False)
            found.append(pooled)
        return found

    @cached_property
    def null_prompt(self) -> torch.Tensor:
        """The empty caption as the U-Net sees it: float32 [T, D]."""
        return TextEncoder(self.folder, self.device).encode([""])[0][0]

    def widths(self, pool: int = 1, vae_pool: int = 1) -> dict[str, int]:
        """layer -> width of its pooled vector."""
        return self.sizes.widths(self.layers, pool, vae_pool)

    def memory(self) -> str:
        """A line for readers: how much of the U-Net is loaded."""
        kept = sum(weight.numel() for weight in self.unet.parameters() if not weight.is_meta)
        whole, size = self.unet.num_parameters(), PRECISIONS[self.precision].itemsize
        return (
            f"U-Net up to {self.deepest}: {kept / 1e6:.1f} of {whole / 1e6:.1f} M parameters, "
            f"{kept * size / 2**20:.0f} of {whole * size / 2**20:.0f} MiB in {self.precision}"
        )

    @contextlib.contextmanager
    def _hooks(self, pooled: dict[str, torch.Tensor], pool: int) -> Iterator[None]:
        """While open, selected layers put their pooled output into `pooled`.

        Pooled at once, since feature maps are large. No hook is left behind, whatever happens.
        """

        def keep(layer: str, _module, _inputs, output) -> None:
            values = output[0] if isinstance(output, tuple) else output
            pooled[layer] = pool_cells(values, pool)
            if layer == self.deepest:
                raise _DeepestLayerReached

        modules = unet_layers(self.unet)
        with contextlib.ExitStack() as hooks, contextlib.suppress(_DeepestLayerReached):
            for layer in self.layers:
                if layer != "vae":
                    hook = modules[layer].register_forward_hook(partial(keep, layer))
                    hooks.enter_context(hook)
            yield


def resolve_layers(layers: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The requested layers, checked against those of the model.

    ("all",) stands for the latent and every block, without the layers inside of blocks.

    Raises:
        UserError: an unknown layer, none, or one twice.
    """
    layers = tuple(layers)
    if layers == ("all",):
        return tuple(name for name in names if name == block_of(name))
    for layer in layers:
        if layer not in names:
            raise unknown("layer", layer, names)
    if not layers or len(set(layers)) < len(layers):
        raise UserError(
            f"diffusion.layers = {','.join(layers)}: expected at least one of {', '.join(names)}, "
            f"each once"
        )
    return layers


def scale_images(images: torch.Tensor, input_size: int) -> torch.Tensor:
    """uint8 [B, H, W, 3] in 0 ... 255 -> float32 [B, 3, H, W] in -1 ... 1, the VAE's range.

    Args:
        images: on any device.
        input_size: height and width to resize to first; 0: not resized.
    """
    values = images.permute(0, 3, 1, 2).float()
    if input_size and values.shape[2:] != (input_size, input_size):
        values = F.interpolate(values, input_size, mode="bicubic", antialias=True).clamp(0, 255)
    return values / 127.5 - 1


def pool_cells(values_BCHW: torch.Tensor, pool: int) -> torch.Tensor:
    """Means over pool x pool cells: [B, C, H, W] -> float32 [B, C * pool * pool]."""
    return F.adaptive_avg_pool2d(values_BCHW.float(), pool).flatten(1)


def image_noise(
    images: torch.Tensor, shape: Sequence[int], seed: int, purpose: str
) -> torch.Tensor:
    """Standard normal numbers float32 [B, *shape], on the CPU.

    Every image has a generator of its own, keyed by the SHA-256 of its shape and bytes.

    Args:
        images: uint8 [B, H, W, 3].
        shape: shape of one image's noise.
        seed: seed of the noise.
        purpose: what the noise is for; other purposes get other numbers.
    """
    noise = []
    for image in images.cpu():
        content = f"{tuple(image.shape)}".encode() + image.numpy().tobytes()
        key = f"{purpose}/{hashlib.sha256(content).hexdigest()}"
        noise.append(torch.randn(shape, generator=generator(seed, key)))
    return torch.stack(noise)


def check_finite(features: dict[str, torch.Tensor], first: int, problem: str) -> None:
    """Check that all features are finite.

    Args:
        features: layer -> [B, ...], in the order of computation.
        first: number of the first image.
        problem: what is wrong otherwise, and how to fix it.

    Raises:
        NonFiniteError: names the first layer that is not, and the first such image.
    """
    for layer, values in features.items():
        bad = (~values.isfinite().flatten(1).all(1)).nonzero()
        if len(bad):
            raise NonFiniteError(f"image {first + int(bad[0])}, layer {layer}: {problem}")


class _DeepestLayerReached(Exception):
    """Ends a U-Net pass from inside the hook of the deepest selected layer."""
