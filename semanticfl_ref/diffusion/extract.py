"""Builds feature caches: every image passes the model once; features are written shard by shard.

Memory does not grow with the number of images. A killed extraction continues after its last
complete shard and ends with the same bytes. Processes that need the same cache take turns.
"""

import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from semanticfl_ref.device import default_threads
from semanticfl_ref.diffusion.backbone import Backbone, PassOptions, check_finite
from semanticfl_ref.diffusion.feature_cache import (
    MANIFEST,
    SHARD,
    TEXT,
    CachePlan,
    FeatureCache,
    open_cache,
)
from semanticfl_ref.diffusion.model_files import fingerprint
from semanticfl_ref.diffusion.text import TextEncoder, captions
from semanticfl_ref.errors import DataError
from semanticfl_ref.formatting import Say, format_bytes
from semanticfl_ref.storage import (
    LOCK_EX,
    LOCK_NB,
    Damaged,
    canonical_json,
    flock,
    load_tensors,
    remove_parts,
    save_tensors,
    sha256_of,
    write_atomic,
    write_errors,
)

REMEDY = "free some disk space, or set SEMANTICFL_CACHE to another folder"
LOCK = ".lock"


def open_or_build(
    plan: CachePlan, say: Say = lambda text: None, *, rebuild: bool = False
) -> FeatureCache:
    """Open the cache; build it first if it is absent or incomplete.

    Args:
        plan: the cache.
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


def build_cache(plan: CachePlan, say: Say, *, rebuild: bool = False) -> None:
    """Build the cache, or what is missing of it. Arguments and errors as in `open_or_build`."""
    with write_errors(plan.path, REMEDY):
        plan.path.mkdir(parents=True, exist_ok=True)
        lock = open(plan.path / LOCK, "a")  # noqa: SIM115 (closed below)
    with lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds the feature cache {plan.path}")
            flock(lock, LOCK_EX)
        remove_parts(plan.path)
        if rebuild:
            # The manifest first: the files that it names are deleted next.
            with write_errors(plan.path, REMEDY):
                for file in (plan.path / MANIFEST, *plan.files):
                    file.unlink(missing_ok=True)
        if not plan.complete:
            _build(plan, say)


def complete_files(plan: CachePlan) -> dict[Path, str]:
    """The complete files of a cache that is being built, and their SHA-256."""
    found = {}
    for file in plan.files:
        try:
            _, about, recorded = load_tensors(file)
        except (Damaged, DataError):
            continue
        if (about["cache"], about["file"]) == (plan.id, file.name):
            found[file] = recorded
    return found


def _build(plan: CachePlan, say: Say) -> None:
    digests, text_file = complete_files(plan), plan.path / TEXT
    missing = {file: part for file, part in plan.shards.items() if file not in digests}
    if missing or text_file not in digests:
        hidden, text = _captions(plan)
        if text_file not in digests:
            about = {"cache": plan.id, "file": TEXT}
            digests[text_file] = save_tensors(text_file, {"text": text}, about, REMEDY)
    if missing:
        digests |= _extract(plan, hidden, missing, say)
    _, about, _ = load_tensors(plan.files[0])
    manifest = {
        "meta": plan.meta,
        "widths": about["widths"],
        "files": {file.name: digests[file] for file in sorted(digests)},
    }
    sealed = {**manifest, "sha256": sha256_of(manifest)}
    write_atomic(plan.path / MANIFEST, canonical_json(sealed) + "\n", REMEDY)


def _captions(plan: CachePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net attends to, float32 [1 or C, T, D], and the text anchors [C, D].

    The text encoder is freed when this returns.
    """
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
    plan: CachePlan, hidden: torch.Tensor, missing: dict[Path, torch.Tensor], say: Say
) -> dict[Path, str]:
    """Write the missing shards; returns their SHA-256."""
    meta, digests = plan.meta, {}
    backbone = Backbone(
        plan.model, layers=meta["layers"], device=plan.device, precision=meta["precision"]
    )
    assert SHARD % backbone.batch == 0, "a shard must end where a pass ends"
    widths = backbone.widths(meta["pool"], meta["vae_pool"])
    every_caption = meta["condition"] == "every-class"
    done = len(plan.images) - sum(map(len, missing.values()))
    _announce(plan, done, 2 * sum(widths.values()), say)
    say(backbone.memory())
    options = {field.name: meta[field.name] for field in fields(PassOptions)}
    # The embedded model is too small for several threads.
    threads = default_threads() if backbone.batch == backbone.LARGE_PASS else nullcontext()
    with (
        threads,
        tqdm(
            total=len(plan.images), initial=done, desc="diffusion features", unit=" images"
        ) as bar,
    ):
        for file, part in missing.items():
            embedding, first = hidden, int(part[0])
            if meta["condition"] == "own-class":
                embedding = hidden[plan.labels[part].to(hidden.device)]
            features = backbone.features(
                plan.images[part],
                prompt_embedding=embedding,
                first=first,
                every_caption=every_caption,
                **options,
            )
            stored = {layer: values.half() for layer, values in features.items()}
            check_finite(
                stored,
                first,
                "a value does not fit the cache's fp16 (above 65504); leave this layer out of "
                "diffusion.layers",
            )
            about = {"cache": plan.id, "file": file.name, "widths": list(widths.items())}
            stored = {layer: values.flatten(0, -2) for layer, values in stored.items()}
            digests[file] = save_tensors(file, stored, about, REMEDY)
            bar.update(len(part))
    return digests


def _announce(plan: CachePlan, done: int, bytes_per_pass: int, say: Say) -> None:
    """Say what will be computed and written.

    Raises:
        DataError: it does not fit on the disk.
    """
    count, condition, passes = len(plan.images), plan.meta["condition"], 1
    if condition == "every-class":
        passes = len(plan.meta["class_names"])
        say(
            f"cost: each image has a U-Net pass under every class's caption, in all "
            f"{passes * (count - done):,} passes; feddifrc.keys = class-mean avoids them"
        )
    bytes_per_image = passes * bytes_per_pass
    needed, free = bytes_per_image * (count - done), shutil.disk_usage(plan.path).free
    if needed > free:
        raise DataError(
            f"the feature cache {plan.path} needs {format_bytes(needed)}, only "
            f"{format_bytes(free)} are free: {REMEDY}"
        )
    note = f", {done} of them already done" if done else ""
    size = format_bytes(bytes_per_image * count)
    say(f"feature cache of {count} images{note}: {size} at {plan.path}")
    if condition == "own-class":
        say("each image has its own class's caption, so its features contain its label")
