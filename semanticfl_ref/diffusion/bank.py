"""Images and class names -> a `FeatureBank` on disk: made once, named by the hash of everything that made it, verified when read.

The file is one safetensors with one metadata key of sorted JSON. Its name is the bank's id; its content's hash stands in the metadata.
Reading one imports neither diffusers nor transformers.

Letters: N images, C classes, L taps, D width of a vector.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from semanticfl_ref.diffusion.weights import fingerprint, locate
from semanticfl_ref.errors import MismatchError, NonFiniteError, UserError, unknown

CODE_VERSION = 1  # raise it whenever the same inputs would give other features
CONDITIONS = ("null", "own-class")
TEXT = "text"


@dataclass(frozen=True)
class FeatureBank:
    """What the diffusion model says of a set of images.

    features: tap -> float16 [N, D]. text: float32 [C, D_text]. id: sha256 of `meta`, which holds all that made it.
    """

    features: dict[str, torch.Tensor]
    text: torch.Tensor
    id: str
    meta: dict


def open_or_build(
    dataset_images: torch.Tensor, labels: torch.Tensor, class_names, dataset_sha256: str, *, source: str | Path = "tiny", taps, timestep: int = 150,
    pool: int = 1, prompt: str = "a photo of a {}", condition: str = "null", input_size: int | None = None, seed: int = 0, precision: str = "auto",
    cache_dir: Path, offline: bool = False, progress: bool = False, device: str | None = None,
) -> FeatureBank:  # fmt: skip
    """Read the bank of these images and options, or make it.

    Args:
        dataset_images, labels: uint8 [N, H, W, 3] and int64 [N]: the images to describe, all of a data set's or some.
        class_names, dataset_sha256: of the data set.
        source: "tiny", a folder in diffusers' layout, or a hub id.
        taps, timestep, pool, input_size: see `Backbone.features`.
        prompt: the caption of a class, `{}` where its name goes.
        condition: "null": each image passes the U-Net under the empty caption; "own-class": under its own class's, which writes its label into its features.
        seed: of the noise.
        precision: fp32, bf16, fp16, or auto (fp16 on CUDA, else fp32); of the U-Net.
        cache_dir: where banks live. device: None = CUDA when there is one.
        offline: open no socket. progress: a bar on stderr.

    Raises:
        MismatchError: the bank on disk is damaged or is another one. NonFiniteError: names image and tap. DataError, DownloadError: see `weights.locate`.
    """
    if condition not in CONDITIONS:
        raise unknown("condition", condition, CONDITIONS)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        precision = "fp16" if device.startswith("cuda") else "fp32"
    folder = locate(source, offline=offline)
    meta = {
        "source": str(source),
        "weights_sha256": fingerprint(folder),
        "dataset_sha256": dataset_sha256,
        "images_sha256": _sha256(dataset_images),  # a part of a data set is not the data set
        "labels_sha256": _sha256(labels) if condition == "own-class" else None,
        "class_names": list(class_names),
        "taps": list(taps),
        "timestep": timestep,
        "pool": pool,
        "prompt": prompt,
        "condition": condition,
        "input_size": input_size,
        "seed": seed,
        "precision": precision,
        "code_version": CODE_VERSION,
    }
    bank_id = hashlib.sha256(_json({key: value for key, value in meta.items() if key != "source"}).encode()).hexdigest()  # a folder may move
    file = Path(cache_dir) / f"bank-{bank_id}.safetensors"
    if not file.exists():
        features, text = _extract(folder, dataset_images, labels, meta, device, progress)
        _write(file, {**{f"tap/{tap}": values for tap, values in features.items()}, TEXT: text}, {**meta, "id": bank_id})
    return _read(file, bank_id, len(dataset_images))


def _extract(folder: Path, images, labels, meta: dict, device: str, progress: bool):
    """Every image once through the model: tap -> float16 [N, D], and text float32 [C, D_text]."""
    from semanticfl_ref.diffusion.backbone import PRECISIONS, Backbone, captions

    if meta["precision"] not in PRECISIONS:
        raise unknown("precision", meta["precision"], ["auto", *PRECISIONS])
    prompts = captions(meta["prompt"], meta["class_names"])
    backbone = Backbone.load(folder, taps=meta["taps"], device=device, dtype=PRECISIONS[meta["precision"]], offline=True)
    hidden = backbone.hidden(prompts if meta["condition"] == "own-class" else [""])
    features: dict[str, torch.Tensor] = {}
    with tqdm(total=len(images), desc="diffusion features", unit="image", file=sys.stderr, disable=not progress) as bar:
        for first in range(0, len(images), backbone.batch):
            part = images[first : first + backbone.batch]
            embedding = hidden[labels[first : first + len(part)].to(hidden.device)] if meta["condition"] == "own-class" else hidden[0]
            options = {key: meta[key] for key in ("timestep", "seed", "pool", "input_size")}
            for tap, values in backbone.features(part, prompt_embedding=embedding, first=first, **options).items():
                rows = features.setdefault(tap, torch.empty(len(images), values.shape[1], dtype=torch.float16))
                rows[first : first + len(part)] = values
                if not rows[first : first + len(part)].isfinite().all():
                    image = first + int((~rows[first : first + len(part)].isfinite().all(1)).nonzero()[0])
                    raise NonFiniteError(f"image {image}, tap {tap}: {values.abs().max():.3g} does not fit the bank's fp16; leave this tap out")
            bar.update(len(part))
    return features, backbone.text(meta["class_names"], meta["prompt"])


def _write(file: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """One file, one rename: a reader sees the whole bank or none."""
    data = save(tensors, {"bank": _json({**meta, "content_sha256": _content(tensors, meta)})})
    temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself cannot be written; the first error says so
        raise UserError(f"cannot write the feature bank {file} ({len(data) / 1e6:.1f} MB): {error.strerror or error}; free space, or choose another cache folder") from error


def _read(file: Path, bank_id: str, images: int) -> FeatureBank:
    """Read and verify; every byte that matters is under the content's hash."""
    remedy = f"delete {file} and run again: it will be made anew"
    try:
        with safe_open(file, framework="pt") as opened:
            meta = json.loads(opened.metadata()["bank"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        recorded = meta.pop("content_sha256")
        intact = recorded == _content(tensors, meta)
    except OSError as error:
        raise UserError(f"cannot read the feature bank {file}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise MismatchError(f"the feature bank {file} is damaged ({type(error).__name__}); {remedy}") from error
    if not intact:
        raise MismatchError(f"the feature bank {file} is damaged: its content does not have the hash that it records; {remedy}")
    if meta.pop("id") != bank_id or any(len(values) != images for name, values in tensors.items() if name != TEXT):
        raise MismatchError(f"the feature bank {file} was made from other images, weights or options than its name says; {remedy}")
    return FeatureBank({tap: tensors[f"tap/{tap}"] for tap in meta["taps"]}, tensors[TEXT], bank_id, meta)


def _content(tensors: dict[str, torch.Tensor], meta: dict) -> str:
    """sha256 over the metadata and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(_json(meta).encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        total.update(tensors[name].contiguous().numpy().data)
    return total.hexdigest()


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


def _json(value) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True)
