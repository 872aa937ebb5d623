"""What survives a round, and its checkpoint: one safetensors file, written by one rename.

Letters: M clients in all, P entries of a row, Q entries of BatchNorm layers.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from semanticfl_ref.errors import DataError, MismatchError


@dataclass(frozen=True, kw_only=True)
class FederatedState:
    """Everything that the next round depends on, but for the configuration.

    Attributes:
        round: rounds finished.
        row: float32 [P], the global model.
        served: bool [M], clients that have received their anchors.
        batch_norm: float32 [M, Q], each client's own BatchNorm entries; [0, Q] under the policy "average".
    """

    round: int
    row: torch.Tensor
    served: torch.Tensor
    batch_norm: torch.Tensor


def save_checkpoint(path: Path, state: FederatedState, identity: dict) -> None:
    """Replace the checkpoint at `path`; equal states give equal bytes, and a failure leaves the old file whole.

    Args:
        identity: whatever must agree on loading (configuration, data, partition, anchors); plain JSON values.

    Raises:
        DataError: the file cannot be written (disk full, permission); the message names it.
    """
    tensors = {"row": state.row.cpu(), "served": state.served.cpu(), "batch_norm": state.batch_norm.cpu()}
    about = {"round": state.round, "identity": identity}
    about["sha256"] = _digest(tensors, about)
    content = save_tensors(tensors, metadata={"semanticfl_ref": json.dumps(about, sort_keys=True)})
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write the checkpoint {path}: {error.strerror}; the previous one is untouched. Free some space, then --resume") from None


def load_checkpoint(path: Path, identity: dict) -> FederatedState:
    """Read a checkpoint and check every byte of it.

    Raises:
        MismatchError: damaged, or made by another configuration; what differs is listed.
    """
    content = path.read_bytes()
    try:
        tensors = load_tensors(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["semanticfl_ref"])
        claimed = about.pop("sha256")
        intact = set(tensors) == {"row", "served", "batch_norm"} and claimed == _digest(tensors, about)
    except (SafetensorError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise MismatchError(f"the checkpoint {path} is damaged: delete it to start the run again")
    made_by = about["identity"]
    differing = [k for k in sorted({*made_by, *identity}) if made_by.get(k) != identity.get(k)]
    if differing:
        listed = "; ".join(f"{k}: {made_by.get(k)!r} there, {identity.get(k)!r} here" for k in differing[:8])
        raise MismatchError(f"the checkpoint {path} belongs to another run: {listed}")
    return FederatedState(round=about["round"], **tensors)


def _digest(tensors: dict[str, torch.Tensor], about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
