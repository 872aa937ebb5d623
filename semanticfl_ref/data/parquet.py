"""Tables of images as Hugging Face has them: Parquet files, and folders of `save_to_disk`."""

import json
from pathlib import Path

import numpy as np
import torch

from semanticfl_ref.data.archives import decode_image, raise_problems
from semanticfl_ref.data.dataset import Parts, ReadOptions
from semanticfl_ref.data.own_data import SIDE, Read, assemble_read, own_path, part_of
from semanticfl_ref.errors import DataError, UserError

ROWS = 500  # read at a time


def read(options: ReadOptions) -> Parts:
    """The images of a file, or of all files below a folder; names of files or folders say the part.

    Raises:
        UserError: an option that does not fit, or pyarrow is missing.
        DataError: no such files, one part in two folders, a column that cannot be chosen, a damaged
            file or image.
    """
    path, settings = own_path(options, "FOLDER"), options.settings
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise UserError('--dataset parquet needs pyarrow: pip install ".[parquet]"') from None
    size, parts, notes = settings.image_size or SIDE, {}, []
    for part, shards in _files(path).items():
        images, labels, clients, problems = [], [], [], []
        for file in shards:
            try:
                schema, batches = _open(file)
                image, label = _columns(file, schema, options)
                names = _label_names(schema, label)
                by = [settings.clients_from] if settings.clients_from else []
                for batch in batches:
                    rows = batch.select([image, label, *by]).to_pydict()
                    for cell in rows[image]:
                        where = f"{file}: row {len(images)} of the {part} part"
                        images.append(_decoded(cell, where, size, problems))
                    labels += rows[label]
                    clients += rows[by[0]] if by else []
            except (ArrowException, OSError, KeyError) as error:
                raise DataError(f"{file} is damaged or incomplete ({error})") from None
        raise_problems(problems)
        if all(value in (None, -1) for value in labels):  # how unlabelled images are marked
            notes.append(f"the {part} part of {path} has no labels: left out")
        elif any(value in (None, -1, "") for value in labels):
            raise DataError(f"{path}: images of the {part} part have no {label}: remove them")
        else:
            stacked = torch.from_numpy(np.stack(images))
            parts[part] = Read(stacked, np.array(labels), np.array(clients) if by else None)
    return assemble_read(parts, options, path, label_names=names, notes=notes)


def _files(path: Path) -> dict[str, list[Path]]:
    """Part -> its files, in the order of their names."""
    if path.is_file():
        return {part_of(path.name) or "train": [path]}
    found = [*path.rglob("*.parquet"), *path.rglob("*.arrow")]
    parts = {}
    for file in sorted(file for file in found if not file.name.startswith(("cache-", "."))):
        words = file.relative_to(path).with_suffix("").parts[::-1]  # the file's own name first
        part = next((part for word in words if (part := part_of(word))), "train")
        parts.setdefault(part, []).append(file)
    if not parts:
        raise DataError(f"{path} holds no .parquet or .arrow file: correct --data-dir")
    for part, files in parts.items():
        folders = sorted({str(file.parent) for file in files})
        if len(folders) > 1:
            raise DataError(
                f"{path}: {folders[0]} and {folders[1]} both hold files of the {part} part: name "
                f"one folder with --data-dir"
            )
    return parts


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


def _columns(file: Path, schema, options: ReadOptions) -> tuple[str, str]:
    """The columns of images and of labels: as set, or the only one of such a type.

    A column called label is preferred.
    """
    from pyarrow import types

    settings = options.settings
    types_of = dict(zip(schema.names, schema.types, strict=True))

    def chosen(setting: str, fitting: list[str]) -> str:
        name = getattr(settings, setting) or "label" * ("label" in fitting)
        name = name or (fitting[0] if len(fitting) == 1 else "")
        if name not in fitting:
            found = f"column {name!r} does not fit" if name else f"{len(fitting)} columns that fit"
            raise DataError(
                f"{file}: {found}; choose data.{setting} among {', '.join(fitting or types_of)}"
            )
        return name

    def holds_images(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_labels(kind) -> bool:
        return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

    by = settings.clients_from
    if by and by not in types_of:
        raise DataError(
            f"{file} has no column {by!r}; choose data.clients_from among {', '.join(types_of)}"
        )
    images = [name for name, kind in types_of.items() if holds_images(kind)]
    labels = [name for name, kind in types_of.items() if holds_labels(kind) and name != by]
    return chosen("image_column", images), chosen("label_column", labels)


def _label_names(schema, label: str) -> list[str] | None:
    """The names that `datasets` keeps beside a column of integers; None without."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _decoded(cell, where: str, size: int, problems: list[str]) -> np.ndarray | None:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        problems.append(f"{where} holds no image, or only its path: store the bytes in the table")
        return None
    try:
        return decode_image(content, where, size)
    except DataError as error:
        problems.append(str(error))
