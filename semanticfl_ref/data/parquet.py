"""Tables of images as Hugging Face has them: Parquet files, and folders of `save_to_disk`."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.config.data_settings import DataSettings
from semanticfl_ref.data.archives import decode_image, raise_problems
from semanticfl_ref.data.dataset import Parts, ReadOptions
from semanticfl_ref.data.own_data import SIDE, Read, assemble_read, own_path, part_of
from semanticfl_ref.errors import DataError, UserError

ROWS = 500  # read at a time


def read(options: ReadOptions) -> Parts:
    """The images of a file, or of all files below a folder; names of files or folders say the part.

    Raises:
        UserError: an option that does not fit, or pyarrow is missing.
        DataError: no such files, one part in two folders, a column that cannot be chosen, parts
            whose classes have other names, a damaged file or image.
    """
    path = own_path(options, "FOLDER")
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise UserError("--dataset parquet needs pyarrow: pip install -e '.[parquet]'") from None
    parts, notes, names, columns = {}, [], None, []
    for part, shards in _files(path).items():  # the training part first
        images, labels, clients, problems = [], [], [], []
        for file in shards:
            try:
                schema, batches = _open(file)
                if not columns:
                    columns = _columns(file, schema, options.settings)
                    names = _names(schema, columns[1])
                image, label, *by = columns if part == "train" else columns[:2]
                if label in schema.names and names != (_names(schema, label) or names):
                    raise DataError(
                        f"{file} has other names for its labels than the training part, or in "
                        f"another order"
                    )
                for batch in batches:
                    found = [name for name in (image, label, *by) if name in schema.names]
                    rows = batch.select(found).to_pydict()
                    for cell in rows[image]:
                        where = f"{file}: row {len(images)} of the {part} part"
                        images.append(_decoded(cell, where, options.settings, problems))
                    labels += rows.get(label, [None] * len(rows[image]))
                    if by:
                        who = _names(schema, by[0])
                        clients += [who[i] if who and i is not None else i for i in rows[by[0]]]
            except (ArrowException, OSError, LookupError, UnicodeDecodeError) as error:
                raise DataError(f"{file} is damaged or incomplete ({error})") from None
        raise_problems(problems)
        if None in clients:
            raise DataError(f"{path}: training image {clients.index(None)} has no {by[0]}")
        if all(value in (None, -1) for value in labels):  # how unlabelled images are marked
            notes.append(f"the {part} part of {path} has no labels: left out")
        elif any(value in (None, -1, "") for value in labels):
            raise DataError(
                f"{path}: images of the {part} part have no {label}, as -1 says too: remove them"
            )
        else:
            stacked = torch.from_numpy(np.stack(images))
            parts[part] = Read(stacked, np.array(labels), np.array(clients) if by else None)
    return assemble_read(parts, options, path, label_names=names, notes=notes)


def _files(path: Path) -> dict[str, list[Path]]:
    """Part -> its files, in the order of their names; the training part is the first."""
    if path.is_file():
        return {"train": [path]}
    parts = defaultdict(list)
    for file in sorted([*path.rglob("*.parquet"), *path.rglob("*.arrow")]):
        inside = file.relative_to(path)
        hidden = any(name.startswith(".") for name in inside.parts)
        if file.is_file() and not hidden and not file.name.startswith("cache-"):
            words = inside.with_suffix("").parts[::-1]  # the file's own name first
            parts[next(filter(None, map(part_of, words)), None)].append(file)
    if not parts:
        raise DataError(f"{path} holds no .parquet or .arrow file: correct --data-dir")
    if None in parts and len(parts) > 1:
        raise DataError(
            f"{path}: {parts[None][0]} belongs to no part (train, validation, test), as others do: "
            f"rename it or move it elsewhere"
        )
    parts = {part or "train": files for part, files in parts.items()}
    if "train" not in parts:
        raise DataError(f"{path} holds no training part, only {', '.join(parts)}")
    for part, files in parts.items():
        folders = sorted({str(file.parent) for file in files})
        if len(folders) > 1:
            raise DataError(
                f"{path}: {folders[0]} and {folders[1]} both hold files of the {part} part: name "
                f"one folder with --data-dir"
            )
    return dict(sorted(parts.items(), key=lambda item: item[0] != "train"))


def _open(file: Path) -> tuple:
    """The schema and the batches of a file."""
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(file)
        return table.schema_arrow, table.iter_batches(ROWS)
    source = pyarrow.memory_map(str(file))
    try:
        batches = pyarrow.ipc.open_stream(source)  # as save_to_disk writes it
    except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_file(source)
        return table.schema, map(table.get_batch, range(table.num_record_batches))
    return batches.schema, batches


def _columns(file: Path, schema, settings: DataSettings) -> list[str]:
    """The columns of images, of labels and, if set, of clients: as set, or the only one that fits.

    A column called label is preferred.
    """
    from pyarrow import types

    kinds = dict(zip(schema.names, schema.types, strict=True))
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_dictionary)

    def holds_images(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_classes(kind) -> bool:
        return types.is_integer(kind) or any(is_text(kind) for is_text in texts)

    def chosen(setting: str, holds: Callable[..., bool], taken: Sequence[str] = ()) -> str:
        fitting = [name for name, kind in kinds.items() if holds(kind) and name not in taken]
        name = getattr(settings, setting) or "label" * ("label" in fitting)
        name = name or (fitting[0] if len(fitting) == 1 else "")
        if name not in fitting:
            found = f"column {name!r} does not fit" if name else f"{len(fitting)} columns fit"
            every = [f"{other} ({kind})" for other, kind in kinds.items()]
            raise DataError(
                f"{file}: {found}; choose data.{setting} among {', '.join(fitting or every)}"
            )
        return name

    by = [chosen("clients_from", holds_classes)] if settings.clients_from else []
    return [
        chosen("image_column", holds_images),
        chosen("label_column", holds_classes, taken=by),
        *by,
    ]


def _names(schema, column: str) -> list[str] | None:
    """The names that `datasets` keeps beside a column of integers; None without."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _decoded(cell, where: str, settings: DataSettings, problems: list[str]) -> np.ndarray | None:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        problems.append(f"{where} holds no image, or only its path: store the bytes in the table")
        return None
    try:
        return decode_image(content, where, settings.image_size or SIDE)
    except DataError as error:
        problems.append(str(error))
