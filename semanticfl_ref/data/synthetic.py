"""Synthetic images of CIFAR's shape, for dry runs and benchmarks: classes that can be learned.

Letters: N images.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

CLASSES, SIDE, CELLS = 10, 32, 4
COUNTS = {"train": 5_000, "test": 1_000}
NOISE = 0.5  # standard deviation beside the patterns' 1
SEED = 20241  # of the images, which the run's seed does not affect


def read(options: ReadOptions) -> Parts:
    """Ten classes, each a smooth random pattern of colours, under pixel noise."""
    settings = options.settings
    if settings.dir or settings.sha256:
        raise UserError("synthetic is computed: leave out --data-dir and --data-sha256")
    source = generator(SEED, "synthetic-patterns")
    cells = torch.randn(CLASSES, 3, CELLS, CELLS, generator=source)
    patterns = F.interpolate(cells, size=(SIDE, SIDE), mode="bilinear")
    parts = {}
    for part, count in COUNTS.items():
        source = generator(SEED, f"synthetic-{part}")
        labels = torch.arange(count) % CLASSES
        noise = torch.randn(count, 3, SIDE, SIDE, generator=source)
        images = (patterns[labels] + NOISE * noise) * 40 + 127.5
        images = images.round().clamp(0, 255).to(torch.uint8)
        parts[part] = Labelled(images.permute(0, 2, 3, 1).contiguous(), labels)
    names = tuple(f"pattern {number}" for number in range(CLASSES))
    return Parts(class_names=names, **parts)
