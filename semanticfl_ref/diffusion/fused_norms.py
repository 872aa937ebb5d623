"""GroupNorm and SiLU of a diffusion model as one kernel, by replacing modules of diffusers.

On a GPU torch's GroupNorm leaves the channels-last layout, so that the convolution behind it copies
its input back; SiLU and the convolution's bias are further passes over the feature maps. On a CPU
it keeps the layout: there modules stay as they are, and so do features, bit for bit.
"""

from functools import partial

import torch
from torch import nn

from semanticfl_ref.kernels.group_norm_silu import group_norm_silu


def fuse_norms(model: nn.Module, impl: str = "auto") -> None:
    """Replace the modules of a frozen model; it computes what it computed, except for rounding.

    Every GroupNorm becomes a `FusedGroupNorm`. That of a residual block, or before the last
    convolution, applies the SiLU behind it too. The bias of a block's first convolution moves into
    the norm behind it or, where the timestep's embedding is added in between, to that of its
    projection.

    Args:
        model: a U-Net or a VAE's encoder; changed in place.
        impl: implementation of the kernel, see `group_norm_silu`.
    """
    fused = partial(FusedGroupNorm, impl=impl)
    for module in model.modules():
        # A block with "scale_shift" changes the maps between its second norm and SiLU.
        is_default = getattr(module, "time_embedding_norm", None) == "default"
        if is_default and type(module.nonlinearity) is nn.SiLU:
            module.norm1 = fused(module.norm1, silu=True)
            module.norm2 = fused(module.norm2, silu=True, shift=_first_bias(module))
            module.nonlinearity = SiLUOfVectors()
        elif type(getattr(module, "conv_act", None)) is nn.SiLU:
            module.conv_norm_out = fused(module.conv_norm_out, silu=True)
            module.conv_act = nn.Identity()
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm:
                setattr(module, name, fused(child))


class FusedGroupNorm(nn.GroupNorm):
    """A GroupNorm with the parameters of another one, whose forward is `group_norm_silu`.

    Args:
        norm: the one that it replaces.
        silu: apply SiLU.
        shift: added to the input first.
        impl: implementation of the kernel.
    """

    def __init__(
        self,
        norm: nn.GroupNorm,
        *,
        silu: bool = False,
        shift: nn.Parameter | None = None,
        impl: str = "auto",
    ):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias, self.shift = norm.weight, norm.bias, shift
        self.silu, self.impl = silu, impl

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            shift_C=self.shift,
            silu=self.silu,
            impl=self.impl,
        )


class SiLUOfVectors(nn.SiLU):
    """The `nonlinearity` of a residual block whose norms apply SiLU: the block also calls it on the
    timestep's embedding [B, D], and on feature maps [B, C, H, W], which have been through SiLU.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if input.ndim == 2 else input


def _first_bias(block: nn.Module) -> nn.Parameter | None:
    """Takes the bias from a block's first convolution, and returns what its second norm is to add:
    nothing where the bias goes with the timestep's embedding.
    """
    bias, block.conv1.bias = block.conv1.bias, None
    projection = block.time_emb_proj
    if projection is None:
        return bias
    projection.bias = nn.Parameter(projection.bias + bias, requires_grad=False)
    return None
