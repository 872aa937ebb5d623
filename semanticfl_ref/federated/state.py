"""What survives a round, and its checkpoint: one safetensors file, replaced atomically.

Letters: M clients in all, P size of a flat vector, Q entries of BatchNorm layers.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from semanticfl_ref.config.settings import setting_fields
from semanticfl_ref.errors import MismatchError
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.flat import flatten_params
from semanticfl_ref.federated.server_optimizer import init_optimizer
from semanticfl_ref.storage import Damaged, load_tensors, save_tensors

GENERAL = ("params", "anchors_sent", "batch_norm")  # tensors of every state, by name
METHOD_STATE = "method_state."  # prefix of the method state's names in a checkpoint
REMEDY = "the previous checkpoint is intact; free some disk space, then continue with --resume"


@dataclass(frozen=True, kw_only=True)
class FederatedState:
    """Everything that the next round depends on, besides the constants.

    Attributes:
        round: rounds completed.
        params: float32 [P], the global model.
        anchors_sent: bool [M], the clients that have received their anchors.
        batch_norm: float32 [M, Q], each client's own BatchNorm entries; [0, Q] with
            model.batch_norm = average.
        method_state: tensors of the method and of the server optimizer by name; on the CPU, mostly
            [M, P] and [P]. Empty for FedAvg.
        seal: digest of the lines of metrics so far, see `RunFolder.append`.
    """

    round: int
    params: torch.Tensor
    anchors_sent: torch.Tensor
    batch_norm: torch.Tensor
    method_state: dict[str, torch.Tensor]
    seal: str = ""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Name in the checkpoint -> tensor."""
        general = {name: getattr(self, name) for name in GENERAL}
        return general | {METHOD_STATE + name: value for name, value in self.method_state.items()}

    def successor(self) -> "FederatedState":
        """A copy for the next round to write into; the global model is the same until then."""
        return replace(
            self,
            round=self.round + 1,
            anchors_sent=self.anchors_sent.clone(),
            batch_norm=self.batch_norm.clone(),
            method_state={name: value.clone() for name, value in self.method_state.items()},
        )

    def to(self, device: torch.device) -> "FederatedState":
        """The same state with the global model on a device."""
        return replace(self, params=self.params.to(device), batch_norm=self.batch_norm.to(device))


def initial_state(context: RunContext) -> FederatedState:
    """The state before the first round: initial parameters, no anchors sent."""
    config, params_P = context.config, flatten_params(context.model)
    clients = config.partition.clients
    with_own_batch_norm = clients if config.model.batch_norm == "local" else 0
    method_state = context.method.init_state(config, params_P)
    return FederatedState(
        round=0,
        params=params_P,
        anchors_sent=torch.zeros(clients, dtype=torch.bool),
        batch_norm=params_P[context.layout.batch_norm].repeat(with_own_batch_norm, 1),
        method_state=method_state | init_optimizer(config, params_P),
    )


def save_checkpoint(path: Path, state: FederatedState, identity: dict) -> None:
    """Replace the checkpoint; equal states give equal bytes, and a failure leaves the old file.

    Args:
        path: the checkpoint.
        state: what to save.
        identity: what must agree on loading (settings, data, partition, anchors); JSON values.

    Raises:
        DataError: the file cannot be written.
    """
    about = {"round": state.round, "identity": identity, "seal": state.seal}
    save_tensors(path, state.tensors, about, REMEDY)


def require_identity(where: Path | str, theirs: dict, ours: dict, remedy: str = "") -> None:
    """Check that a file, or another process, belongs to this run.

    Args:
        where: what is checked.
        theirs, ours: what has to be equal.
        remedy: ends the error message.

    A setting that the file does not know, since an earlier version wrote it, had its default.

    Raises:
        MismatchError: it does not; the differences are listed.
    """
    defaults = {name: field.default for name, field in setting_fields().items()}
    theirs = {name: defaults[name] for name in ours if name in defaults} | theirs
    differing = [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        ending = f". To correct it: {remedy}" if remedy else ""
        raise MismatchError(f"{where} belongs to another run: {'; '.join(differing[:8])}{ending}")


def require_shapes(path: Path, state: FederatedState, initial: FederatedState) -> None:
    """Check that a run which started from `initial` can have written the checkpoint.

    Raises:
        MismatchError: it cannot, whatever digest it has.
    """
    same = all(getattr(state, n).shape == getattr(initial, n).shape for n in GENERAL)
    names = initial.method_state.keys() <= state.method_state.keys()
    if not same or not names or type(state.round) is not int or state.round < 0:
        raise _damaged(path)


def load_checkpoint(path: Path, identity: dict) -> FederatedState:
    """Read a checkpoint and check every byte.

    Raises:
        MismatchError: damaged, or made by another configuration; the differences are listed.
    """
    try:
        tensors, about, _ = load_tensors(path)
        general = {name: tensors.pop(name) for name in GENERAL}
        round, theirs, seal = about["round"], about["identity"], about["seal"]
    except (Damaged, KeyError):
        raise _damaged(path) from None
    require_identity(path, theirs, identity)
    method_state = {name.removeprefix(METHOD_STATE): tensors[name] for name in sorted(tensors)}
    return FederatedState(round=round, method_state=method_state, seal=seal, **general)


def _damaged(path: Path) -> MismatchError:
    return MismatchError(f"the checkpoint {path} is damaged: delete it to restart the run")
