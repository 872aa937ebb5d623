"""What corruptions do to pixels, by hand; and the data set as clients hold it."""

from dataclasses import replace

import pytest
import torch
from loading import load

from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.corruptions import apply_partition, corrupted
from semanticfl_ref.data.partition import CORRUPTIONS, make_partition
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

COLOUR = torch.tensor([200, 100, 40], dtype=torch.uint8)


def seen(corruption, images, seed=0):
    return corrupted(corruption, images, generator(seed, "test"))


def test_grey_by_hand():
    """0.299 * 200 + 0.587 * 100 + 0.114 * 40 = 123.06."""
    assert seen("grey", COLOUR.expand(2, 8, 8, 3))[0, 0, 0].tolist() == [123] * 3


def test_blur_by_hand():
    flat = COLOUR.expand(2, 8, 8, 3)
    assert seen("blur", flat).equal(flat), "nothing to lose"
    point = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    point[0, 4, 4] = 90
    blurred = seen("blur", point)
    assert blurred[0, 3:6, 3:6].unique().tolist() == [10]
    assert int(blurred.sum()) == 3 * 90


def test_low_resolution_by_hand():
    flat = COLOUR.expand(2, 8, 8, 3)
    assert seen("low resolution", flat).equal(flat), "nothing to lose"
    parity = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    board = (200 * parity).to(torch.uint8)[None, :, :, None].expand(1, 8, 8, 3)
    lost = seen("low resolution", board)
    assert lost.unique().tolist() == [100], "a pattern of single pixels is gone"


def test_colour_casts_by_hand():
    flat = COLOUR.expand(2, 8, 8, 3)
    casts = {tuple(seen("colour cast", flat, seed)[0, 0, 0].tolist()) for seed in range(40)}
    assert len(casts) == 6
    assert {(200, 75, 20), (100, 75, 40)} < casts


def test_noise_by_hand():
    noisy = seen("noise", torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)).float()
    assert abs(float(noisy.mean()) - 128) < 0.5
    assert abs(float(noisy.std()) - 25) < 0.5


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_repeat_and_change_a_copy(corruption):
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 9, 7, 3), dtype=torch.uint8, generator=source)
    before, first = images.clone(), seen(corruption, images)
    assert first.equal(seen(corruption, images))
    assert images.equal(before)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert not first.equal(images)
    assert seen(corruption, images[:0]).shape == (0, 9, 7, 3)


def test_unknown_corruption():
    with pytest.raises(UserError, match="unknown corruption 'blurr'; did you mean 'blur'"):
        seen("blurr", torch.zeros(1, 2, 2, 3, dtype=torch.uint8))


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def held(digits, **options):
    """The partition, and the data set and its partition as clients hold them."""
    settings = PartitionSettings(clients=5, alpha=1.0, held_out_share=0.3, **options)
    partition = make_partition(digits.train_labels, settings, classes=10, seed=0)
    return partition, *apply_partition(digits, partition, 0)


def test_nothing_to_apply(digits):
    partition, same, again = held(digits, modality="mixed")
    assert same is digits
    assert again is partition


def test_unused_images_are_left_out(digits):
    partition, tail, _ = held(digits, imbalance=10.0)
    assert tail.train_images.equal(digits.train_images[partition.used])
    assert tail.train_labels.equal(digits.train_labels[partition.used])
    assert tail.sha256 not in (digits.sha256, held(digits, imbalance=11.0)[1].sha256)


def test_the_data_set_as_held(digits):
    before = digits.train_images.clone()
    partition, shifted, inside = held(digits, imbalance=10.0, feature_shift="corruption")
    assert digits.train_images.equal(before), "the data set itself is not written"
    assert sorted(partition.corruptions) == sorted(CORRUPTIONS)
    for client, corruption in enumerate(partition.corruptions):
        here = torch.cat([inside.indices[client], inside.held_out[client]])
        there = torch.cat([partition.indices[client], partition.held_out[client]])
        source = generator(0, "camera", client=client)
        expected = corrupted(corruption, digits.train_images[there], source)
        assert shifted.train_images[here].equal(expected)
        assert shifted.train_labels[here].equal(digits.train_labels[there])
    for part in ("test_images", "test_labels", "validation_images"):
        assert getattr(shifted, part).equal(getattr(digits, part))
    tail = held(digits, imbalance=10.0)[1]
    assert shifted.sha256 not in (digits.sha256, tail.sha256)
    again = held(digits, imbalance=10.0, feature_shift="corruption")[1]
    assert again.sha256 == shifted.sha256
    assert replace(shifted, sha256="").name == "digits"


def test_published_results_name_this_hash(digits):
    """A change here changes every result with a feature shift."""
    shifted = held(digits, imbalance=10.0, feature_shift="corruption")[1]
    assert shifted.sha256.startswith("bd7fa3f4ae843c47")
