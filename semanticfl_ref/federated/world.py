"""What stays the same in every round: data, partition, anchors, the one model that all clients take
turns in.

Letters: M clients in all, P entries of a row, Q entries of BatchNorm layers.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from semanticfl_ref.config import Config
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.data.sources import Dataset
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.aggregation import server_memory
from semanticfl_ref.federated.flat import RowLayout, layout_of, to_row
from semanticfl_ref.federated.methods import METHODS
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.federated.state import FederatedState


@dataclass(frozen=True, kw_only=True)
class World:
    """The constants of a run; tensors are on `device`. `precision` is "bf16" or "fp32", as settled
    for this machine.
    """

    config: Config
    dataset: Dataset
    partition: Partition
    anchors: Anchors | None
    model: ResNet10
    layout: RowLayout
    device: torch.device
    precision: str

    def autocast(self):
        """The context of a client's forward pass."""
        return (
            torch.autocast(self.device.type, torch.bfloat16)
            if self.precision == "bf16"
            else nullcontext()
        )


def make_world(
    config: Config, dataset: Dataset, partition: Partition, anchors: Anchors | None
) -> World:
    """Put everything on the device and build the model, with the heads that the method asks for.

    Raises:
        UserError: CUDA was asked for and there is none; anchors whose width the model cannot meet.
    """
    device = device_for(config.run.device)
    method = METHODS[config.federation.method]
    assert anchors is not None or not method.needs_anchors, "this method needs anchors"
    if not method.needs_anchors:
        anchors = None
    heads = method.heads(config, anchors, 8 * config.model.width)
    if anchors is not None:
        anchors = replace(anchors, visual=anchors.visual.to(device), text=anchors.text.to(device))
    moved = {
        name: getattr(dataset, name).to(device)
        for name in vars(dataset)
        if isinstance(getattr(dataset, name), torch.Tensor)
    }
    model = ResNet10(config.model.width, len(dataset.class_names), **heads, seed=config.run.seed)
    model = model.to(device, memory_format=torch.channels_last)
    return World(
        config=config,
        dataset=replace(dataset, **moved),
        partition=partition,
        anchors=anchors,
        model=model,
        layout=layout_of(model),
        device=device,
        precision=precision_for(config.run.precision, device),
    )


def new_state(world: World) -> FederatedState:
    """The state before the first round: the initial weights, nobody served, and whatever the method
    keeps at its start.
    """
    row_P, clients = to_row(world.model), world.config.partition.clients
    own = clients if world.config.model.batch_norm == "local" else 0
    batch_norm = row_P[world.layout.batch_norm].repeat(own, 1)
    memory = {
        **METHODS[world.config.federation.method].keeps(world.config, row_P),
        **server_memory(world.config, row_P),
    }
    return FederatedState(
        round=0,
        row=row_P,
        served=torch.zeros(clients, dtype=torch.bool),
        batch_norm=batch_norm,
        memory=memory,
    )


def device_for(name: str) -> torch.device:
    """The device of a run; raises UserError when CUDA was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device = cuda: torch finds no CUDA device here; use run.device=auto or cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def precision_for(name: str, device: torch.device) -> str:
    """ "bf16" or "fp32": auto takes bf16 on CUDA and on processors whose matrix units have it,
    since emulated it is slower.
    """
    if name != "auto":
        return name
    native = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return "bf16" if native else "fp32"
