"""The model of a feature cache, and what making the cache will take: time on this machine, space.

The time is measured on one pass, after another one that warms up.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields

import torch

from semanticfl_ref.device import default_threads
from semanticfl_ref.diffusion.backbone import Backbone, PassOptions
from semanticfl_ref.diffusion.feature_cache import CachePlan
from semanticfl_ref.diffusion.passes import LARGE_PASS, host_pass_size


def expected(plan: CachePlan, images: int) -> dict[str, float]:
    """Seconds until the features of so many images are made, and bytes of the whole cache.

    The model is loaded for it, which is not counted.
    """
    backbone = load_backbone(plan)
    with extraction_threads(backbone):
        seconds = seconds_of(plan, backbone, images)
    return {"seconds": seconds, "bytes": bytes_of(plan, backbone, len(plan.images))}


def load_backbone(plan: CachePlan) -> Backbone:
    """The model that makes a cache, with the passes that the cache is named by."""
    meta = plan.meta
    backbone = Backbone(
        plan.model, layers=meta["layers"], device=plan.device, precision=meta["precision"]
    )
    backbone.batch = meta.get("pass", backbone.batch)
    assert meta["shard"] % backbone.batch == 0, "a shard must end where a pass ends"
    if meta.get("compile"):
        backbone.vae.encoder.compile()
    return backbone


def pass_options(plan: CachePlan) -> dict:
    """The fields of `PassOptions`, as the cache is named by them."""
    return {field.name: plan.meta[field.name] for field in fields(PassOptions)}


def extraction_threads(backbone: Backbone) -> AbstractContextManager:
    """Torch's own choice of CPU threads; a small model gains nothing by several."""
    is_large = host_pass_size(backbone.unet.config) == LARGE_PASS
    return default_threads() if is_large else nullcontext()


def captions_per_image(plan: CachePlan) -> int:
    """U-Net passes that each image has."""
    return len(plan.meta["class_names"]) if plan.meta["condition"] == "every-class" else 1


def bytes_of(plan: CachePlan, backbone: Backbone, images: int) -> int:
    """Bytes of the features of so many images, in fp16."""
    widths = backbone.widths(plan.meta["pool"], plan.meta["vae_pool"])
    return images * captions_per_image(plan) * 2 * sum(widths.values())


def seconds_of(plan: CachePlan, backbone: Backbone, images: int) -> float:
    """Seconds that the features of so many images will take."""
    captions, passes = captions_per_image(plan), math.ceil(images / backbone.batch)
    seconds = _seconds_per_pass(plan, backbone, 1)
    if captions > 1:  # the VAE is passed once, whatever their number
        seconds += (captions - 1) * (_seconds_per_pass(plan, backbone, 2) - seconds)
    return passes * seconds


def _seconds_per_pass(plan: CachePlan, backbone: Backbone, captions: int) -> float:
    config = backbone.unet.config
    # A time depends on no caption, and the text encoder needs not be loaded.
    prompts = torch.zeros(captions, 77, config.cross_attention_dim)
    for _ in range(2):
        began = time.perf_counter()
        backbone.start(
            plan.images[: backbone.batch],
            prompt_embedding=prompts,
            every_caption=captions > 1,
            **pass_options(plan),
        )()
        seconds = time.perf_counter() - began
    return seconds
