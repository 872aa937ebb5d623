"""Diffusion features on disk: content-addressed, sharded, verified when opened.

A cache is a folder `features-<id>` of safetensors files: `shard-00000.safetensors` and so on with
`SHARD` images each, `text.safetensors`, and `manifest.json`, which is written last with the SHA-256
of every file. A folder without it is a cache that is still being built: extract.py continues it.
Reading a cache imports neither diffusers nor transformers.

Letters: N images, C classes, D width of a vector.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from semanticfl_ref.config.settings import DiffusionSettings
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.device import resolve_precision, vae_precision
from semanticfl_ref.diffusion.model_files import fingerprint, locate
from semanticfl_ref.errors import DataError, MismatchError
from semanticfl_ref.storage import Damaged, load_tensors, sha256_of

CODE_VERSION = 1  # raise it whenever the same inputs would give other features
SHARD = 64  # images; a multiple of every pass, so that where a shard ends changes nothing
MANIFEST, TEXT = "manifest.json", "text.safetensors"


@dataclass(frozen=True)
class FeatureCache:
    """The diffusion features of N images, read in chunks.

    Attributes:
        text: float32 [C, D], one vector per class from the model's text encoder.
        id: names the cache; SHA-256 of `meta`.
        meta: everything that made it, plain JSON values.
        shards: functions from a layer's name to float16 [n, D], in the images' order; each reads
            when it is called.
        widths: layer -> D, in the order of the layers.
    """

    text: torch.Tensor
    id: str
    meta: dict
    shards: Sequence[Callable[[str], torch.Tensor]]
    widths: dict[str, int]

    def chunks(self, layer: str, rows: int = 4096) -> Iterator[torch.Tensor]:
        """The layer's vectors, float16 [rows, D] at a time."""
        held: list[torch.Tensor] = []
        for shard in self.shards:
            held.append(shard(layer))
            if sum(map(len, held)) > rows:
                *complete, rest = torch.cat(held).split(rows)
                yield from complete
                held = [rest]
        yield torch.cat(held)

    def read(self, layer: str) -> torch.Tensor:
        """All of the layer's vectors, float16 [N, D]."""
        return torch.cat(list(self.chunks(layer)))


@dataclass(frozen=True, kw_only=True, eq=False)
class CachePlan:
    """A cache that is needed, whether or not it exists.

    Attributes:
        path: where it is or will be.
        id, meta: see `FeatureCache`.
        model: folder of the diffusion model.
        images, labels: uint8 [N, H, W, 3] and int64 [N].
        device: where features are computed.
        remedy: ends the messages about a damaged cache.
    """

    path: Path
    id: str
    meta: dict
    model: Path
    images: torch.Tensor
    labels: torch.Tensor
    device: torch.device
    remedy: str

    @property
    def complete(self) -> bool:
        """Whether the cache is there and complete; its bytes are checked by `open_cache`."""
        return (self.path / MANIFEST).is_file()

    @property
    def shard_files(self) -> list[Path]:
        """The files that hold, or will hold, the images' features."""
        count = -(-len(self.images) // SHARD)
        return [self.path / f"shard-{number:05d}.safetensors" for number in range(count)]


def plan_cache(
    images: Dataset,
    settings: DiffusionSettings,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    offline: bool = False,
    remedy: str = "delete its folder and build it again",
) -> CachePlan:
    """Determine which cache is needed.

    Reads the model's files only if their SHA-256 is not known yet.

    Args:
        images: the data set whose training images go through the model.
        settings: the section `diffusion`.
        seed: of the noise.
        device: where features are computed.
        folder: where caches are kept.
        offline: no network access.
        remedy: ends the messages about a damaged cache.

    Raises:
        UserError: and its kinds, see `model_files.locate`.
    """
    precision = resolve_precision(settings.precision, device, half_on_cuda="fp16")
    model = locate(settings.source, offline=offline)
    labels = None
    if settings.condition == "own-class":
        labels = sha256_of("labels", {"labels": images.train_labels})
    meta = {
        **dataclasses.asdict(settings),
        "layers": list(settings.layer_names),
        "seed": seed,
        "precision": precision,
        "vae_precision": vae_precision(precision, device),
        "weights_sha256": fingerprint(model, folder / "weights.json"),
        "dataset_sha256": images.sha256,
        "images": len(images.train_images),
        "images_sha256": sha256_of("images", {"images": images.train_images}),
        "labels_sha256": labels,
        "class_names": list(images.class_names),
        "shard": SHARD,
        "code_version": CODE_VERSION,
    }
    id = _id_of(meta)
    return CachePlan(
        path=folder / f"features-{id}",
        id=id,
        meta=meta,
        model=model,
        images=images.train_images,
        labels=images.train_labels,
        device=device,
        remedy=remedy,
    )


def open_cache(plan: CachePlan) -> FeatureCache:
    """Open a complete cache after checking every byte.

    Raises:
        MismatchError: damaged, or made by something else than its name says.
        DataError: there is no complete cache.
    """
    manifest = _manifest(plan)
    if _id_of(manifest["meta"]) != plan.id:
        raise MismatchError(
            f"the feature cache {plan.path} was made from other images, weights or options than "
            f"its name says; {plan.remedy}"
        )
    files = manifest["files"]
    for path in (*plan.shard_files, plan.path / TEXT):  # of the last, the tensors are kept
        tensors = _verified(path, files.get(path.name), plan.remedy)
    shards = [partial(_read_layer, path) for path in plan.shard_files]
    return FeatureCache(
        tensors["text"], plan.id, manifest["meta"], shards, dict(manifest["widths"])
    )


def _read_layer(path: Path, layer: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(layer).clone()  # not a page of the file, which may be deleted


def _manifest(plan: CachePlan) -> dict:
    """The manifest, its own SHA-256 checked."""
    path = plan.path / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
        intact = set(manifest) == {"meta", "widths", "files"} and recorded == sha256_of(manifest)
    except FileNotFoundError:
        raise DataError(
            f"there is no complete feature cache at {plan.path}; {plan.remedy}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise MismatchError(f"the feature cache {plan.path} is damaged ({MANIFEST}); {plan.remedy}")
    return manifest


def _verified(path: Path, expected: str | None, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, every byte checked against the manifest."""
    try:
        tensors, _, recorded = load_tensors(path)
    except (Damaged, DataError) as error:
        raise MismatchError(f"the feature cache's {path} is damaged: {error}; {remedy}") from None
    if recorded != expected:
        raise MismatchError(
            f"the feature cache's {path} is not the file that was written; {remedy}"
        )
    return tensors


def _id_of(meta: dict) -> str:
    """SHA-256 of `meta` without the model's location: `weights_sha256` stands for its content."""
    return sha256_of({key: value for key, value in meta.items() if key != "source"})
