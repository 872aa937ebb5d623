"""The data sets digit-scenes-100, -225, -450 and -900: the embedded scenes with other label counts.

    python -m semanticfl_ref train --import scripts/more_labels.py --dataset digit-scenes-900

The first three take a share of each class of the training part. The last one trains on the
validation part's digits too, one scene of each, and has no validation part. All keep the test part.
"""

from dataclasses import replace

import torch

from semanticfl_ref import register_dataset
from semanticfl_ref.config.presets import EMBEDDED
from semanticfl_ref.data import digits
from semanticfl_ref.data.dataset import Labelled, Parts, ReadOptions, stratified
from semanticfl_ref.randomness import generator

COUNTS = (100, 225, 450, 900)


def reader(count: int):
    """A function that reads the digits with about `count` training images."""

    def read(options: ReadOptions) -> Parts:
        settings = replace(options.settings, name="digit-scenes")
        parts = digits.read(replace(options, settings=settings))
        train, validation = parts.train, parts.validation
        if count > len(train.labels):
            second = len(validation.labels) // 2  # validation has two scenes of each digit
            more = validation.subset(torch.arange(second))
            both = map(torch.cat, zip(train[:2], more[:2], strict=True))
            return replace(parts, train=Labelled(*both), validation=train.subset(torch.arange(0)))
        share = count / len(train.labels)
        kept, _ = stratified(train.labels, (share, 1 - share), generator(0, "more-labels"))
        return replace(parts, train=train.subset(kept))

    return read


for number in COUNTS:
    register_dataset(f"digit-scenes-{number}", reader(number), EMBEDDED)
