"""A frozen Stable Diffusion: images in, one pooled vector per image and selected layer out.

    image -> latent -> noised latent -> U-Net, with a hook on every selected layer -> pooled layers

`Backbone.pass_once` is this line. The U-Net's pass ends at the deepest selected layer; blocks
behind it are not even loaded. Any folder in diffusers' layout (scheduler, text_encoder, tokenizer,
unet, vae; weights as safetensors) is read by the same code, be it the embedded model or Stable
Diffusion 1.5.

Letters: B batch, D width of a vector, T tokens of a caption.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from semanticfl_ref.device import require_precision, vae_precision
from semanticfl_ref.diffusion.fused_norms import fuse_norms
from semanticfl_ref.diffusion.model_files import locate
from semanticfl_ref.diffusion.modules import (
    block_of,
    empty_unet,
    keep_prompt_projections,
    load_scheduler,
    load_vae_encoder,
    load_weights,
    unet_layers,
    weights_behind,
)
from semanticfl_ref.diffusion.passes import host_pass_size, image_noise, pool_cells, scale_images
from semanticfl_ref.diffusion.sizes import ModelSizes
from semanticfl_ref.diffusion.text import TextEncoder
from semanticfl_ref.errors import NonFiniteError, UserError, unknown

# Layer, its output [B, C, H, W] -> what is kept of it, a row per image.
Reduce = Callable[[str, torch.Tensor], torch.Tensor]
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
        batch: images per pass; as many as on a CPU until it is set. Every pass has this many, the
            last one filled up: libraries choose their algorithm by the batch size, so a smaller
            pass would round differently.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        layers: Sequence[str],
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        offline: bool = False,
        whole: bool = False,
        fused: bool | None = None,
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
            fused: GroupNorm and SiLU as one kernel, see `fuse_norms`; None: on a GPU.

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
        if self.device.type == "cuda" if fused is None else fused:
            fuse_norms(self.vae.encoder)
            fuse_norms(self.unet)
        keep_prompt_projections(self.unet)
        self.batch = host_pass_size(self.unet.config)
        self._null: torch.Tensor | None = None  # the empty caption for a whole pass

    def features(self, images: torch.Tensor, **options) -> dict[str, torch.Tensor]:
        """`start`, waited for."""
        return self.start(images, **options)()

    @torch.no_grad()
    def start(
        self,
        images: torch.Tensor,
        *,
        prompt_embedding: torch.Tensor | None = None,
        first: int = 0,
        every_caption: bool = False,
        reduce: Reduce | None = None,
        **options,
    ) -> Callable[[], dict[str, torch.Tensor]]:
        """Start computing the pooled features of images.

        An image's features do not depend on its neighbours in the batch, except for rounding: its
        noise is keyed by its own content, and every pass has the same number of images. On CUDA
        nothing here waits for the device, which works on while the host hashes the next images.

        Args:
            images: uint8 [B, H, W, 3].
            prompt_embedding: float32 [T, D] or [1, T, D] for all images, or [B, T, D], see
                `TextEncoder.encode`; None: the empty caption.
            first: number of the first image, for messages.
            every_caption: each image has a U-Net pass under every one of the captions
                `prompt_embedding` [C, T, D], all with the same noise.
            reduce: what to keep of a U-Net layer; None: means over cells.
            options: the fields of `PassOptions`.

        Returns:
            A function that waits and returns layer -> float32 [B, channels * cells], or with
            `every_caption` [B, C, channels * cells], on the CPU. It raises NonFiniteError, which
            names image and layer.

        Raises:
            UserError: a timestep, size or pool that the model does not admit.
        """
        assert images.dtype == torch.uint8
        count, height, width, _ = images.shape
        options = PassOptions(**options)
        self.sizes.check(options, self.layers, height, width)
        captions = self._captions(prompt_embedding, every_caption, count)
        passes = []
        for start in range(0, count, self.batch):
            # The last image again, where there is none.
            indices = torch.arange(start, start + self.batch).clamp(max=count - 1)
            found = self.pass_once(images[indices], captions(indices), options, reduce)
            pooled = {
                layer: torch.stack([one[layer] for one in found], 1)[: count - start]
                for layer in found[0]
            }
            # Into pinned memory.
            copies = {k: values.to("cpu", non_blocking=True) for k, values in pooled.items()}
            passes.append((first + start, copies))
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.current_stream(self.device).record_event()

        def wait() -> dict[str, torch.Tensor]:
            if copied is not None:
                copied.synchronize()
            for number, pooled in passes:
                check_finite(
                    pooled,
                    number,
                    f"features are not finite in {self.precision}; use diffusion.precision=fp32, "
                    f"or check the weights",
                )
            found = {k: torch.cat([pooled[k] for _, pooled in passes]) for k in self.layers}
            return found if every_caption else {k: values[:, 0] for k, values in found.items()}

        return wait

    def pass_once(
        self,
        images: torch.Tensor,
        captions: Iterable[torch.Tensor],
        options: PassOptions,
        reduce: Reduce | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """One pass of exactly `batch` images through the VAE, and one through the U-Net for each of
        `captions`, the prompts [B, T, D]. `reduce` is that of `features`.

        Equation (noised-latent) [S, t; the scheduler is Stable Diffusion's]:
            z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise,  z = scaling_factor * VAE(image)
        Test: tests/diffusion/test_backbone.py::test_the_noise_level_is_the_timestep

        Returns:
            For each caption layer -> float32 [B, channels * cells] on the device, in the order of
            computation; "vae" is always among them.
        """
        pixels = scale_images(self._sent(images), options.input_size)  # [B, 3, H, W]
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latent = distribution.mean.float()  # [B, 4, H / 8, W / 8] in Stable Diffusion
        if options.latent == "sample":
            noise = image_noise(images, latent.shape[1:], options.seed, "vae-sample")
            latent = latent + distribution.std.float() * self._sent(noise)
        if self.vae.config.shift_factor:  # Stable Diffusion's VAE has none
            latent = latent - self.vae.config.shift_factor
        latent = latent * self.vae.config.scaling_factor
        vae = {"vae": pool_cells(latent, options.vae_pool)}
        if self.deepest == "vae":
            return [vae for _ in captions]
        noise = image_noise(images, latent.shape[1:], options.seed, f"noise/{options.timestep}")
        timesteps = torch.full((len(images),), options.timestep, device=self.device)
        noised_latent = self.scheduler.add_noise(latent, self._sent(noise), timesteps)
        inputs, found = noised_latent.to(self.unet.dtype), []
        for prompts_BTD in captions:
            prompts_BTD = prompts_BTD.to(self.device, inputs.dtype)
            pooled = dict(vae)
            with self._hooks(pooled, reduce or partial(_mean_over_cells, options.pool)):
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

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device; no one waits for the copy."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def _captions(
        self, embedding: torch.Tensor | None, every_caption: bool, count: int
    ) -> Callable[[torch.Tensor], Iterable[torch.Tensor]]:
        """A function: indices of a pass's images -> its prompts [B, T, D], one after another.

        A prompt for all images is the same tensor in every pass, which spares its projections, see
        `KeptProjection`.
        """

        def repeated(prompt: torch.Tensor) -> torch.Tensor:
            whole = prompt.expand(self.batch, *prompt.shape[-2:])
            return whole.to(self.device, self.unet.dtype).contiguous()

        if embedding is None:
            if self._null is None or len(self._null) != self.batch:
                self._null = repeated(self.null_prompt)
            return lambda _indices: [self._null]
        if embedding.ndim == 2 or (len(embedding) == 1 and not every_caption):
            same = repeated(embedding)
            return lambda _indices: [same]
        captions = embedding[:, None] if every_caption else [embedding]
        captions = [each.expand(count, *embedding.shape[-2:]) for each in captions]
        return lambda indices: (each[indices.to(each.device)] for each in captions)

    @contextlib.contextmanager
    def _hooks(self, pooled: dict[str, torch.Tensor], reduce: Reduce) -> Iterator[None]:
        """While open, selected layers put their reduced output into `pooled`.

        Pooled at once, since feature maps are large. No hook is left behind, whatever happens.
        """

        def keep(layer: str, _module, _inputs, output) -> None:
            values = output[0] if isinstance(output, tuple) else output
            pooled[layer] = reduce(layer, values)
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


def _mean_over_cells(pool: int, _layer: str, values_BCHW: torch.Tensor) -> torch.Tensor:
    return pool_cells(values_BCHW, pool)


class _DeepestLayerReached(Exception):
    """Ends a U-Net pass from inside the hook of the deepest selected layer."""
