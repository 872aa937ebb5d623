"""Feature maps averaged over the cells of a grid."""

import torch
import torch.nn.functional as F

OPTIONS = {"timestep": 150, "seed": 3}


def test_pooling_is_the_mean_of_cells(backbone, images):
    fine = backbone.features(images, pool=4, **OPTIONS)["mid"].view(12, 112, 4, 4)
    coarse = backbone.features(images, pool=2, **OPTIONS)["mid"]
    torch.testing.assert_close(F.avg_pool2d(fine, 2).flatten(1), coarse, rtol=1e-5, atol=1e-5)


def test_the_latent_has_a_grid_of_its_own(backbone, images):
    """Its cells average to its mean, and the U-Net's layers stay global averages."""
    found = backbone.features(images, vae_pool=8, **OPTIONS)
    plain = backbone.features(images, **OPTIONS)
    assert {layer: values.shape[1] for layer, values in found.items()} == backbone.widths(1, 8)
    assert found["vae"].shape == (12, 4 * 64)
    mean = found["vae"].view(12, 4, 64).mean(2)
    torch.testing.assert_close(mean, plain["vae"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["mid"], plain["mid"])
