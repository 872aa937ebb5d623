"""Every scenario over its whole range, and what each rule promises.

A partition is disjoint and complete, gives every client the minimum, and is made in time; or it is
refused by name.
"""

import time

import pytest
import splitting
import torch

from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.partition import CORRUPTIONS, MODALITIES
from semanticfl_ref.data.scenarios import Assignment, equal_parts, long_tail, quantity
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

CIFAR100 = torch.arange(50_000) % 100
FIVE = torch.arange(400) % 5
COUNTS = (2, 50, 1000)
GRID = [
    *(
        (scenario, alpha, clients)
        for scenario in ("nid1", "quantity")
        for alpha in (1e-3, 1e3)
        for clients in COUNTS
    ),
    *(
        (scenario, 1.0, clients)
        for scenario in ("iid", "pathological", "extended")
        for clients in COUNTS
    ),
    ("nid2", 1.0, 6),
]


def split(scenario, labels=CIFAR100, *, classes=100, alpha=0.5, **options):
    return splitting.split(labels, scenario, classes=classes, alpha=alpha, **options)


@pytest.mark.parametrize("imbalance", [1.0, 100.0])
@pytest.mark.parametrize(("scenario", "alpha", "clients"), GRID)
def test_the_whole_range(scenario, alpha, clients, imbalance):
    k = 50 if clients == 2 else 10
    started = time.process_time()
    p = split(
        scenario,
        alpha=alpha,
        clients=clients,
        imbalance=imbalance,
        classes_per_client=k,
        feature_shift="corruption",
        modality="mixed",
    )
    assert time.process_time() - started < 2
    held = torch.cat(p.indices)
    assert len(held.unique()) == len(held), "disjoint"
    assert len(held) == len(p.used) == 50_000 - sum(p.dropped), "together all kept images"
    assert len(p.indices) == clients
    assert min(p.sizes) >= 2
    kept = [500 - dropped for dropped in p.dropped or [0] * 100]
    assert torch.tensor(p.histograms).sum(0).tolist() == kept
    if scenario == "pathological":
        assert {sum(n > 0 for n in row) for row in p.histograms} == {k}


def test_pathological_by_hand():
    """Five clients of two classes, of five classes of 60 images: ten shards of 30, two a class."""
    labels = torch.arange(300) % 5
    p = split("pathological", labels, clients=5, classes=5)
    assert [sorted(row) for row in p.histograms] == [[0, 0, 0, 30, 30]] * 5
    assert p.skew == pytest.approx(0.6)
    assert p.kl == pytest.approx(torch.tensor(2.5).log().item())
    pairs = {
        split("pathological", labels, clients=5, classes=5, seed=seed).histograms
        for seed in range(8)
    }
    assert len(pairs) > 4, "the seed decides who holds which classes"


def test_extended_is_dirichlet_among_the_holders_of_a_class():
    """Two classes a client; a large alpha shares a class evenly, a small one does not; a minimum
    is kept."""
    labels = torch.arange(3000) % 5
    options = {"clients": 5, "classes": 5}
    even = split("extended", labels, alpha=1e6, **options)
    assert [sorted(row)[:3] for row in even.histograms] == [[0, 0, 0]] * 5
    assert all(295 <= n <= 305 for row in even.histograms for n in row if n)
    skewed = split("extended", labels, alpha=0.5, **options)
    assert torch.tensor(skewed.histograms).sum(0).tolist() == [600] * 5
    assert max(sum(n > 0 for n in row) for row in skewed.histograms) == 2
    shares = [n / 600 for row in skewed.histograms for n in row if n]
    assert max(shares) - min(shares) > 0.2
    assert skewed.alpha == 0.5
    assert min(split("extended", labels, alpha=0.01, minimum=250, **options).sizes) >= 250
    with pytest.raises(UserError, match="scenario extended needs 3000 shards"):
        split("extended", labels[:10], classes=5, clients=3, classes_per_client=1000)


def test_pathological_cuts_large_classes_into_more_shards():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([400, 200, 100, 100]))
    p = split("pathological", labels, clients=8, classes=4, classes_per_client=1)
    assert sorted(p.sizes) == [100] * 8
    assert sorted(row.index(100) for row in p.histograms) == [0, 0, 0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"clients": 10},
            "needs 20 shards, 2 classes for each of 10 clients; these 50000 images of 100 classes "
            "allow 100",
        ),
        (
            {"clients": 50, "classes_per_client": 101},
            "needs 5050 shards, .* 5000: change --clients",
        ),
        (
            {
                "clients": 40,
                "labels": torch.arange(100) % 10,
                "classes": 10,
                "classes_per_client": 3,
            },
            "needs 120 shards",
        ),
    ],
)
def test_shards_that_do_not_come_out(options, words):
    with pytest.raises(UserError, match=words):
        split("pathological", **options)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1e3])
def test_equal_sizes_keep_the_skew(alpha):
    """Sizes differ by one at most; a client's labels are nearly those of the split without."""
    labels = torch.arange(5003) % 10
    plain = split("nid1", labels, alpha=alpha)
    p = split("nid1", labels, alpha=alpha, equal_sizes=True)
    assert set(p.sizes) == {500, 501}
    assert torch.cat(p.indices).sort().values.equal(torch.arange(5003))
    assert p.skew == pytest.approx(plain.skew, rel=0.35, abs=0.02)
    assert p.sha256 != plain.sha256


def test_equal_sizes_by_hand():
    """Clients of 30, 50 and 40 images one after the other, cut at 40 and 80."""
    assert len(set(torch.bincount(torch.tensor([0] * 30 + [1] * 50 + [2] * 40)).tolist())) == 3
    client_N = torch.tensor([0] * 30 + [1] * 50 + [2] * 40)
    equal = equal_parts(client_N, 3, generator(0, "test"))
    moved = torch.stack([torch.bincount(equal[client_N == m], minlength=3) for m in range(3)])
    assert moved.tolist() == [[30, 0, 0], [10, 40, 0], [0, 0, 40]]


def test_quantity_skews_sizes_and_not_labels():
    few = split("quantity", CIFAR100 % 10, classes=10, alpha=0.3)
    even = split("quantity", CIFAR100 % 10, classes=10, alpha=1e3)
    assert max(few.sizes) > 4 * sorted(few.sizes)[5]
    assert max(even.sizes) < 1.2 * min(even.sizes)
    large = [row for row, n in zip(few.histograms, few.sizes, strict=True) if n > 1000]
    assert len(large) > 3
    assert all(abs(n / sum(row) - 0.1) < 0.04 for row in large for n in row)
    assert few.manifest()["alpha"] == 0.3


def test_quantity_has_the_dirichlet_variance():
    """Shares of four clients: variance (1/4)(3/4) / (4 alpha + 1)."""
    assignment = Assignment(
        labels=torch.zeros(1000, dtype=torch.int64),
        classes=1,
        settings=PartitionSettings(clients=4, alpha=0.5),
        minimum=2,
        generator=generator(0, "test"),
    )
    counts = [torch.bincount(quantity(assignment), minlength=4) for _ in range(2000)]
    shares = torch.stack(counts).double() / 1000
    assert shares.mean(0).sub(0.25).abs().max() < 0.02
    assert shares.var(0).sub(0.1875 / 3).abs().max() < 0.006


def test_the_long_tail_by_hand():
    """Of 80 per class, five classes, factor 16: 80, 40, 20, 10, 5."""
    kept = long_tail(FIVE, 5, 16.0, generator(0, "test"))
    assert torch.bincount(FIVE[kept]).tolist() == [80, 40, 20, 10, 5]
    assert kept.equal(kept.unique())
    last = long_tail(FIVE, 5, 1e4, generator(0, "test"))
    assert torch.bincount(FIVE[last]).tolist()[-1] == 1, "no class is lost"


def test_the_long_tail_of_a_partition():
    p = split("iid", FIVE, classes=5, imbalance=16.0)
    assert p.dropped == (0, 40, 60, 70, 75)
    assert len(p.used) == 155
    other = split("nid1", FIVE, classes=5, imbalance=16.0)
    assert p.used.equal(other.used), "the tail is the seed's, whatever the scenario"
    words = "100 clients need at least 200 training images .* there are 155"
    with pytest.raises(UserError, match=words):
        split("iid", FIVE, classes=5, imbalance=16.0, clients=100)


def test_the_same_partition_of_the_used_images():
    p = split("nid1", FIVE, classes=5, imbalance=16.0, held_out_share=0.3)
    used, among = p.used, p.among_used()
    assert torch.cat([*among.indices, *among.held_out]).sort().values.equal(torch.arange(155))
    before, after = p.indices + p.held_out, among.indices + among.held_out
    for there, here in zip(before, after, strict=True):
        assert used[here].equal(there)
    assert among.sha256 == p.sha256
    trained = torch.cat(p.indices).sort().values
    assert p.trained.equal(trained)


def test_corruptions_and_modalities_go_in_turn():
    """Each as often as any other, independent of each other and of the partition."""
    plain = split("nid1", clients=20)
    p = split("nid1", clients=20, feature_shift="corruption", modality="mixed")
    assert p.sha256 == plain.sha256
    assert (plain.corruptions, plain.modalities) == ((), ())
    assert {p.corruptions.count(name) for name in CORRUPTIONS} == {4}
    assert {p.modalities.count(name) for name in MODALITIES} == {5}
    assert len(set(zip(p.corruptions, p.modalities, strict=True))) > 5
    other = split("nid1", clients=20, feature_shift="corruption", seed=1)
    assert p.corruptions != other.corruptions


def test_which_anchors_a_client_receives():
    plain = split("nid1", clients=20)
    p = split("nid1", clients=20, modality="mixed")
    received = {
        name: tuple(p.receives(p.modalities.index(name), kind) for kind in ("visual", "text"))
        for name in MODALITIES
    }
    assert received == {
        "visual and text": (True, True),
        "text": (False, True),
        "visual": (True, False),
        "neither": (False, False),
    }
    assert plain.receives(0, "visual")
    assert plain.receives(0, "text")


@pytest.mark.parametrize(
    ("scenario", "clients", "share", "digest"),
    [
        ("iid", 7, 0.0, "c5fa3e31d865db8b"),
        ("nid1", 10, 0.29, "468b4c6a86157ca7"),
        ("nid1", 100, 0.0, "3a38fc46afc8e08d"),
        ("nid2", 6, 0.0, "f8b542c95b8c6c60"),
    ],
)
def test_published_results_name_these_hashes(scenario, clients, share, digest):
    """A change here changes every result. (torch 2.11 ... 2.13)"""
    labels = torch.arange(1000) % 10
    options = {"clients": clients, "held_out_share": share, "alpha": 0.05, "seed": 3}
    assert split(scenario, labels, classes=10, **options).sha256.startswith(digest)


def test_natural_clients_are_the_data_sets_own():
    labels, natural_N = torch.arange(30) % 3, torch.arange(30) // 12
    own = {"natural_N": natural_N, "client_names": ("ann", "bob", "eve")}
    p = split("natural", labels, classes=3, clients=3, **own)
    assert p.manifest()["client_names"] == ["ann", "bob", "eve"]
    assert [held.tolist() for held in p.indices] == [
        list(range(12)),
        list(range(12, 24)),
        list(range(24, 30)),
    ]
    with pytest.raises(UserError, match="has 3 clients: use --clients 3"):
        split("natural", labels, classes=3, clients=2, **own)
    with pytest.raises(UserError, match="client 'eve' has 6 training images, fewer than"):
        split("natural", labels, classes=3, clients=3, **own, minimum=7)
    with pytest.raises(UserError, match=r"--set data\.clients_from says what does"):
        split("natural", labels, classes=3, clients=3)


def test_a_natural_client_may_not_vanish():
    """The last one too, whose images were all set aside."""
    own = {"natural_N": torch.arange(20) % 2, "client_names": ("ann", "bob", "eve")}
    with pytest.raises(UserError, match="client 'eve' has 0 training images"):
        split("natural", torch.arange(20) % 4, classes=4, clients=3, **own)
