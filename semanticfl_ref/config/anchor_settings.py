"""The sections `diffusion` and `anchors`: from images to what guides the clients.

The tags of sources are explained in settings.py.
"""

import re
from dataclasses import dataclass

from semanticfl_ref.config.schema import Section, option
from semanticfl_ref.errors import UserError

CONTROLS = ("sd", "shuffled", "permuted", "random", "onehot")
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(Section):
    source: str = option(
        STABLE_DIFFUSION,
        "frozen Stable Diffusion: hub id or folder; tiny: the embedded model",
        source="S",
    )
    layers: str = option(
        "vae,up.1,up.2,up.3",
        "layers to read, separated by commas: vae, down.0, mid, up.3, up.1.resnets.0, "
        "up.1.attentions.2, ...; all: vae and every block",
        source="A: VAE and U-Net; N: the up-blocks",
    )
    timestep: int = option(150, "noise level of the U-Net pass", low=0, high=999, source="S")
    pool: int = option(
        1,
        "cells per side of the grid over which U-Net layers are averaged; 1: global average",
        low=1,
        high=4,
        source="S",
    )
    pooling: str = option(
        "mean",
        "vector of a U-Net layer: mean over positions, or norm (PCA of every position's channels, "
        "then each component's norm over positions)",
        choices=("mean", "norm"),
        source="S: mean; N: norm",
    )
    vae_pool: int = option(
        14,
        "cells per side of the grid over which the VAE's latent is averaged",
        low=1,
        high=64,
        source="O",
    )
    prompt: str = option(
        "a photo of a {}", "caption of a class; {} is replaced by its name", source="S"
    )
    condition: str = option(
        "null",
        "caption of an image's U-Net pass: null (empty) or own-class, which leaks the label into "
        "the anchor",
        choices=("null", "own-class"),
        source="O",
    )
    input_size: int = option(
        224,
        "side to which images are resized before the VAE; 0: not resized",
        low=0,
        high=1024,
        source="N",
        unit="pixels",
    )
    latent: str = option(
        "mean",
        "latent of an image: mean of the VAE's distribution, or a sample seeded by its content",
        choices=("mean", "sample"),
        source="O",
    )
    precision: str = option(
        "auto",
        "U-Net precision; auto: fp16 on CUDA, bf16 on a CPU with native support, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(
        False,
        "torch.compile of the VAE's encoder: slower to start, other last bits",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.pooling == "norm" and self.pool > 1:
            raise UserError(
                f"diffusion.pooling = norm is over all positions: leave out diffusion.pool = "
                f"{self.pool}, or use diffusion.pooling=mean"
            )

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers as a tuple, in the order in which they are written."""
        return tuple(name.strip() for name in self.layers.split(","))


@dataclass(frozen=True, kw_only=True)
class AnchorsSettings(Section):
    control: str = option(
        "sd", "source of the anchors: sd (diffusion model), or a control", choices=CONTROLS
    )
    images: str = option(
        "train",
        "images that make the visual anchors: train, heldout:N (N per class, given to no client), "
        "or a folder of class folders",
        source="O",
    )
    per: str = option(
        "image", "one visual anchor per image or per class", choices=("image", "class"), source="N"
    )
    width: int = option(512, "width of a visual anchor", low=2, high=4096, source="S")
    aggregation: str = option(
        "64-224-112-112",
        "width per layer, in the order of diffusion.layers; equal: the same for each; "
        "separability: equal, with layers weighted by their Fisher ratio",
        source="O for the VAE; N: 2-1-1 for the others",
    )
    levels: str = option(
        "all",
        "layers that make the anchors: all, the VAE's latent alone, or the U-Net's alone, which "
        "share the whole width",
        choices=("all", "vae", "unet"),
        source="O",
    )
    whiten: bool = option(True, "PCA components scaled to unit variance", source="O")
    text: str = option(
        "clip",
        "text anchors: clip (text encoder), unet (mean U-Net features of a class's images under "
        "its caption)",
        choices=("clip", "unet"),
        source="S",
    )
    text_images: int = option(
        16, "images per class that make its text anchor with anchors.text = unet", low=1, source="O"
    )

    def __post_init__(self):
        super().__post_init__()
        kind, _, number = self.images.partition(":")
        if kind == "heldout" and not re.fullmatch("0*[1-9][0-9]*", number):
            raise UserError(
                f"anchors.images = {self.images!r}: expected heldout:N with N images per class, "
                f"for example heldout:20"
            )

    @property
    def held_out(self) -> int:
        """Images per class that are held out for the anchors and given to no client."""
        return int(self.images[8:]) if self.images.startswith("heldout:") else 0
