"""The embedded data sets: UCI's handwritten digits, plain or as scenes.

Letters: N images.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load

from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, stratified
from semanticfl_ref.data.scenes import plain, scenes
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.randomness import generator

FILE = Path(__file__).parent / "assets" / "digits.safetensors"
SHA256 = "a30e67a092a3d97f0abfb32a3b1bb85d96a99e6b66794d351b29f17a6566f5c7"
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of each class: train, validation, test. Few to train on, as where federations are worth it.
SHARES = (0.25, 0.25, 0.5)
SEED = 20240  # of the split and of the scenes; the run's seed does not move them
# Scenes per digit: more where they only cost evaluation, for a less noisy accuracy.
VALIDATION_SCENES = {"validation": 2}


def read_digits(options: ReadOptions) -> Parts:
    """The digits as grey 32x32 images."""
    return _read(options, lambda masks, part, repeat: plain(masks), repeats={})


def read_scenes(options: ReadOptions) -> Parts:
    """The digits as scenes; every part has its own generators."""

    def draw(masks: torch.Tensor, part: str, repeat: int) -> torch.Tensor:
        source = generator(SEED, f"digit-scenes-{part}", repeat)
        return scenes(masks, source, light_on_dark=True)

    return _read(options, draw, repeats=VALIDATION_SCENES)


def _read(
    options: ReadOptions,
    draw: Callable[[torch.Tensor, str, int], torch.Tensor],
    repeats: dict[str, int],
) -> Parts:
    """Both data sets: the same digits in the same parts, drawn as float [N, 3, 32, 32]."""
    if options.settings.dir or options.settings.sha256:
        raise UserError(
            f"{options.settings.name} is embedded in the package: leave out --data-dir and "
            f"--data-sha256"
        )
    content = FILE.read_bytes() if FILE.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise DataError(f"{FILE} is missing or damaged: reinstall the package")
    stored = load(content)
    masks, labels = stored["masks"], stored["labels"].long()
    split = stratified(labels, SHARES, generator(SEED, "digits-split"))
    parts = {}
    for part, index in zip(("train", "validation", "test"), split, strict=True):
        count = repeats.get(part, 1)
        drawn = [draw(masks[index], part, repeat) for repeat in range(count)]
        images = (torch.cat(drawn) * 255).round().to(torch.uint8)
        images = images.permute(0, 2, 3, 1).contiguous()
        parts[part] = Labelled(images, labels[index].repeat(count))
    return Parts(class_names=CLASS_NAMES, **parts)
