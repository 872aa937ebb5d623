"""Builds feature caches: every image passes the model once; features are written shard by shard.

Memory does not grow with the number of images. A killed extraction continues with the shards that
are missing and ends with the same bytes. Processes that need the same cache share its shards: each
makes those that nobody makes or has made. A cache is rebuilt beside the old one.
"""

import os
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch

from semanticfl_ref.diffusion.backbone import Backbone, Reduce, check_finite
from semanticfl_ref.diffusion.cache_lock import LOCK, lock
from semanticfl_ref.diffusion.expected import (
    bytes_of,
    captions_per_image,
    extraction_threads,
    load_backbone,
    pass_options,
    seconds_of,
)
from semanticfl_ref.diffusion.feature_cache import (
    MANIFEST,
    TEXT,
    CachePlan,
    FeatureCache,
    open_cache,
)
from semanticfl_ref.diffusion.model_files import fingerprint
from semanticfl_ref.diffusion.position_norm import FITTED, fit_basis, position_norm
from semanticfl_ref.diffusion.text import TextEncoder, captions
from semanticfl_ref.errors import DataError
from semanticfl_ref.formatting import Say, format_bytes, format_seconds, progress_bar
from semanticfl_ref.storage import (
    Damaged,
    canonical_json,
    load_tensors,
    remove_parts,
    save_tensors,
    sha256_of,
    write_atomic,
    write_errors,
)

REMEDY = "free some disk space, or set SEMANTICFL_CACHE to another folder"
REBUILT, CLAIM = ".rebuild", ".claim"  # suffixes: of a folder beside the cache; of a shard's lock
LONG_PASSES = 20  # of a shorter extraction no time is measured


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
    made = plan
    if rebuild:
        made = replace(plan, path=plan.path.with_name(plan.path.name + REBUILT))
    with write_errors(plan.path, REMEDY):
        plan.path.mkdir(parents=True, exist_ok=True)
        if alone := lock(plan.path / LOCK, wait=False):
            with alone:
                for folder in {plan.path, made.path}:
                    remove_parts(folder)
        building = lock(plan.path / LOCK, shared=True)
    with building:
        with write_errors(made.path, REMEDY):
            made.path.mkdir(exist_ok=True)
        if not made.complete:
            _build(made, say)
    if rebuild:
        _exchange(made, plan)


def complete_files(plan: CachePlan) -> dict[Path, str]:
    """The complete files of a cache that is being built, and their SHA-256."""
    digests = {file: _digest(plan, file) for file in plan.files}
    return {file: digest for file, digest in digests.items() if digest}


def images_left(plan: CachePlan) -> int:
    """Number of images whose features are still to be made."""
    if plan.complete:
        return 0
    return sum(len(part) for file, part in plan.shards.items() if not _digest(plan, file))


def _exchange(made: CachePlan, plan: CachePlan) -> None:
    """Put a rebuilt cache in the old one's place, while nobody opens it.

    Should this process be killed meanwhile, the cache is incomplete, and its shards are good.
    """
    with write_errors(plan.path, REMEDY), lock(plan.path / LOCK):
        if not made.complete:
            return  # another process, which rebuilt it too, has put it there
        manifest = (made.path / MANIFEST).read_bytes()
        for folder in (plan.path, made.path):
            (folder / MANIFEST).unlink(missing_ok=True)
        for file in made.files:
            os.replace(file, plan.path / file.name)
        write_atomic(plan.path / MANIFEST, manifest, REMEDY)
        shutil.rmtree(made.path)


def _digest(plan: CachePlan, file: Path) -> str | None:
    """The SHA-256 of a file of the cache; None if it is not complete."""
    try:
        _, about, recorded = load_tensors(file)
    except (Damaged, DataError):
        return None
    return recorded if (about["cache"], about["file"]) == (plan.id, file.name) else None


def _build(plan: CachePlan, say: Say) -> None:
    digests, text_file = complete_files(plan), plan.path / TEXT
    missing = {file: part for file, part in plan.shards.items() if file not in digests}
    if plan.basis in plan.files and plan.basis not in digests:
        missing = plan.shards  # what is there is in another basis
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
    for claim in plan.path.glob(f"*{CLAIM}"):
        claim.unlink(missing_ok=True)


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
    """Write the missing shards, sharing them with others who do; returns the SHA-256 of all."""
    backbone = load_backbone(plan)
    if plan.meta["condition"] == "null":
        backbone.null_prompt = hidden[0]
    reduce, digests = None, {}
    with extraction_threads(backbone):
        if plan.basis is not None:
            basis, digests = _basis(plan, backbone, hidden)
            reduce = position_norm(basis, plan.device)
        done = len(plan.images) - sum(map(len, missing.values()))
        _announce(plan, backbone, done, say)
        with progress_bar(
            total=len(plan.images), initial=done, desc="diffusion features", unit=" images"
        ) as bar:
            shards = _Shards(plan, backbone, hidden, reduce, bar.update)
            shards.make(missing)
            if left := {file: missing[file] for file in missing if file not in shards.digests}:
                say(f"waiting for other processes that make {len(left)} of the shards")
                shards.make(left, wait=True)
    return shards.digests | digests


@dataclass
class _Shards:
    """Makes shards.

    Attributes:
        plan, backbone: of the cache.
        hidden: as `_captions` returns it.
        reduce: see `Backbone.start`.
        made: is told how many images are done.
        digests: SHA-256 of the shards that are complete.
    """

    plan: CachePlan
    backbone: Backbone
    hidden: torch.Tensor
    reduce: Reduce | None
    made: Callable[[int], None]
    digests: dict[Path, str] = field(default_factory=dict)

    def make(self, missing: dict[Path, torch.Tensor], wait: bool = False) -> None:
        """Make each shard that nobody else makes; with `wait`, those too whose maker has ended."""
        # On CUDA the device works on the next shard while one is written. Not while this process
        # waits for another one, which may in turn wait for the shard.
        ahead = 1 if self.plan.device.type == "cuda" and not wait else 0
        started = deque()
        with ExitStack() as claims:
            for file, part in missing.items():
                claim = _claim(file, wait)
                if claim is None:
                    continue
                claims.callback(claim.close)
                if digest := _digest(self.plan, file):  # by now
                    self._done(file, part, digest, claim)
                    continue
                started.append((file, part, claim, self._start(part)))
                if len(started) > ahead:
                    self._write(*started.popleft())
            while started:
                self._write(*started.popleft())

    def _start(self, part: torch.Tensor) -> Callable[[], dict[str, torch.Tensor]]:
        return self.backbone.start(
            self.plan.images[part],
            prompt_embedding=_embedding(self.plan, self.hidden, part),
            first=int(part[0]),
            every_caption=self.plan.meta["condition"] == "every-class",
            reduce=self.reduce,
            **pass_options(self.plan),
        )

    def _write(self, file: Path, part: torch.Tensor, claim: IO, features: Callable) -> None:
        plan = self.plan
        found = features()
        stored = {layer: values.half() for layer, values in found.items()}
        check_finite(
            stored,
            int(part[0]),
            "a value does not fit the cache's fp16 (above 65504); leave this layer out of "
            "diffusion.layers",
        )
        widths = [(layer, values.shape[-1]) for layer, values in stored.items()]
        about = {"cache": plan.id, "file": file.name, "widths": widths}
        stored = {layer: values.flatten(0, -2) for layer, values in stored.items()}
        self._done(file, part, save_tensors(file, stored, about, REMEDY), claim)

    def _done(self, file: Path, part: torch.Tensor, digest: str, claim: IO) -> None:
        self.digests[file] = digest
        claim.close()
        self.made(len(part))


def _claim(file: Path, wait: bool) -> IO | None:
    with write_errors(file, REMEDY):
        return lock(file.with_suffix(CLAIM), wait=wait)


def _embedding(plan: CachePlan, hidden: torch.Tensor, part: torch.Tensor) -> torch.Tensor | None:
    """What the U-Net attends to for these images; None: the backbone's empty caption."""
    if plan.meta["condition"] == "null":
        return None
    if plan.meta["condition"] == "own-class":
        return hidden[plan.labels[part].to(hidden.device)]
    return hidden


def _basis(
    plan: CachePlan, backbone: Backbone, hidden: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[Path, str]]:
    """The basis of the cache, fitted and written first if there is none; and its SHA-256 if it is
    a file of this cache.

    Raises:
        DataError: it is that of a cache that is not there.
    """
    file = plan.basis
    if file not in plan.files:
        try:
            return load_tensors(file)[0], {}
        except Damaged as error:
            raise DataError(f"{file} is damaged: {error}; {plan.remedy}") from None
    with _claim(file, wait=True):  # one process fits it
        if not _digest(plan, file):
            for shard in plan.shards:
                shard.unlink(missing_ok=True)  # what is there is in another basis
            count = len(plan.images)
            few = torch.arange(FITTED) * count // FITTED if count > FITTED else torch.arange(count)
            embedding = _embedding(plan, hidden, few)
            basis = fit_basis(backbone, plan.images[few], embedding, **pass_options(plan))
            save_tensors(file, basis, {"cache": plan.id, "file": file.name}, REMEDY)
        basis, _, digest = load_tensors(file)
    return basis, {file: digest}


def _announce(plan: CachePlan, backbone: Backbone, done: int, say: Say) -> None:
    """Say what will be computed and written, and of a longer job, how long it will take.

    Raises:
        DataError: it does not fit on the disk.
    """
    count, condition = len(plan.images), plan.meta["condition"]
    left = count - done
    if condition == "every-class":
        say(
            f"cost: each image has a U-Net pass under every class's caption, in all "
            f"{captions_per_image(plan) * left:,} passes; feddifrc.keys = class-mean avoids them"
        )
    needed, free = bytes_of(plan, backbone, left), shutil.disk_usage(plan.path).free
    if needed > free:
        raise DataError(
            f"the feature cache {plan.path} needs {format_bytes(needed)}, only "
            f"{format_bytes(free)} are free: {REMEDY}"
        )
    note = f", {done} of them already done" if done else ""
    size = format_bytes(bytes_of(plan, backbone, count))
    say(f"feature cache of {count} images{note}: {size} at {plan.path}")
    if condition == "own-class":
        say("each image has its own class's caption, so its features contain its label")
    say(backbone.memory())
    if left > LONG_PASSES * backbone.batch:
        seconds = seconds_of(plan, backbone, left)
        say(f"about {format_seconds(seconds)} by one process, measured on one pass")
