"""What corruptions do to pixels, by hand; and the data set as clients hold it."""

from dataclasses import replace

import pytest
import torch

from semanticfl_ref.data.corruptions import as_held, through
from semanticfl_ref.data.dataset import load_dataset
from semanticfl_ref.data.partition import CORRUPTIONS, make_partition
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

COLOUR = torch.tensor([200, 100, 40], dtype=torch.uint8)


def seen(corruption, images, seed=0):
    return through(corruption, images, generator(seed, "test"))


def test_cameras_by_hand():
    flat = COLOUR.expand(2, 8, 8, 3)
    assert (
        seen("grey", flat)[0, 0, 0].tolist() == [123] * 3
    )  # 0.299 * 200 + 0.587 * 100 + 0.114 * 40 = 123.06
    assert seen("blur", flat).equal(flat) and seen("low resolution", flat).equal(flat), (
        "nothing to lose"
    )
    casts = {tuple(seen("colour cast", flat, seed)[0, 0, 0].tolist()) for seed in range(40)}
    assert len(casts) == 6 and (200, 75, 20) in casts and (100, 75, 40) in casts
    noisy = seen("noise", torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)).float()
    assert abs(float(noisy.mean()) - 128) < 0.5 and abs(float(noisy.std()) - 25) < 0.5
    point = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    point[0, 4, 4] = 90
    assert (
        seen("blur", point)[0, 3:6, 3:6].unique().tolist() == [10]
        and int(seen("blur", point).sum()) == 3 * 90
    )
    board = (
        (torch.arange(8)[:, None] + torch.arange(8)[None])
        .remainder(2)
        .mul(200)
        .to(torch.uint8)[None, :, :, None]
        .expand(1, 8, 8, 3)
    )
    assert seen("low resolution", board).unique().tolist() == [100], (
        "a pattern of single pixels is gone"
    )


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_cameras_repeat_and_keep_their_hands_off(corruption):
    images = torch.randint(
        0, 256, (3, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    before, first = images.clone(), seen(corruption, images)
    assert first.equal(seen(corruption, images)) and images.equal(before)
    assert first.shape == images.shape and first.dtype == torch.uint8 and not first.equal(images)
    assert seen(corruption, images[:0]).shape == (0, 9, 7, 3)


def test_unknown_camera():
    with pytest.raises(UserError, match="unknown corruption 'blurr'; did you mean 'blur'"):
        seen("blurr", torch.zeros(1, 2, 2, 3, dtype=torch.uint8))


def test_the_data_set_as_held():
    digits = load_dataset("digits")

    def held(**options):
        p = make_partition(
            digits.train_labels,
            scenario="nid1",
            clients=5,
            classes=10,
            alpha=1.0,
            seed=0,
            held_out_share=0.3,
            **options,
        )
        return p, *as_held(digits, p, 0)

    p, same, q = held(modality="mixed")
    assert same is digits and q is p, "bit for bit the run without"
    p, tail, q = held(imbalance=10.0)
    assert tail.train_images.equal(digits.train_images[p.owned]) and tail.train_labels.equal(
        digits.train_labels[p.owned]
    )
    assert tail.sha256 not in (digits.sha256, held(imbalance=11.0)[1].sha256)
    before = digits.train_images.clone()
    p, shot, q = held(imbalance=10.0, features="corruption")
    assert digits.train_images.equal(before), "the data set itself is not written"
    assert sorted(p.corruptions) == sorted(CORRUPTIONS)
    for client, corruption in enumerate(p.corruptions):
        mine, theirs = (
            torch.cat([q.indices[client], q.held_out[client]]),
            torch.cat([p.indices[client], p.held_out[client]]),
        )
        assert shot.train_images[mine].equal(
            through(
                corruption, digits.train_images[theirs], generator(0, "corruption", client=client)
            )
        )
        assert shot.train_labels[mine].equal(digits.train_labels[theirs])
    for part in ("test_images", "test_labels", "validation_images"):
        assert getattr(shot, part).equal(getattr(digits, part))
    assert (
        shot.sha256 not in (digits.sha256, tail.sha256)
        and held(imbalance=10.0, features="corruption")[1].sha256 == shot.sha256
    )
    assert replace(shot, sha256="").name == "digits"
