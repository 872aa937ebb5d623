"""Synthetic images: the same in every run, of CIFAR's shape, with classes that differ."""

import pytest
import torch

from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.data.dataset import load_dataset
from semanticfl_ref.errors import UserError


def test_a_linear_rule_learned_on_the_training_images_reads_the_test_images():
    data = load_dataset(DataSettings(name="synthetic"), seed=0)
    assert data.train_images.shape == (5_000, 32, 32, 3)
    assert data.train_images.float().std() > 30
    means = torch.stack(
        [data.train_images[data.train_labels == c].float().mean(0).flatten() for c in range(10)]
    )
    distances = torch.cdist(data.test_images.float().flatten(1), means)
    assert (distances.argmin(1) == data.test_labels).double().mean() > 0.99
    pixel = data.train_images[:, 5, 5].float()
    nearest = torch.cdist(pixel, means.view(10, 32, 32, 3)[:, 5, 5]).argmin(1)
    assert (nearest == data.train_labels).double().mean() < 0.8, "one pixel is not enough"
    assert load_dataset(DataSettings(name="synthetic"), seed=1).sha256 == data.sha256


def test_it_has_no_files():
    with pytest.raises(UserError, match="synthetic is computed: leave out --data-dir"):
        load_dataset(DataSettings(name="synthetic", dir="somewhere"))
