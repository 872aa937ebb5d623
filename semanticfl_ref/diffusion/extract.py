"""Builds feature caches: every image once through the model, shard by shard to disk.

Memory does not grow with the number of images. A killed extraction continues after its last
complete shard and ends with the same bytes. Processes that want the same cache take turns.
"""

import fcntl
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from semanticfl_ref.diffusion.feature_cache import (
    MANIFEST,
    SHARD,
    TEXT,
    CachePlan,
    FeatureCache,
    open_cache,
)
from semanticfl_ref.diffusion.model_files import fingerprint
from semanticfl_ref.diffusion.text import captions
from semanticfl_ref.errors import DataError, NonFiniteError
from semanticfl_ref.storage import (
    Damaged,
    canonical_json,
    load_tensors,
    save_tensors,
    sha256_of,
    write_atomic,
    write_errors,
)

REMEDY = "free some disk space, or set SEMANTICFL_CACHE to another folder"
LOCK = ".lock"


def open_or_build(
    plan: CachePlan, say: Callable[[str], None] = lambda text: None, *, rebuild: bool = False
) -> FeatureCache:
    """Open the cache; build it first if it is absent or incomplete.

    Args:
        say: takes one line of progress.
        rebuild: discard an existing cache.

    Raises:
        MismatchError: the cache on disk is damaged or is another one.
        DataError: it cannot be written, or the model is damaged.
        NonFiniteError: names image and layer.
    """
    if rebuild or not plan.complete:
        build_cache(plan, say, rebuild=rebuild)
    return open_cache(plan)


def build_cache(plan: CachePlan, say: Callable[[str], None], *, rebuild: bool = False) -> None:
    """Build the cache, or what is missing of it. Arguments and errors as in `open_or_build`."""
    with write_errors(plan.path, REMEDY):
        plan.path.mkdir(parents=True, exist_ok=True)
        lock = open(plan.path / LOCK, "a")  # noqa: SIM115 (closed below)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds the feature cache {plan.path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if rebuild:
            # The manifest first: the files that it names are deleted next.
            with write_errors(plan.path, REMEDY):
                for file in (plan.path / MANIFEST, plan.path / TEXT, *plan.shard_files):
                    file.unlink(missing_ok=True)
        if not plan.complete:
            _build(plan, say)


def complete_files(plan: CachePlan) -> dict[Path, str]:
    """The complete files of a cache that is being built, and their SHA-256."""
    found = {}
    for file in (*plan.shard_files, plan.path / TEXT):
        try:
            _, about, recorded = load_tensors(file)
        except (Damaged, DataError):
            continue
        first = 0 if file.name == TEXT else _first_image(file)
        if (about["cache"], about["first"]) == (plan.id, first):
            found[file] = recorded
    return found


def images_in(plan: CachePlan, shard: Path) -> int:
    """How many images a shard holds."""
    return min(SHARD, len(plan.images) - _first_image(shard))


def _build(plan: CachePlan, say: Callable[[str], None]) -> None:
    files, text_file = plan.shard_files, plan.path / TEXT
    digests = complete_files(plan)
    if set(digests) != {*files, text_file}:
        hidden, text = _captions(plan)
        if text_file not in digests:
            about = {"cache": plan.id, "first": 0}
            digests[text_file] = save_tensors(text_file, {"text": text}, about, REMEDY)
        missing = [file for file in files if file not in digests]
        if missing:
            digests |= _extract(plan, hidden, missing, say)
    tensors, about, _ = load_tensors(files[0])
    manifest = {
        "id": plan.id,
        "meta": plan.meta,
        "widths": [(layer, tensors[layer].shape[1]) for layer in about["layers"]],
        "files": {file.name: digests[file] for file in sorted(digests)},
    }
    sealed = {**manifest, "sha256": sha256_of(manifest)}
    write_atomic(plan.path / MANIFEST, canonical_json(sealed) + "\n", REMEDY)


def _captions(plan: CachePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net attends to, float32 [1 or C, T, D], and the text anchors [C, D].

    The text encoder is freed when this returns.
    """
    from semanticfl_ref.diffusion.text import TextEncoder

    # A prompt without a place for the class is refused before anything is loaded.
    prompts = captions(plan.meta["prompt"], plan.meta["class_names"])
    if fingerprint(plan.model) != plan.meta["weights_sha256"]:
        raise DataError(
            f"the files of {plan.model} changed while their modification times did not: delete "
            f"{plan.path.parent / 'weights.json'} and run again"
        )
    encoder = TextEncoder(plan.model, plan.device)
    hidden, text = encoder.encode(prompts)
    if plan.meta["condition"] == "null":
        hidden = encoder.encode([""])[0]
    return hidden, text


def _extract(
    plan: CachePlan, hidden: torch.Tensor, missing: list[Path], say: Callable[[str], None]
) -> dict[Path, str]:
    """Write the missing shards; returns their SHA-256."""
    from semanticfl_ref.diffusion.backbone import Backbone

    meta, digests = plan.meta, {}
    backbone = Backbone.load(
        plan.model, layers=meta["layers"], device=plan.device, precision=meta["precision"]
    )
    assert SHARD % backbone.batch == 0, "a shard must end where a pass ends"
    widths = backbone.widths(meta["pool"])
    left = sum(images_in(plan, file) for file in missing)
    _announce(plan, left, 2 * sum(widths.values()), say)
    say(backbone.memory())
    options = {k: meta[k] for k in ("timestep", "seed", "pool", "input_size", "latent")}
    with tqdm(
        total=len(plan.images),
        initial=len(plan.images) - left,
        desc="diffusion features",
        unit=" images",
        file=sys.stderr,
    ) as bar:
        for file in missing:
            start = _first_image(file)
            end, rows = start + images_in(plan, file), []
            for first in range(start, end, backbone.batch):
                part = slice(first, min(first + backbone.batch, end))
                embedding = hidden[0]
                if meta["condition"] == "own-class":
                    embedding = hidden[plan.labels[part].to(hidden.device)]
                features = backbone.features(
                    plan.images[part], prompt_embedding=embedding, first=first, **options
                )
                rows.append(_as_stored(features, first))
                bar.update(part.stop - part.start)
            tensors = {layer: torch.cat([row[layer] for row in rows]) for layer in widths}
            about = {"cache": plan.id, "first": start, "layers": list(widths)}
            digests[file] = save_tensors(file, tensors, about, REMEDY)
    return digests


def _announce(plan: CachePlan, left: int, bytes_per_image: int, say: Callable[[str], None]) -> None:
    """Say what will be written; refuse what does not fit.

    Raises:
        DataError: the disk has too little space.
    """
    count = len(plan.images)
    needed, free = bytes_per_image * left, shutil.disk_usage(plan.path).free
    if needed > free:
        raise DataError(
            f"the feature cache {plan.path} needs {needed / 2**20:.0f} MiB, only "
            f"{free / 2**20:.0f} MiB are free: {REMEDY}"
        )
    done = f", {count - left} of them already done" if left < count else ""
    leaks = ""
    if plan.meta["condition"] == "own-class":
        leaks = "; each image under its own class's caption, so its features contain its label"
    say(
        f"feature cache of {count} images{done}: {bytes_per_image * count / 2**20:.1f} MiB at "
        f"{plan.path}{leaks}"
    )


def _as_stored(features: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    """float32 features as fp16."""
    stored = {layer: values.half() for layer, values in features.items()}
    for layer, values in stored.items():
        bad = (~values.isfinite().all(1)).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"image {first + int(bad[0])}, layer {layer}: "
                f"{features[layer].abs().max():.3g} does not fit the cache's fp16; leave this layer "
                f"out of diffusion.layers"
            )
    return stored


def _first_image(shard: Path) -> int:
    return SHARD * int(shard.stem.removeprefix("shard-"))
