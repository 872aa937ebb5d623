"""Diffusion features on disk: content-addressed, sharded, verified when opened.

A cache is a folder `features-<id>` of safetensors files: `shard-00000.safetensors` and so on with
64 images each (a pass's, if that is more), `text.safetensors`, with diffusion.pooling = norm
`basis.safetensors`, and `manifest.json`, which is written last with the SHA-256 of every file. A
folder without it is a cache that is still being built: extract.py continues it. Reading a cache
imports neither diffusers nor transformers.

Letters: N images, C classes, D width of a vector.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from semanticfl_ref.config.settings import DiffusionSettings
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.device import resolve_precision, vae_precision
from semanticfl_ref.diffusion.cache_lock import LOCK, lock
from semanticfl_ref.diffusion.model_files import fingerprint, locate
from semanticfl_ref.diffusion.passes import device_pass_size
from semanticfl_ref.errors import DataError, MismatchError
from semanticfl_ref.storage import Damaged, load_tensors, sha256_of

CODE_VERSION = 1  # raise it whenever the same inputs would give other features
SHARD = 64  # images at least; a multiple of a pass, so that where a shard ends changes nothing
MANIFEST, TEXT, BASIS = "manifest.json", "text.safetensors", "basis.safetensors"


@dataclass(frozen=True)
class FeatureCache:
    """The diffusion features of N images, read in chunks.

    Attributes:
        text: float32 [C, D], one vector per class from the model's text encoder.
        labels: int64 [N], the images' classes.
        id: names the cache; SHA-256 of `meta`.
        meta: everything that made it, plain JSON values.
        shards: files of layers, float16 [n, D], in the images' order; with meta["condition"] =
            "every-class" [n C, D], the classes of an image one after another.
        widths: layer -> D, in the order of the layers.
    """

    text: torch.Tensor
    labels: torch.Tensor
    id: str
    meta: dict
    shards: list[Path]
    widths: dict[str, int]

    def chunks(self, layer: str, rows: int = 4096) -> Iterator[torch.Tensor]:
        """The layer's vectors, float16 [rows, D] at a time."""
        held: list[torch.Tensor] = []
        for path in self.shards:
            with safe_open(path, framework="pt") as opened:
                # Not a page of the file, which may be deleted.
                held.append(opened.get_tensor(layer).clone())
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
    remedy: str = "delete its folder and build it again"

    @property
    def complete(self) -> bool:
        """Whether the cache is there and complete; its bytes are checked by `open_cache`."""
        return (self.path / MANIFEST).is_file()

    @property
    def shards(self) -> dict[Path, torch.Tensor]:
        """The files of the images' features -> the indices of their images, int64."""
        parts = torch.arange(len(self.images)).split(self.meta["shard"])
        return {self.path / f"shard-{i:05d}.safetensors": part for i, part in enumerate(parts)}

    @property
    def files(self) -> list[Path]:
        """All files but the manifest; the last one is that of the texts."""
        own_basis = [self.basis] if self.basis and self.basis.parent == self.path else []
        return [*self.shards, *own_basis, self.path / TEXT]

    @property
    def basis(self) -> Path | None:
        """The file of the basis that the features are in, see position_norm.py; None: none."""
        if self.meta["pooling"] == "mean":
            return None
        other = self.meta["basis"]
        folder = self.path.with_name(f"features-{other}") if other else self.path
        return folder / BASIS


def plan_cache(
    images: Dataset,
    settings: DiffusionSettings,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    offline: bool = False,
    every_class: bool = False,
    basis: str | None = None,
) -> CachePlan:
    """Determine which cache is needed.

    Reads the model's files only if their SHA-256 is not known yet.

    Args:
        images: the data set whose training images go through the model.
        settings: the section `diffusion`.
        seed: seed of the noise.
        device: where features are computed.
        folder: where caches are kept.
        offline: no network access.
        every_class: features of each image under every class's caption, instead of under that of
            `settings.condition`.
        basis: id of the cache whose basis is used with pooling = norm; None: one of its own.

    Raises:
        UserError: and its kinds, see `model_files.locate`.
    """
    precision = resolve_precision(settings.precision, device, half_on_cuda="fp16")
    model = locate(settings.source, offline=offline)
    labels, condition = None, "every-class" if every_class else settings.condition
    if condition == "own-class":
        labels = sha256_of("labels", {"labels": images.train_labels})
    vae = vae_precision(precision, device)
    meta = {
        **dataclasses.asdict(settings),
        "condition": condition,
        "layers": list(settings.layer_names),
        "basis": basis if settings.pooling == "norm" else None,
        "seed": seed,
        "precision": precision,
        "vae_precision": vae,
        "weights_sha256": fingerprint(model, folder / "weights.json"),
        "dataset_sha256": images.sha256,
        "images": len(images.train_images),
        "images_sha256": sha256_of("images", {"images": images.train_images}),
        "labels_sha256": labels,
        "class_names": list(images.class_names),
        "shard": SHARD,
        "code_version": CODE_VERSION,
    }
    if not settings.compile:
        del meta["compile"]
    if device.type == "cuda":
        height, width = images.train_images.shape[1:3]
        pixels = settings.input_size**2 or height * width
        meta["pass"] = device_pass_size(model, device, pixels, vae)
        meta["shard"] = max(SHARD, meta["pass"])
    id = _id_of(meta)
    return CachePlan(
        path=folder / f"features-{id}",
        id=id,
        meta=meta,
        model=model,
        images=images.train_images,
        labels=images.train_labels,
        device=device,
    )


def open_cache(plan: CachePlan) -> FeatureCache:
    """Open a complete cache after checking every byte. A rebuild exchanges no file meanwhile.

    Raises:
        MismatchError: damaged, or made by something else than its name says.
        DataError: there is no complete cache.
    """
    try:
        held = lock(plan.path / LOCK, shared=True)
    except OSError:
        held = contextlib.nullcontext()  # a copy without a lock, which nobody rebuilds
    with held:
        return _open(plan)


def _open(plan: CachePlan) -> FeatureCache:
    manifest = _manifest(plan)
    if _id_of(manifest["meta"]) != plan.id:
        raise MismatchError(
            f"the feature cache {plan.path} was made from other images, weights or options than "
            f"its name says; {plan.remedy}"
        )
    for path in plan.files:
        try:
            tensors, _, recorded = load_tensors(path)
        except (Damaged, DataError) as error:
            raise MismatchError(
                f"the feature cache's {path} is damaged: {error}; {plan.remedy}"
            ) from None
        if recorded != manifest["files"].get(path.name):
            raise MismatchError(
                f"the feature cache's {path} is not the file that was written; {plan.remedy}"
            )
    return FeatureCache(
        text=tensors["text"],  # of the last file
        labels=plan.labels,
        id=plan.id,
        meta=manifest["meta"],
        shards=list(plan.shards),
        widths=dict(manifest["widths"]),
    )


def _manifest(plan: CachePlan) -> dict:
    """The manifest, its own SHA-256 checked."""
    path = plan.path / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
        intact = recorded == sha256_of(manifest)
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


def _id_of(meta: dict) -> str:
    """SHA-256 of `meta` without the model's location: `weights_sha256` stands for its content."""
    return sha256_of({key: value for key, value in meta.items() if key != "source"})
