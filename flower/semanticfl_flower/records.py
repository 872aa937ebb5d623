"""What both sides read and write: settings from the run's configuration, tensors as records."""

import shlex

import torch
from flwr.app import Array, ArrayRecord, UserConfig

from semanticfl_ref import cli
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.settings import Config


def config_of(run_config: UserConfig) -> Config:
    """The configuration that `flags` make, as `train` would.

    Raises:
        UserError: a mistake in them.
    """
    flags = shlex.split(str(run_config["flags"]))
    return settings_of(cli.parse(cli.run_imports(["train", *flags])))


def arrays_of(tensors: dict[str, torch.Tensor]) -> ArrayRecord:
    """Tensors, on any device, as a record."""
    return ArrayRecord({name: Array(value.cpu().numpy()) for name, value in tensors.items()})


def tensors_of(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """A record's tensors, on the CPU."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
