"""One pass of the frozen diffusion model over a few images, stage by stage:

    image -> VAE latent -> noised latent -> U-Net layers -> pooled layers

Letters: B images.
"""

from dataclasses import fields
from functools import partial

import torch

from semanticfl_ref.diffusion.backbone import Backbone, PassOptions
from semanticfl_ref.diffusion.feature_cache import CachePlan
from semanticfl_ref.diffusion.modules import unet_layers
from semanticfl_ref.diffusion.text import TextEncoder, captions
from semanticfl_ref.tools.trace.tracer import Step, Tracer


def diffusion_pass(
    plan: CachePlan, index_B: torch.Tensor
) -> tuple[dict[str, torch.Tensor], list[Step]]:
    """Pass images through the model as the extraction of features does, and watch it.

    Args:
        plan: the cache of the images' features.
        index_B: int64 [B], which images.

    Returns:
        The stages in the order in which they are computed: name -> images uint8 [B, H, W, 3], maps
        [B, channels, height, width], or vectors [B, width]; and the statements.
    """
    images, meta = plan.images[index_B], plan.meta
    backbone = Backbone(
        plan.model, layers=meta["layers"], device=plan.device, precision=meta["precision"]
    )
    prompts = None
    if meta["condition"] == "own-class":
        texts = captions(meta["prompt"], meta["class_names"])
        hidden, _ = TextEncoder(plan.model, plan.device).encode(texts)
        prompts = hidden[plan.labels[index_B].to(hidden.device)]
    stages = {"image": images}

    def add_noise(latent, *arguments):
        stages["VAE latent"] = latent
        noised = scheduler_add_noise(latent, *arguments)
        stages[f"noised latent, t = {meta['timestep']}"] = noised
        return noised

    def keep(layer, _module, _inputs, output):
        stages[f"U-Net {layer}"] = output[0] if isinstance(output, tuple) else output

    scheduler_add_noise = backbone.scheduler.add_noise
    backbone.scheduler.add_noise = add_noise
    for layer, module in unet_layers(backbone.unet).items():
        if layer in backbone.layers:
            module.register_forward_hook(partial(keep, layer))
    options = {field.name: meta[field.name] for field in fields(PassOptions)}
    with Tracer(["diffusion/backbone.py"]) as tracer:
        pooled = backbone.features(images, prompt_embedding=prompts, **options)
    stages |= {f"pooled {layer}": values for layer, values in pooled.items()}
    # A pass is filled up with the last image.
    return {stage: values[: len(images)] for stage, values in stages.items()}, tracer.steps
