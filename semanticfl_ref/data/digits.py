"""The embedded data sets: UCI's handwritten digits, plain or as scenes.

Letters: N images.
"""

import hashlib
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
# Of each class; few to train on, as where a federation pays off.
SHARES = {"train": 0.25, "validation": 0.25, "test": 0.5}
# More than one where it only costs evaluation, for a less noisy accuracy.
SCENES_PER_DIGIT = {"train": 1, "validation": 2, "test": 1}
SEED = 20240  # of the split and of the scenes, which the run's seed does not affect


def read(options: ReadOptions) -> Parts:
    """1 797 digits as grey 32x32 images; or, as `digit-scenes`, the same digits in the same parts
    as scenes, with different random numbers for each part."""
    settings = options.settings
    if settings.dir or settings.sha256:
        raise UserError(
            f"{settings.name} is embedded in the package: leave out --data-dir and --data-sha256"
        )
    content = FILE.read_bytes() if FILE.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise DataError(f"{FILE} is missing or damaged: reinstall the package")
    stored = load(content)
    labels = stored["labels"].long()
    split = stratified(labels, tuple(SHARES.values()), generator(SEED, "digits-split"))
    parts = {}
    for part, indices in zip(SHARES, split, strict=True):
        masks = stored["masks"][indices]
        rendered = [plain(masks)]
        if settings.name == "digit-scenes":
            numbers = range(SCENES_PER_DIGIT[part])
            sources = [generator(SEED, f"digit-scenes-{part}", number) for number in numbers]
            rendered = [scenes(masks, source, light_on_dark=True) for source in sources]
        images = (torch.cat(rendered) * 255).round().to(torch.uint8)
        images = images.permute(0, 2, 3, 1).contiguous()
        parts[part] = Labelled(images, labels[indices].repeat(len(rendered)))
    return Parts(class_names=CLASS_NAMES, **parts)
