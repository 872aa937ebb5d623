"""The trained model of a run, with its preprocessing: rebuilt, or exported to a file.

Letters: N images, C classes, P size of a flat vector.
"""

import io
import json
from pathlib import Path

import torch
from torch import nn

from semanticfl_ref.data.batches import network_input
from semanticfl_ref.errors import DataError, MismatchError, UserError
from semanticfl_ref.federated.build_model import build_model
from semanticfl_ref.federated.flat import ORDER, flat_layout, load_params
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.summary import best_round
from semanticfl_ref.storage import Damaged, load_tensors, write_atomic

SUFFIXES = (".safetensors", ".pt2")


class TrainedModel(nn.Module):
    """A run's global model: images in, logits out.

    Attributes:
        network: the client model, without the heads that only training needs.
        class_names: C names, in the order of the logits.
        image_size: pixels per side that it was trained with.
    """

    def __init__(self, network: nn.Module, class_names: list[str], image_size: int):
        super().__init__()
        self.network = network
        self.class_names = tuple(class_names)
        self.image_size = image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [N, H, W, 3] -> logits float32 [N, C].

        Raises:
            ValueError: anything else.
        """
        if images.dtype != torch.uint8 or images.shape[3:] != (3,):
            raise ValueError(
                f"expected images uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}"
            )
        logits_NC, _ = self.network(network_input(images))
        return logits_NC


def load_model(path: Path | str, *, best: bool = False) -> TrainedModel:
    """Rebuild the global model of a run folder, in evaluation mode on the CPU.

    Of an unfinished run, it is the model of the last checkpoint.

    Args:
        path: the run folder.
        best: the model of the best validation round, which a run with `run.patience` keeps.

    Raises:
        DataError: not a run folder, one of an earlier version, or there is no checkpoint yet.
        MismatchError: the checkpoint is damaged, or the model is another one.
    """
    folder = RunFolder(path)
    config, partition = folder.config("the model of"), folder.read("partition.json")
    folder.verify()
    checkpoint = folder.best if best else folder.checkpoint
    if not checkpoint.is_file():
        kept = "only a run with run.patience keeps it" if best else "wait for the first round"
        raise DataError(
            f"{folder.path} has no {checkpoint.name}: {kept}, or, if the run is finished, put the "
            f"file back"
        )
    try:
        tensors, about, _ = load_tensors(checkpoint)
        params_P, order = tensors["params"], about["identity"].get("order")
    except (Damaged, KeyError):
        raise MismatchError(f"the checkpoint {checkpoint} is damaged") from None
    if best and about["round"] != best_round(folder.rounds())["round"]:
        raise MismatchError(f"{checkpoint} is ahead of the run's metrics: continue with --resume")
    if order != ORDER:
        raise MismatchError(f"{checkpoint} was written by an earlier version: train again")
    try:
        names, side = partition["class_names"], partition["image_size"]
    except KeyError as missing:
        raise DataError(
            f"{folder.path}/partition.json has no {missing}: an earlier version wrote it; train "
            f"again"
        ) from None
    network = build_model(config, len(names), side)
    size = flat_layout(network).size
    if len(params_P) < size:
        raise MismatchError(
            f"{checkpoint} holds {len(params_P)} parameters, model.name = "
            f"{config.model.name} has {size}: it was trained with another model"
        )
    load_params(network, params_P[:size])  # heads come last
    return TrainedModel(network, names, side).eval()


def export_model(path: Path | str, out: Path | str, *, best: bool = False) -> Path:
    """Write the trained model of a run to a file.

    Args:
        path: the run folder.
        out: `.safetensors`: named tensors, with class names and preprocessing as metadata; `.pt2`:
            a program of torch.export, uint8 [N, H, W, 3] -> logits [N, C] for any N >= 1, which
            needs torch alone to run.
        best: as in `load_model`.

    Returns:
        The file.

    Raises:
        UserError: another suffix.
        DataError, MismatchError: as `load_model`; or the file cannot be written.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    model = load_model(path, best=best)
    about = {
        "class_names": model.class_names,
        "image_size": model.image_size,
        "preprocessing": "uint8 RGB [N, H, W, 3] -> (x / 127.5 - 1) as float32 [N, 3, H, W]",
        "run": str(path),
    }
    if out.suffix == ".pt2":
        content = _program(model, about)
    else:
        from safetensors.torch import save

        tensors = {name: t.contiguous() for name, t in model.network.state_dict().items()}
        content = save(tensors, {"format": "pt", "semanticfl_ref": json.dumps(about)})
    write_atomic(out, content, "choose another --out")
    return out


def _program(model: TrainedModel, about: dict) -> bytes:
    side = model.image_size
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    batch = torch.export.Dim("N", min=1)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"semanticfl_ref.json": json.dumps(about)})
    return file.getvalue()
