"""Batches: every image once, no batch of one, and what augmentation does to a whole batch."""

import pytest
import torch

from semanticfl_ref.data.batches import MARGIN, draw_crops, epoch_batches, network_input
from semanticfl_ref.randomness import generator


@pytest.mark.parametrize(
    "n, size, lengths",
    [
        (3, 64, [3]),
        (1, 64, [1]),
        (64, 64, [64]),
        (65, 64, [65]),
        (66, 64, [64, 2]),
        (129, 64, [64, 65]),
        (128, 64, [64, 64]),
        (3, 1, [1, 1, 1]),
        (3, 2, [3]),
    ],
)
def test_lengths(n, size, lengths):
    indices = torch.randperm(1000, generator=generator(0, "test"))[:n]
    batches = epoch_batches(indices, batch_size=size, generator=generator(0, "batches"))
    assert [len(batch) for batch in batches] == lengths
    assert torch.cat(batches).sort().values.equal(indices.sort().values)


def test_the_seed_decides():
    def order(epoch):
        source = generator(0, "batches", epoch=epoch)
        return torch.cat(epoch_batches(torch.arange(100), batch_size=8, generator=source))

    assert order(0).equal(order(0))
    assert not order(0).equal(order(1))


def test_network_input_equals_its_expression():
    images = torch.randint(0, 256, (5, 6, 4, 3), dtype=torch.uint8, generator=generator(0, "test"))
    x = network_input(images)
    expected = (images.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    assert x.dtype == torch.float32
    assert x.shape == (5, 3, 6, 4)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (x - expected).abs().max() < 1e-6
    assert network_input(images * 0 + 255).eq(1).all()


def test_every_augmented_image_is_its_own_flip_and_crop():
    images = torch.randint(0, 256, (64, 9, 8, 3), dtype=torch.uint8, generator=generator(0, "test"))
    kept = images.clone()
    x = network_input(images, draw_crops([torch.arange(64)], generator(0, "augment"))[0])
    pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert images.equal(kept)
    found = set()
    for image, augmented in zip(images, pixels, strict=True):
        padded = torch.zeros(9 + 2 * MARGIN, 8 + 2 * MARGIN, 3, dtype=torch.uint8)
        padded[MARGIN:-MARGIN, MARGIN:-MARGIN] = image
        crops = {
            (top, left): padded[top : top + 9, left : left + 8]
            for top in range(9)
            for left in range(9)
        }
        plain = [(*place, False) for place, crop in crops.items() if augmented.equal(crop)]
        flipped = [(*place, True) for place, crop in crops.items() if augmented.equal(crop.flip(1))]
        (how,) = plain + flipped
        found.add(how)
    assert len(found) > 45
    assert {top for top, _, _ in found} == set(range(9))
    assert 15 < sum(flipped for _, _, flipped in found) < 50


def test_the_global_generator_is_not_moved():
    before = torch.get_rng_state()
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    network_input(images, *draw_crops([torch.arange(4)], generator(0, "augment")))
    epoch_batches(torch.arange(9), batch_size=2, generator=generator(0, "batches"))
    assert torch.get_rng_state().equal(before)
