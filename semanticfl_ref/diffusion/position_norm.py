"""FedDifRC's pooling: PCA of the channels at every position, then the norm over positions.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Callable
from functools import partial

import torch

from semanticfl_ref.diffusion.anchors import pca
from semanticfl_ref.diffusion.backbone import Backbone

FITTED = 128  # images, evenly spaced in the data set: 25 000 positions of up.1, for 1 280 channels


def fit_basis(
    backbone: Backbone, images: torch.Tensor, prompt_embedding: torch.Tensor, **options
) -> dict[str, torch.Tensor]:
    """The PCA of every U-Net layer over the positions of some images.

    Args:
        backbone: the model.
        images, prompt_embedding, options: as in `Backbone.features`.

    Returns:
        "LAYER.mean" -> float32 [C], "LAYER.directions" -> float32 [C, C], by descending variance.
    """
    maps = backbone.features(
        images, prompt_embedding=prompt_embedding, reduce=_all_positions, **options
    )
    basis = {}
    for layer, values in maps.items():
        if layer != "vae":
            mean, directions, _ = pca(partial(iter, values), values.shape[-1])
            basis[f"{layer}.mean"] = mean.float()
            basis[f"{layer}.directions"] = directions.float().contiguous()
    return basis


def position_norm(
    basis: dict[str, torch.Tensor], device: torch.device
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A function: layer, its output [B, C, H, W] -> float32 [B, C], with that basis.

    Equation (position-norm) [FedDifRC's code]:
        f_k = sqrt( sum over positions p of ( u_k . (x_p - mean) )^2 ),  u_k: PCA of positions
    Test: tests/diffusion/test_position_norm.py::test_norms_of_principal_components_on_numbers
    """
    basis = {name: values.to(device) for name, values in basis.items()}

    def reduce(layer: str, values_BCHW: torch.Tensor) -> torch.Tensor:
        centred = values_BCHW.float().flatten(2) - basis[f"{layer}.mean"][:, None]
        return (basis[f"{layer}.directions"].T @ centred).norm(dim=2)

    return reduce


def _all_positions(_layer: str, values_BCHW: torch.Tensor) -> torch.Tensor:
    return values_BCHW.float().flatten(2).transpose(1, 2)
