"""A partition as a file: JSON with one list of training images, by their places in the data set,
for every client.

    {"indices": [[0, 7, ...], [3, ...], ...], "dataset_sha256": "..."}      or the lists alone

Images in no list belong to nobody. Places count the training images as a run has them, without
validation and held-out ones."""

import json
from itertools import chain
from pathlib import Path

import torch

from semanticfl_ref import storage
from semanticfl_ref.errors import DataError, MismatchError


def save(partition, dataset, file: Path) -> None:
    """Write what `partition.file` reads: each client's images, those of its own test among them.

    Raises:
        DataError: the file cannot be written.
    """
    whole = [
        torch.cat(pair).sort().values.tolist()
        for pair in zip(partition.indices, partition.held_out, strict=True)
    ]
    about = {
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "partition": partition.manifest(),
    }
    storage.replace(
        file, storage.canonical({"indices": whole, **about}) + "\n", "choose another --save"
    )


def read_owners(file: Path, images: int, clients: int, data_sha256: str) -> torch.Tensor:
    """The owner of every image, int64 [N], -1 for nobody.

    Raises:
        DataError: the file is missing, is not such JSON, names an image that there is not, or one
            twice.
        MismatchError: it was made of another data set, or has another number of clients.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read partition.file = {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"partition.file = {file} is not JSON: {error}") from None
    about = document if isinstance(document, dict) else {"indices": document}
    lists = about.get("indices")
    if not isinstance(lists, list) or not all(
        isinstance(own, list) and all(type(i) is int for i in own) for own in lists
    ):
        raise DataError(
            f'partition.file = {file}: expected {{"indices": [[...], ...]}}, a list of whole numbers for every client'
        )
    if about.get("dataset_sha256", data_sha256) != data_sha256:
        raise MismatchError(
            f"partition.file = {file} was made of other training images: it records {about['dataset_sha256']}, these are {data_sha256}"
        )
    if len(lists) != clients:
        raise MismatchError(
            f"partition.file = {file} has {len(lists)} clients, partition.clients = {clients}: use --clients {len(lists)}"
        )
    for client, own in enumerate(lists):
        outside = [i for i in own if not 0 <= i < images]
        if outside:
            raise DataError(
                f"partition.file = {file}: client {client} holds image {outside[0]}; there are {images} training images, counted from 0"
            )
    taken = torch.tensor(list(chain(*lists)), dtype=torch.int64)
    often = torch.bincount(taken, minlength=images)
    if len(taken) and int(often.max()) > 1:
        raise DataError(
            f"partition.file = {file}: image {int(often.argmax())} is held {int(often.max())} times; clients' lists must be disjoint"
        )
    sizes_M = torch.tensor([len(own) for own in lists])
    return torch.full((images,), -1).index_copy_(
        0, taken, torch.repeat_interleave(torch.arange(clients), sizes_M)
    )
