"""What stays constant during a run: data, partition, anchors, the model that clients train.

Letters: B batch, C classes, D width of an anchor, P size of a flat vector.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.device import (
    resolve_device,
    resolve_precision,
    use_deterministic_kernels,
)
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.build_model import build_model, feature_width
from semanticfl_ref.federated.flat import FlatLayout, flat_layout
from semanticfl_ref.federated.methods.method import Method
from semanticfl_ref.federated.replicas import Replicas


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The constants of a run; tensors are on `device`.

    Attributes:
        config, dataset, partition, anchors: `anchors` is None for a method without.
        method: the federated method.
        model: the global model.
        replicas: copies of the model, which clients train side by side.
        layout: layout of its flat vector.
        device: where it runs.
        precision: "bf16" or "fp32", of the forward pass.
    """

    config: Config
    dataset: Dataset
    partition: Partition
    anchors: Anchors | None
    method: Method
    model: nn.Module
    replicas: Replicas
    layout: FlatLayout
    device: torch.device
    precision: str

    def autocast(self):
        """The context manager of a forward pass."""
        enabled = self.precision == "bf16"
        # No cache of weights in bf16: threads and captured steps would share it.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
        )

    def anchors_for(
        self, client: int, labels_B: torch.Tensor, index_B: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A batch's visual anchors [B, D], and the text anchors [C, D_text] or, with texts per
        image, [B, C, D_text]; None if the client does not receive them."""
        if self.anchors is None:
            return None, None
        receives, visual_BD, text = self.partition.receives, None, None
        if receives(client, "visual"):
            visual_BD = self.anchors.visual_for(labels_B, index_B)
        if receives(client, "text"):
            text = self.anchors.text_for(index_B)
        return visual_BD, text


def make_context(
    config: Config, dataset: Dataset, partition: Partition, anchors: Anchors | None
) -> RunContext:
    """Move everything to the device and build the model with the heads that the method needs.

    Raises:
        UserError: CUDA is asked for and not available, anchors whose width the model cannot meet,
            or what `build_model` refuses.
    """
    use_deterministic_kernels()
    device = resolve_device(config.run.device)
    method = METHODS[config.federation.method]
    if method.needs_anchors:
        assert anchors is not None, "this method needs anchors"
        visual, text = anchors.visual.to(device), anchors.text.to(device)
        anchors = replace(anchors, visual=visual, text=text)
    else:
        anchors = None
    shape = dataset.classes, dataset.image_size
    heads = method.heads(config, anchors, feature_width(config, *shape))
    model = build_model(config, *shape, **heads)
    model = model.to(device, memory_format=torch.channels_last)
    tensors = {name: tensor.to(device) for name, tensor in dataset.tensors.items()}
    return RunContext(
        config=config,
        dataset=replace(dataset, **tensors),
        partition=partition,
        anchors=anchors,
        method=method,
        model=model,
        replicas=Replicas(model, config, device),
        layout=flat_layout(model),
        device=device,
        precision=resolve_precision(config.run.precision, device),
    )
