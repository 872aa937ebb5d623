"""The sizes of a diffusion model, from its configuration files alone: what a pass can give is known
before weights are loaded and images pass.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from semanticfl_ref.diffusion.modules import block_of
from semanticfl_ref.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        channels: of the U-Net's blocks on the way down.
        has_mid: whether there is a block between the ways down and up; distilled U-Nets have none.
        latent_channels: of the VAE's latent.
        shrink: pixels per side of a cell of the latent.
        timesteps: of the scheduler.
    """

    channels: tuple[int, ...]
    has_mid: bool
    latent_channels: int
    shrink: int
    timesteps: int

    @classmethod
    def of_folder(cls, folder: Path) -> "ModelSizes":
        """The sizes that a folder's configuration files state.

        Raises:
            ValueError, KeyError, TypeError, OSError: they state none.
        """

        def described(name: str) -> dict:
            return json.loads((folder / name).read_text(encoding="utf-8"))

        return cls.of_configs(
            described("unet/config.json"),
            described("vae/config.json"),
            described("scheduler/scheduler_config.json"),
        )

    @classmethod
    def of_configs(cls, unet, vae, scheduler) -> "ModelSizes":
        """The sizes that the three parts' configurations state."""
        return cls(
            channels=tuple(unet["block_out_channels"]),
            has_mid=unet.get("mid_block_type", "") is not None,
            latent_channels=vae["latent_channels"],
            shrink=2 ** (len(vae["block_out_channels"]) - 1),
            timesteps=scheduler["num_train_timesteps"],
        )

    def widths(self, layers: Sequence[str], pool: int, vae_pool: int) -> dict[str, int]:
        """Layer -> width of its pooled vector.

        Raises:
            UserError: a layer of a block that the model does not have.
        """
        cells = pool**2
        blocks = {"vae": self.latent_channels * vae_pool**2}
        blocks |= {f"down.{i}": width * cells for i, width in enumerate(self.channels)}
        if self.has_mid:
            blocks["mid"] = self.channels[-1] * cells
        blocks |= {f"up.{i}": width * cells for i, width in enumerate(reversed(self.channels))}
        if list(layers) == ["all"]:
            return blocks
        for layer in layers:
            if block_of(layer) not in blocks:
                raise unknown("layer", layer, blocks)
        return {layer: blocks[block_of(layer)] for layer in layers}

    def check(self, options, layers: Sequence[str], height: int, width: int) -> None:
        """Refuse a pass that the model does not admit.

        Args:
            options: has `timestep`, `input_size`, `pool` and `vae_pool`, as `PassOptions` and the
                section `diffusion` have.
            layers: the layers to read.
            height, width: of the images, in pixels.

        Raises:
            UserError: names the setting and the values that work.
        """
        last, shrink = self.timesteps - 1, self.shrink
        if not 0 <= options.timestep <= last:
            raise UserError(
                f"diffusion.timestep = {options.timestep} is outside the scheduler's 0 ... {last}"
            )
        if options.input_size:
            height = width = options.input_size
        if height % shrink or width % shrink:
            raise UserError(
                f"images of {height}x{width} pixels do not fit the VAE: set diffusion.input_size "
                f"to a multiple of {shrink}"
            )
        side = min(height, width)
        # Odd sizes are rounded up.
        smallest = -(-side // (shrink * 2 ** (len(self.channels) - 1)))
        most = {
            "vae_pool": (side // shrink, "latent", "vae" in layers),
            "pool": (smallest, "smallest layer", set(layers) != {"vae"}),
        }
        for name, (cells, what, read) in most.items():
            value = getattr(options, name)
            if read and not 1 <= value <= cells:
                raise UserError(
                    f"diffusion.{name} = {value}: at input size {side} the {what} has {cells} "
                    f"cells per side; choose 1 ... {cells}"
                )
