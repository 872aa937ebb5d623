"""A partition as a JSON file: one list of training-image indices for every client.

    {"indices": [[0, 7, ...], [3, ...], ...], "dataset_sha256": "..."}      or only the lists

Indices count the training images as a run has them, without validation and held-out images.
Images in no list are unused.

Letters: N images.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.errors import DataError, MismatchError
from semanticfl_ref.storage import canonical_json, write_atomic

if TYPE_CHECKING:
    from semanticfl_ref.data.partition import Partition


def save_partition(partition: "Partition", dataset: Dataset, file: Path) -> None:
    """Write what `partition.file` reads: every client's images, its own test images included.

    Raises:
        DataError: the file cannot be written.
    """
    pairs = zip(partition.indices, partition.held_out, strict=True)
    document = {
        "indices": [torch.cat(pair).sort().values.tolist() for pair in pairs],
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "partition": partition.manifest(),
    }
    write_atomic(file, canonical_json(document) + "\n", "choose another --save")


def read_assignment(file: Path, images: int, clients: int, data_sha256: str) -> torch.Tensor:
    """The client of every image, int64 [N]; -1 for unused images.

    Raises:
        DataError: the file is missing, is not such JSON, or names an image that does not exist, or
            one twice.
        MismatchError: it belongs to another data set, or has another number of clients.
    """
    name = f"partition.file = {file}"
    document = _read_json(file)
    about = document if isinstance(document, dict) else {"indices": document}
    if "indices" not in about and about.keys() == {str(k) for k in range(len(about))}:
        about = {"indices": [about[str(k)] for k in range(len(about))]}  # client -> indices
    lists = about.get("indices")
    if not isinstance(lists, list) or not all(map(_is_index_list, lists)):
        raise DataError(
            f'{name}: expected {{"indices": [[...], ...]}}, a list of integers for every client'
        )
    recorded = about.get("dataset_sha256", data_sha256)
    if recorded != data_sha256:
        raise MismatchError(
            f"{name} belongs to other training images: it records {recorded}, these are "
            f"{data_sha256}"
        )
    if len(lists) != clients:
        raise MismatchError(
            f"{name} has {len(lists)} clients, partition.clients = {clients}: use --clients "
            f"{len(lists)}"
        )
    client_N = [-1] * images
    for client, own in enumerate(lists):
        for image in own:
            if not 0 <= image < images:
                raise DataError(
                    f"{name}: client {client} holds image {image}; there are {images} training "
                    f"images, counted from 0"
                )
            if client_N[image] >= 0:
                raise DataError(
                    f"{name}: image {image} is listed twice, for clients {client_N[image]} and "
                    f"{client}; the lists must be disjoint"
                )
            client_N[image] = client
    return torch.tensor(client_N, dtype=torch.int64)


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read partition.file = {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"partition.file = {file} is not JSON: {error}") from None


def _is_index_list(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)
