"""What survives a round, and its checkpoint: one safetensors file, written by one rename.

Letters: M clients in all, P entries of a row, Q entries of BatchNorm layers.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from semanticfl_ref.errors import MismatchError
from semanticfl_ref.storage import Damaged, load_tensors, save_tensors

MEMORY = "memory."  # before the names of what the method keeps, in the checkpoint


@dataclass(frozen=True, kw_only=True)
class FederatedState:
    """Everything that the next round depends on, but for the configuration.

    Attributes:
        round: rounds finished.
        row: float32 [P], the global model.
        served: bool [M], clients that have received their anchors.
        batch_norm: float32 [M, Q], each client's own BatchNorm entries; [0, Q] under the policy
            "average".
        memory: what the method and the server optimiser keep, by name; on the CPU, rows [M, P] and
            [P] mostly. Empty for FedAvg.
    """

    round: int
    row: torch.Tensor
    served: torch.Tensor
    batch_norm: torch.Tensor
    memory: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(path: Path, state: FederatedState, identity: dict) -> None:
    """Replace the checkpoint at `path`; equal states give equal bytes, and a failure leaves the old
    file whole.

    Args:
        identity: whatever must agree on loading (configuration, data, partition, anchors); plain
            JSON values.

    Raises:
        DataError: the file cannot be written (disk full, permission); the message names it.
    """
    tensors = {"row": state.row, "served": state.served, "batch_norm": state.batch_norm}
    tensors |= {MEMORY + name: rows for name, rows in state.memory.items()}
    save_tensors(
        path,
        tensors,
        {"round": state.round, "identity": identity},
        "the previous checkpoint is untouched; free some space, then --resume",
    )


def load_checkpoint(path: Path, identity: dict) -> FederatedState:
    """Read a checkpoint and check every byte of it.

    Raises:
        MismatchError: damaged, or made by another configuration; what differs is listed.
    """
    try:
        tensors, about, _ = load_tensors(path)
    except Damaged:
        tensors = about = {}
    if not {"row", "served", "batch_norm"} <= set(tensors) or set(about) != {"round", "identity"}:
        raise MismatchError(f"the checkpoint {path} is damaged: delete it to start the run again")
    made_by = about["identity"]
    differing = [k for k in sorted({*made_by, *identity}) if made_by.get(k) != identity.get(k)]
    if differing:
        listed = "; ".join(
            f"{k}: {made_by.get(k)!r} there, {identity.get(k)!r} here" for k in differing[:8]
        )
        raise MismatchError(f"the checkpoint {path} belongs to another run: {listed}")
    memory = {
        name.removeprefix(MEMORY): tensors.pop(name)
        for name in sorted(tensors)
        if name.startswith(MEMORY)
    }
    return FederatedState(round=about["round"], memory=memory, **tensors)
