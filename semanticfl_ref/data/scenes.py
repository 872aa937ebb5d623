"""Scenes: 8x8 ink masks -> 32x32 colour images of a jittered glyph on a smooth, noisy background.

Plain digits are too easy to show what guidance does: a linear probe on raw pixels classifies 96 %
of them. A scene rotates, scales, shifts and colours the same glyph, so that no single pixel gives
its class away, while a model that has seen many glyphs in many scenes still recognises it. The
embedded data set and the images that the embedded diffusion model was trained on are made by the
same function, from different glyphs.

Letters: N images.
"""

import torch
import torch.nn.functional as F

SIDE = 32  # pixels per side of a scene
INK_SIDE = 24  # pixels per side of a glyph without jitter
ROTATION = 0.45  # radians, either way
ZOOM = (0.75, 1.35)  # the glyph's size is divided by this
SHIFT = 0.25  # of half the image's side, either way
MIN_CONTRAST = 0.45  # distance of the two colours in the unit RGB cube
BACKGROUND_GRADIENT = 0.06  # standard deviation of a smooth 3x3 field; full scale is 1
PIXEL_NOISE = 0.02  # standard deviation; full scale is 1


def plain(masks: torch.Tensor) -> torch.Tensor:
    """Enlarge ink masks to grey images: white ink on black, centred, without jitter.

    Args:
        masks: uint8 [N, 8, 8], 0 ... 16: the number of inked pixels in each 4x4 block.

    Returns:
        float32 [N, 3, 32, 32] in 0 ... 1.
    """
    ink = F.interpolate(
        masks.float()[:, None] / 16, size=(INK_SIDE, INK_SIDE), mode="bicubic", align_corners=False
    )
    margin = (SIDE - INK_SIDE) // 2
    return F.pad(ink.clamp(0, 1), (margin,) * 4).repeat(1, 3, 1, 1)


def scenes(
    masks: torch.Tensor, generator: torch.Generator, light_on_dark: bool = False
) -> torch.Tensor:
    """Place each glyph in its own scene: rotation, scale, shift, two colours, gradient, noise.

    Args:
        masks: uint8 [N, 8, 8], 0 ... 16.
        generator: CPU generator. On x86 CPUs with AVX2 the result depends on the arguments alone;
            on others torch.randn rounds otherwise, and 66 of the 7 million values of `digit-scenes`
            differ by 1 (measured with ATEN_CPU_CAPABILITY=default).
        light_on_dark: keep the ground in the dark half of every channel and the figure in the light
            half. With any two colours, a network trained from scratch on a few hundred labels stays
            at chance level, and nothing could be compared.

    Returns:
        float32 [N, 3, 32, 32] in 0 ... 1.
    """
    n = len(masks)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    angle, zoom = uniform(-ROTATION, ROTATION, n), uniform(*ZOOM, n)
    shift = uniform(-SHIFT, SHIFT, n, 2)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # Each product and sum is rounded. affine_grid multiplies matrices: its last bit, and with it
    # the data set's hash, depends on the CPU's vendor.
    cos, sin, right, down = (each.view(n, 1, 1) for each in (cos, sin, *shift.unbind(1)))
    x = torch.linspace(-1, 1, SIDE) * (SIDE - 1) / SIDE  # the pixels' centres
    y = x[:, None]
    grid = torch.stack([cos * x - sin * y + right, sin * x + cos * y + down], 3)
    ink = F.grid_sample(plain(masks)[:, :1], grid, align_corners=False)

    ground, figure = uniform(0, 1, n, 3, 1, 1), uniform(0, 1, n, 3, 1, 1)
    too_close = (ground - figure).norm(dim=1, keepdim=True) < MIN_CONTRAST
    opposite = (ground + 0.5) % 1  # half a turn in every channel: distance 0.87
    figure = torch.where(too_close, opposite, figure)
    if light_on_dark:
        ground, figure = 0.4 * ground, 0.6 + 0.4 * figure
    field = torch.randn(n, 3, 3, 3, generator=generator) * BACKGROUND_GRADIENT
    ground = ground + F.interpolate(field, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    noise = torch.randn(n, 3, SIDE, SIDE, generator=generator) * PIXEL_NOISE
    return (ground * (1 - ink) + figure * ink + noise).clamp(0, 1)
