"""What can be known of a run before its work: `train`, `doctor` and `--dry-run` check it first."""

import math

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.device import require_precision, resolve_device
from semanticfl_ref.diffusion.anchors import layer_widths, require_components
from semanticfl_ref.diffusion.controls import require_every_class
from semanticfl_ref.diffusion.model_files import locate
from semanticfl_ref.diffusion.sizes import ModelSizes
from semanticfl_ref.diffusion.text import captions
from semanticfl_ref.errors import DownloadError


def check_anchors(config: Config, images: Dataset) -> None:
    """Refuse anchors that cannot be made from these images; no image passes the model for it.

    What depends on the model is checked if its folder is on this machine.

    Raises:
        UserError: names the setting, and a value that works.
        DataError: the model's folder is named and not there, or lacks a part.
    """
    anchors, diffusion = config.anchors, config.diffusion
    require_precision(diffusion.precision, resolve_device(config.run.device))
    layers, count = list(diffusion.layer_names), len(images.train_labels)
    captions(diffusion.prompt, images.class_names)
    METHODS[config.federation.method].texts_per_image(config)  # refuses settings that do not fit
    if anchors.per == "class" or anchors.images != "train" or anchors.text == "unet":
        require_every_class(images.train_labels, images.classes)
    # Centred, so many images span no more; a PCA over positions is not bounded by images.
    spanned = {
        layer: math.inf if diffusion.pooling == "norm" and layer != "vae" else count - 1
        for layer in layers
    }
    most = spanned
    try:
        sizes = ModelSizes.of_folder(locate(diffusion.source, offline=True))
    except (DownloadError, ValueError, KeyError, TypeError, OSError):
        sizes = None  # not here yet, or unreadable, which the attempt to load it will say
    if sizes is not None:
        sizes.check(diffusion, layers, images.image_size, images.image_size)
        channels = sizes.widths(layers, diffusion.pool, diffusion.vae_pool)
        most = {layer: min(width, spanned[layer]) for layer, width in channels.items()}
    elif layers == ["all"]:
        return
    widths = layer_widths(anchors, list(most))
    require_components(anchors, widths, {layer: most[layer] for layer in widths}, count)
