"""Makes a feature bank: every image once through the model, shard by shard to the disk, in memory
that does not grow with the images.

A killed extraction goes on behind its last whole shard, and ends with the same bytes. Two processes
that want the same bank take turns."""

import fcntl
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from semanticfl_ref.diffusion.bank import MANIFEST, SHARD, TEXT, Plan, finished, shard_files
from semanticfl_ref.diffusion.text import captions
from semanticfl_ref.diffusion.weights import fingerprint
from semanticfl_ref.errors import DataError, NonFiniteError
from semanticfl_ref.storage import (
    Damaged,
    canonical,
    digest,
    load_tensors,
    replace,
    save_tensors,
    writing,
)

REMEDY = "free space there, or set SEMANTICFL_CACHE to another folder"
LOCK = ".lock"


def build(
    wanted: Plan, say: Callable[[str], None], progress: bool = False, anew: bool = False
) -> None:
    """Make the bank, or what is missing of it.

    Args:
        say: takes one line about sizes. progress: a bar with speed and time to go on stderr.
        anew: throw away what is there.

    Raises:
        DataError: the cache cannot be written, or the model is damaged. NonFiniteError: names image
            and layer.
    """
    with writing(wanted.path, REMEDY):
        wanted.path.mkdir(parents=True, exist_ok=True)
        lock = open(wanted.path / LOCK, "a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making the feature bank {wanted.path}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if anew:
            with writing(wanted.path, REMEDY):
                for file in [
                    wanted.path / MANIFEST,
                    wanted.path / TEXT,
                    *shard_files(wanted),
                ]:  # the manifest first: what it names is gone next
                    file.unlink(missing_ok=True)
        if not finished(wanted):
            _make(wanted, say, progress)


def done_already(wanted: Plan) -> dict[Path, str]:
    """The whole files of an unfinished bank and their digests."""
    found = {}
    for first, file in enumerate([*shard_files(wanted), wanted.path / TEXT]):
        try:
            _, about, recorded = load_tensors(file)
        except (Damaged, DataError):
            continue
        if (about["bank"], about["first"]) == (
            wanted.id,
            first * SHARD if file.name != TEXT else 0,
        ):
            found[file] = recorded
    return found


def _make(wanted: Plan, say, progress: bool) -> None:
    files, text_file = shard_files(wanted), wanted.path / TEXT
    digests = done_already(wanted)
    if set(digests) != {*files, text_file}:
        hidden, text = _captions(wanted)
        if text_file not in digests:
            digests[text_file] = save_tensors(
                text_file, {"text": text}, {"bank": wanted.id, "first": 0}, REMEDY
            )
        missing = [file for file in files if file not in digests]
        if missing:
            _extract(wanted, hidden, missing, digests, say, progress)
    tensors, about, _ = load_tensors(files[0])
    widths = {tap: tensors[tap].shape[1] for tap in about["taps"]}
    manifest = {
        "id": wanted.id,
        "meta": wanted.meta,
        "widths": list(widths.items()),
        "files": {file.name: digests[file] for file in sorted(digests)},
    }
    replace(
        wanted.path / MANIFEST, canonical({**manifest, "sha256": digest(manifest)}) + "\n", REMEDY
    )


def _captions(wanted: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net attends to, float32 [1 or C, T, D], and the text anchors [C, D]; the text
    encoder is gone when this returns.
    """
    from semanticfl_ref.diffusion.text import TextEncoder

    prompts = captions(
        wanted.meta["prompt"], wanted.meta["class_names"]
    )  # a prompt without a place for the class is refused before anything is loaded
    if fingerprint(wanted.model) != wanted.meta["weights_sha256"]:
        raise DataError(
            f"the files of {wanted.model} changed, but not their times: delete {wanted.path.parent / 'weights.json'} and run again"
        )
    encoder = TextEncoder(wanted.model, wanted.device)
    hidden, text = encoder.encode(prompts)
    return (hidden if wanted.meta["condition"] == "own-class" else encoder.encode([""])[0]), text


def _extract(
    wanted: Plan,
    hidden: torch.Tensor,
    missing: list[Path],
    digests: dict[Path, str],
    say,
    progress: bool,
) -> None:
    """Write the missing shards and add their digests."""
    from semanticfl_ref.diffusion.backbone import Backbone

    meta, images = wanted.meta, wanted.images
    backbone = Backbone.load(
        wanted.model,
        taps=meta["taps"],
        device=wanted.device,
        precision=meta["precision"],
        offline=True,
    )
    assert SHARD % backbone.batch == 0, "a shard must end where a pass ends"
    widths = backbone.widths(meta["pool"])
    left = sum(length(wanted, file) for file in missing)
    _announce(wanted, left, 2 * sum(widths.values()), say)
    say(backbone.memory())
    with tqdm(
        total=len(images),
        initial=len(images) - left,
        desc="diffusion features",
        unit=" images",
        file=sys.stderr,
        disable=not progress,
    ) as bar:
        for file in missing:
            start, rows = SHARD * _number(file), []
            end = start + length(wanted, file)
            for first in range(start, end, backbone.batch):
                part = images[first : min(first + backbone.batch, end)]
                embedding = (
                    hidden[wanted.labels[first : first + len(part)].to(hidden.device)]
                    if meta["condition"] == "own-class"
                    else hidden[0]
                )
                options = {
                    key: meta[key] for key in ("timestep", "seed", "pool", "input_size", "latent")
                }
                rows.append(
                    _stored(
                        backbone.features(part, prompt_embedding=embedding, first=first, **options),
                        first,
                    )
                )
                bar.update(len(part))
            tensors = {tap: torch.cat([row[tap] for row in rows]) for tap in widths}
            digests[file] = save_tensors(
                file, tensors, {"bank": wanted.id, "first": start, "taps": list(widths)}, REMEDY
            )


def _announce(wanted: Plan, left: int, bytes_per_image: int, say) -> None:
    """Say what will be written, and refuse at once what cannot fit."""
    size, needed = bytes_per_image * len(wanted.images), bytes_per_image * left
    free = shutil.disk_usage(wanted.path).free
    if needed > free:
        raise DataError(
            f"the feature bank {wanted.path} needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free: {REMEDY}"
        )
    gone = f", {len(wanted.images) - left} of them done before" if left < len(wanted.images) else ""
    conditioned = (
        "; each image under its own class's caption: its label is written into its features"
        if wanted.meta["condition"] == "own-class"
        else ""
    )
    say(
        f"feature bank of {len(wanted.images)} images{gone}: {size / 2**20:.1f} MiB at {wanted.path}{conditioned}"
    )


def _stored(features: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    """float32 features as the bank keeps them, fp16."""
    for tap, values in features.items():
        bad = (~values.half().isfinite().all(1)).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"image {first + int(bad[0])}, tap {tap}: {values.abs().max():.3g} does not fit the bank's fp16; leave this tap out"
            )
    return {tap: values.half() for tap, values in features.items()}


def _number(file: Path) -> int:
    return int(file.stem.removeprefix("shard-"))


def length(wanted: Plan, file: Path) -> int:
    """How many images a shard holds."""
    return min(SHARD, len(wanted.images) - SHARD * _number(file))
