"""A small cache for the tests, its files, and what two caches have in common."""

import pytest
import torch

from semanticfl_ref.diffusion import extract

LABELS, NAMES = torch.arange(12) % 3, ("one", "two", "three")
RECIPE = {"layers": ("mid", "down.1"), "timestep": 50, "precision": "fp32"}


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != extract.LOCK}


def same(one, other) -> bool:
    return (
        one.widths == other.widths
        and torch.equal(one.text, other.text)
        and all(torch.equal(one.read(layer), other.read(layer)) for layer in one.widths)
    )


def no_extraction(monkeypatch):
    monkeypatch.setattr(extract, "_make", lambda *_: pytest.fail("the cache was made again"))
