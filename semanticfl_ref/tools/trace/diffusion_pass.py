"""One pass of the frozen diffusion model over a few images, stage by stage:

    image -> VAE latent -> noised latent -> U-Net layers -> pooled layers -> anchor

Letters: B images, D width of an anchor.
"""

import torch

from semanticfl_ref.device import resolve_precision
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.modules import unet_layers
from semanticfl_ref.diffusion.text import TextEncoder, captions
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.tools.trace.tracer import Step, Tracer


def diffusion_pass(
    context: RunContext, index_B: torch.Tensor, offline: bool
) -> tuple[dict[str, torch.Tensor], list[Step]]:
    """Pass training images through the model as the extraction of features does, and watch it.

    Args:
        context: of a run with anchors.
        index_B: int64 [B], which images.
        offline: no network access.

    Returns:
        The stages in the order in which they are computed: name -> images uint8 [B, H, W, 3], maps
        [B, channels, height, width], or vectors [B, width]; and the statements.
    """
    settings, dataset = context.config.diffusion, context.dataset
    images, labels_B = dataset.train_images[index_B], dataset.train_labels[index_B]
    backbone = Backbone(
        settings.source,
        layers=settings.layer_names,
        device=context.device,
        precision=resolve_precision(settings.precision, context.device, half_on_cuda="fp16"),
        offline=offline,
    )
    prompts = None
    if settings.condition == "own-class":
        texts = captions(settings.prompt, dataset.class_names)
        hidden, _ = TextEncoder(backbone.folder, context.device).encode(texts)
        prompts = hidden[labels_B.to(hidden.device)]
    stages = {"image": images}

    def record(stage: str, values) -> None:
        values = values[0] if isinstance(values, tuple) else values
        stages[stage] = values[: len(images)]

    def add_noise(latent, *arguments):
        record("VAE latent", latent)
        noised = scheduler_add_noise(latent, *arguments)
        record(f"noised latent, t = {settings.timestep}", noised)
        return noised

    scheduler_add_noise = backbone.scheduler.add_noise
    backbone.scheduler.add_noise = add_noise
    for layer, module in unet_layers(backbone.unet).items():
        if layer in backbone.layers:
            module.register_forward_hook(
                lambda module, inputs, output, stage=f"U-Net {layer}": record(stage, output)
            )
    with Tracer(["diffusion/backbone.py"]) as tracer:
        pooled = backbone.features(
            images,
            prompt_embedding=prompts,
            timestep=settings.timestep,
            seed=context.config.run.seed,
            pool=settings.pool,
            input_size=settings.input_size,
            latent=settings.latent,
        )
    stages |= {f"pooled {layer}": values for layer, values in pooled.items()}
    stages["anchor"] = context.anchors.visual_for(labels_B, index_B)
    return stages, tracer.steps
