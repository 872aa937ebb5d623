"""What a watched round looked at, as PNGs: images, their noised latents, the selected levels' maps,
the anchors.

Letters: B images, C channels, D width of an anchor.
"""

import base64
import io
from itertools import accumulate

import torch
import torch.nn.functional as F
from PIL import Image

from semanticfl_ref.diffusion.backbone import Backbone, settled_precision
from semanticfl_ref.diffusion.modules import unet_layers
from semanticfl_ref.federated.context import RunContext

COLD, ZERO, WARM = (
    (0, 114, 178),
    (240, 240, 236),
    (213, 94, 0),
)  # Okabe and Ito's blue and vermilion: told apart by the colour-blind
TILES, ROWS, MOST_IMAGES = 8, 24, 512


def image(pixels_HW3: torch.Tensor) -> str:
    """An image uint8 [H, W, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3.cpu().contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat(values: torch.Tensor) -> str:
    """A matrix as colours: blue below zero, red above, full where the magnitude reaches its 99th
    percentile.
    """
    values = values.detach().float().cpu()
    strength = (values / values.abs().quantile(0.99).clamp(min=1e-12)).clamp(-1, 1)[:, :, None]
    cold, zero, warm = (torch.tensor(colour, dtype=torch.float32) for colour in (COLD, ZERO, WARM))
    return image(
        (zero + strength.clamp(min=0) * (warm - zero) - strength.clamp(max=0) * (cold - zero))
        .round()
        .to(torch.uint8)
    )


def side_by_side(maps_CHW: torch.Tensor) -> str:
    """The first channels of a map, next to each other with a gap; enlarged, so that the gap is
    narrow.
    """
    tiles = F.interpolate(
        maps_CHW[None, :TILES].float(), scale_factor=max(1, 32 // maps_CHW.shape[1]), mode="nearest"
    )[0]
    return heat(torch.cat(list(F.pad(tiles, (0, 2))), dim=1)[:, :-2])


def of_images(context: RunContext, which_B: torch.Tensor, offline: bool) -> list[dict[str, str]]:
    """Each image's pictures, by caption: itself, and for a method with anchors its noised latent
    and every selected level's first channels.
    """
    data, maps = (
        context.dataset,
        {}
        if context.anchors is None
        else passed(context, context.dataset.train_images[which_B], offline),
    )
    captions = {
        name: f"{name}, {min(TILES, values.shape[1])} of {values.shape[1]} channels, {values.shape[2]} x {values.shape[3]}"
        for name, values in maps.items()
    }
    images = [
        {f"image: {data.class_names[int(data.train_labels[n])]}": image(data.train_images[n])}
        for n in which_B
    ]
    return [
        one | {captions[name]: side_by_side(values[b]) for name, values in maps.items()}
        for b, one in enumerate(images)
    ]


def passed(context: RunContext, images: torch.Tensor, offline: bool) -> dict[str, torch.Tensor]:
    """What a pass of the frozen model makes of images uint8 [B, H, W, 3], under the empty caption:
    name -> [B, C, height, width].
    """
    d, seen = context.config.diffusion, {}
    layers = tuple(layer.strip() for layer in d.layers.split(","))
    backbone = Backbone.load(
        d.source,
        layers=layers,
        device=context.device,
        precision=settled_precision(d.precision, context.device),
        offline=offline,
    )

    def keep(name: str, value) -> None:
        seen[name] = (value[0] if isinstance(value, tuple) else value)[: len(images)]

    backbone.unet.register_forward_pre_hook(lambda _module, inputs: keep("noised latent", inputs))
    for layer in set(backbone.layers) - {"vae"}:
        unet_layers(backbone.unet)[layer].register_forward_hook(
            lambda _module, _inputs, output, layer=layer: keep(f"level {layer}", output)
        )
    backbone.features(
        images,
        timestep=d.timestep,
        seed=context.config.run.seed,
        pool=d.pool,
        input_size=d.input_size or None,
        latent=d.latent,
    )
    return seen


def of_anchors(context: RunContext) -> dict[str, str]:
    """The anchors as heat maps, by caption; none for a method without."""
    if context.anchors is None:
        return {}
    visual, text, labels, widths = (
        context.anchors.visual,
        context.anchors.text,
        context.dataset.train_labels,
        context.anchors.provenance["widths"],
    )
    places = [
        start + n
        for start, width in zip(accumulate(widths, initial=0), widths)
        for n in range(min(width, ROWS // len(widths)))
    ]
    order = (
        labels.argsort(stable=True) if context.anchors.per == "image" else torch.arange(len(visual))
    )
    order = order[:: -(-len(order) // MOST_IMAGES)]
    what = (
        f"{len(order)} images, sorted by class" if context.anchors.per == "image" else "the classes"
    )
    return {
        f"Visual anchors. Columns: {what}. Rows: {len(places)} of {visual.shape[1]} components, the largest of each level, each by its own standard deviation.": heat(
            (visual / visual.std(0))[order][:, places].T
        ),
        f"Text anchors. Rows: the {len(text)} classes. Columns: {text.shape[1]} entries.": heat(
            text
        ),
    }
