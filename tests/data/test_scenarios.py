"""Every scenario over its whole range: disjoint, complete, nobody below the minimum, in time, or
refused by name; and what each rule promises.
"""

import time

import pytest
import torch

from semanticfl_ref.data.partition import CORRUPTIONS, MODALITIES, make_partition
from semanticfl_ref.data.scenarios import long_tail, quantity
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

CIFAR100 = torch.arange(50_000) % 100
GRID = [
    *(
        (scenario, alpha, clients)
        for scenario in ("nid1", "quantity")
        for alpha in (1e-3, 1e3)
        for clients in (2, 50, 1000)
    ),
    *(
        (scenario, 1.0, clients)
        for scenario in ("iid", "pathological")
        for clients in (2, 50, 1000)
    ),
    ("nid2", 1.0, 6),
]


def split(scenario, labels=CIFAR100, clients=10, classes=100, alpha=0.5, seed=0, **options):
    return make_partition(
        labels,
        scenario=scenario,
        clients=clients,
        classes=classes,
        alpha=alpha,
        seed=seed,
        **options,
    )


@pytest.mark.parametrize("imbalance", [1.0, 100.0])
@pytest.mark.parametrize(("scenario", "alpha", "clients"), GRID)
def test_the_whole_range(scenario, alpha, clients, imbalance):
    started = time.process_time()
    p = split(
        scenario,
        alpha=alpha,
        clients=clients,
        imbalance=imbalance,
        classes_per_client=50 if clients == 2 else 10,
        features="corruption",
        modality="mixed",
    )
    assert time.process_time() - started < 2
    held = torch.cat(p.indices)
    assert len(held.unique()) == len(held) == len(p.owned) == 50_000 - sum(p.dropped), (
        "disjoint, together all kept images"
    )
    assert len(p.indices) == clients and min(p.sizes) >= 2
    assert torch.tensor(p.histograms).sum(0).tolist() == [
        500 - lost for lost in p.dropped or [0] * 100
    ]
    if scenario == "pathological":
        assert {sum(n > 0 for n in row) for row in p.histograms} == {50 if clients == 2 else 10}


def test_pathological_by_hand():
    """Five clients, two classes each, of five classes of 60 images: ten shards of 30, two of each
    class.
    """
    p = split("pathological", labels=torch.arange(300) % 5, clients=5, classes=5)
    assert [sorted(row) for row in p.histograms] == [[0, 0, 0, 30, 30]] * 5
    assert p.skew == pytest.approx(0.6) and p.kl == pytest.approx(torch.tensor(2.5).log().item())
    pairs = {
        split(
            "pathological", labels=torch.arange(300) % 5, clients=5, classes=5, seed=seed
        ).histograms
        for seed in range(8)
    }
    assert len(pairs) > 4, "who holds which classes is drawn"


def test_pathological_cuts_large_classes_into_more_shards():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([400, 200, 100, 100]))
    p = split("pathological", labels=labels, clients=8, classes=4, classes_per_client=1)
    assert sorted(p.sizes) == [100] * 8 and sorted(row.index(100) for row in p.histograms) == [
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"clients": 10},
            "cuts 20 shards, 2 classes for each of 10 clients; these 50000 images of 100 classes allow 100",
        ),
        ({"clients": 50, "classes_per_client": 101}, "cuts 5050 shards, .* 5000: change --clients"),
        (
            {
                "clients": 40,
                "labels": torch.arange(100) % 10,
                "classes": 10,
                "classes_per_client": 3,
            },
            "cuts 120 shards",
        ),
    ],
)
def test_shards_that_do_not_come_out(options, words):
    with pytest.raises(UserError, match=words):
        split("pathological", **options)


def test_quantity_skews_sizes_and_not_labels():
    few, even = (
        split("quantity", classes=10, labels=CIFAR100 % 10, alpha=0.3),
        split("quantity", classes=10, labels=CIFAR100 % 10, alpha=1e3),
    )
    assert max(few.sizes) > 4 * sorted(few.sizes)[5] and max(even.sizes) < 1.2 * min(even.sizes)
    large = [row for row, n in zip(few.histograms, few.sizes, strict=True) if n > 1000]
    assert len(large) > 3 and all(abs(n / sum(row) - 0.1) < 0.04 for row in large for n in row)
    assert few.manifest()["alpha"] == 0.3


def test_quantity_has_the_dirichlet_variance():
    """Shares of four clients: variance (1/4)(3/4) / (4 alpha + 1)."""
    labels, source = torch.zeros(1000, dtype=torch.int64), generator(0, "test")
    shares = (
        torch.stack(
            [torch.bincount(quantity(labels, 4, 0.5, source), minlength=4) for _ in range(2000)]
        ).double()
        / 1000
    )
    assert (
        shares.mean(0).sub(0.25).abs().max() < 0.02
        and shares.var(0).sub(0.1875 / 3).abs().max() < 0.006
    )


def test_the_long_tail_by_hand():
    """Of 80 a class, five classes, factor 16: 80, 40, 20, 10, 5."""
    labels = torch.arange(400) % 5
    kept = long_tail(labels, 5, 16.0, generator(0, "test"))
    assert torch.bincount(labels[kept]).tolist() == [80, 40, 20, 10, 5] and kept.equal(
        kept.unique()
    )
    p = split("iid", labels=labels, classes=5, imbalance=16.0)
    assert p.dropped == (0, 40, 60, 70, 75) and len(p.owned) == 155
    assert p.owned.equal(split("nid1", labels=labels, classes=5, imbalance=16.0).owned), (
        "the tail is the seed's, whatever the scenario"
    )
    assert (
        torch.bincount(labels[long_tail(labels, 5, 1e4, generator(0, "test"))]).tolist()[-1] == 1
    ), "no class is lost"
    with pytest.raises(
        UserError, match="100 clients need at least 200 training images .* there are 155"
    ):
        split("iid", labels=labels, classes=5, imbalance=16.0, clients=100)


def test_the_same_split_in_a_data_set_of_the_owned_images():
    labels = torch.arange(400) % 5
    p = split("nid1", labels=labels, classes=5, imbalance=16.0, held_out_share=0.3)
    owned, among = p.owned, p.among_owned()
    assert torch.cat([*among.indices, *among.held_out]).sort().values.equal(torch.arange(155))
    for there, here in zip(p.indices + p.held_out, among.indices + among.held_out, strict=True):
        assert owned[here].equal(there)
    assert among.sha256 == p.sha256


def test_cameras_and_modalities_are_dealt_in_turn():
    """Each as often as any other, by draws of their own, and without a bearing on who holds what."""
    plain, p = (
        split("nid1", clients=20),
        split("nid1", clients=20, features="corruption", modality="mixed"),
    )
    assert p.sha256 == plain.sha256 and (plain.corruptions, plain.modalities) == ((), ())
    assert {p.corruptions.count(name) for name in CORRUPTIONS} == {4} and {
        p.modalities.count(name) for name in MODALITIES
    } == {5}
    assert len(set(zip(p.corruptions, p.modalities, strict=True))) > 5
    assert p.corruptions != split("nid1", clients=20, features="corruption", seed=1).corruptions
    told = {
        name: (p.gets(p.modalities.index(name), "visual"), p.gets(p.modalities.index(name), "text"))
        for name in MODALITIES
    }
    assert told == {
        "visual and text": (True, True),
        "text": (False, True),
        "visual": (True, False),
        "neither": (False, False),
    }
    assert plain.gets(0, "visual") and plain.gets(0, "text")


@pytest.mark.parametrize(
    ("scenario", "clients", "share", "digest"),
    [
        ("iid", 7, 0.0, "c5fa3e31d865db8b"),
        ("nid1", 10, 0.29, "468b4c6a86157ca7"),
        ("nid1", 100, 0.0, "3a38fc46afc8e08d"),
        ("nid2", 6, 0.0, "f8b542c95b8c6c60"),
    ],
)
def test_splits_stay_what_they_were(scenario, clients, share, digest):
    """Published results name these hashes: a change here changes every result. (torch 2.11 ...
    2.13)
    """
    assert split(
        scenario,
        labels=torch.arange(1000) % 10,
        classes=10,
        clients=clients,
        alpha=0.05,
        seed=3,
        held_out_share=share,
    ).sha256.startswith(digest)
