"""Registers the data set `random-images` for `--import`: $BENCH_IMAGES random images, one for the
test."""

import os

import torch

from bench.contexts import random_images
from semanticfl_ref import register_dataset
from semanticfl_ref.data.dataset import Labelled, Parts


def read(options) -> Parts:
    """As many images as the variable says, of ten classes."""
    images = random_images(int(os.environ["BENCH_IMAGES"]))
    labels = torch.arange(len(images)) % 10
    return Parts(
        class_names=tuple("abcdefghij"),
        train=Labelled(images, labels),
        test=Labelled(images[:1], labels[:1]),
    )


register_dataset("random-images", read)
