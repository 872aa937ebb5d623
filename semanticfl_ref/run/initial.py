"""The model that a run starts from, in place of a random one: `run.init`."""

from pathlib import Path

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.errors import DataError, MismatchError
from semanticfl_ref.federated.build_model import build_model
from semanticfl_ref.run.trained import load_model
from semanticfl_ref.storage import user_path

LISTED = 5  # tensors that a message names


def read_initial(config: Config, dataset: Dataset) -> dict[str, torch.Tensor]:
    """The parameters and buffers of `run.init` by name, checked against the model; empty without.

    Heads that only training needs are not among them: they start at random.

    Raises:
        DataError: there is no such run or file, or it holds no state dict.
        MismatchError: a tensor is missing, unknown or of another shape.
    """
    if not config.run.init:
        return {}
    source = user_path(config.run.init)
    found = load_model(source).network.state_dict() if source.is_dir() else _read_file(source)
    model = build_model(config, dataset.classes, dataset.image_size)
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: list(tensor.shape) for name, tensor in found.items()}
    counters = {name for name, t in model.state_dict().items() if not t.is_floating_point()}
    differing = [
        f"{name}: {there.get(name, 'missing')} there, {own.get(name, 'unknown')} here"
        for name in dict.fromkeys([*own, *there])
        if there.get(name) != own.get(name) and name not in counters
    ]
    if differing:
        raise MismatchError(
            f"run.init = {source} does not fit the model {config.model.name} of width "
            f"{config.model.width}: {'; '.join(differing[:LISTED])}; {len(differing)} of "
            f"{len(own)} tensors differ: choose the model, width and data set that it was made with"
        )
    return {name: tensor for name, tensor in found.items() if name not in counters}


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"run.init = {file}: there is no such run folder or file") from None
    except Exception as error:  # damaged bytes may make the parsers raise anything
        reason = str(error).partition("\n")[0]
        raise DataError(f"run.init = {file}: not a file of tensors: {reason}") from None
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise DataError(
            f"run.init = {file}: expected a state dict, name -> tensor, as `export` or "
            f"torch.save(model.state_dict(), ...) writes it"
        )
    return found
