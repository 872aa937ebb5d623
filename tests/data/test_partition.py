"""Splits over clients: complete, disjoint, bounded, repeatable; refusals by name."""

import json

import pytest
import torch

from semanticfl_ref.data.partition import SCENARIOS, describe, make_partition
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

LABELS = torch.arange(1000) % 10


def split(scenario="nid1", labels=LABELS, clients=10, classes=10, alpha=0.3, seed=0, **options):
    return make_partition(
        labels,
        scenario=scenario,
        clients=clients,
        classes=classes,
        alpha=alpha,
        seed=seed,
        **options,
    )


@pytest.mark.parametrize(
    "scenario, clients",
    [("iid", 1), ("iid", 7), ("nid1", 1), ("nid1", 10), ("nid1", 500), ("nid2", 6)],
)
@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.3, 1e6])
def test_complete_disjoint_repeatable(scenario, clients, alpha):
    p = split(scenario, clients=clients, alpha=alpha)
    assert torch.cat(p.indices).sort().values.equal(torch.arange(1000))
    assert all(i.dtype == torch.int64 and i.equal(i.sort().values) for i in p.indices)
    assert p.sizes == tuple(len(i) for i in p.indices) and min(p.sizes) >= 2
    assert [list(row) for row in p.histograms] == [
        LABELS[i].bincount(minlength=10).tolist() for i in p.indices
    ]
    again, other = (
        split(scenario, clients=clients, alpha=alpha),
        split(scenario, clients=clients, alpha=alpha, seed=1),
    )
    assert p.sha256 == again.sha256 and (clients == 1 or p.sha256 != other.sha256)
    assert 0 <= p.skew <= 1
    json.dumps(p.manifest())


def test_the_global_generator_is_not_moved():
    before = torch.get_rng_state()
    for scenario in SCENARIOS:
        split(scenario, clients=6)
    assert torch.get_rng_state().equal(before)


def test_iid_sizes_differ_by_one():
    assert sorted(set(split("iid", clients=7).sizes)) == [142, 143]


def test_skew_falls_with_alpha():
    skews = [
        sum(split(alpha=alpha, seed=seed).skew for seed in range(5)) / 5
        for alpha in (0.01, 0.1, 1.0, 100.0)
    ]
    assert skews == sorted(skews, reverse=True) and skews[0] > 0.75 and skews[-1] < 0.1


def test_skew_by_hand():
    """Two clients of two classes, fully apart: each is at distance 1/2 from the even distribution."""
    p = split("nid1", labels=torch.tensor([0] * 50 + [1] * 50), clients=2, classes=2, alpha=1e-6)
    assert sorted(p.histograms) == [(0, 50), (50, 0)] and p.skew == pytest.approx(0.5)


def test_dirichlet_draws_have_the_right_mean_and_variance():
    from semanticfl_ref.data.scenarios import _log_gamma_draws

    for alpha in (0.05, 0.5, 5.0):
        source = generator(0, "test")
        draws = torch.stack([_log_gamma_draws(alpha, 4, source).softmax(0) for _ in range(8000)])
        assert draws.mean(0).sub(0.25).abs().max() < 0.02
        assert draws.var(0).sub(0.25 * 0.75 / (4 * alpha + 1)).abs().max() < 0.01


def test_nid1_leaves_no_giant():
    """A client at N / M gets no further class: it ends below N / M plus one class."""
    for seed in range(10):
        assert max(split(alpha=0.05, seed=seed).sizes) <= 100 + 100


def test_repair_gives_everybody_the_minimum():
    p = split(labels=LABELS[:200], clients=100, alpha=0.01, minimum=2)
    assert p.sizes == (2,) * 100
    assert min(split(clients=50, alpha=0.01, minimum=15).sizes) == 15


def test_nid2():
    p = split("nid2", clients=6)
    held = [{c for c in range(10) if row[c]} for row in p.histograms]
    assert held == [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, set(range(10))]
    assert max(p.sizes) - min(p.sizes) <= 10
    labels = torch.arange(6000) % 100
    p = split("nid2", labels=labels, clients=6, classes=100)
    assert [sum(n > 0 for n in row) for row in p.histograms] == [20] * 5 + [100]


def test_many_clients_is_quick():
    labels = torch.arange(50_000) % 100
    p = split(labels=labels, clients=10_000, classes=100, alpha=0.1)
    assert min(p.sizes) >= 2


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scenario": "nid3"}, "unknown scenario 'nid3'; did you mean"),
        ({"alpha": 0.0}, "partition.alpha = 0.0"),
        ({"alpha": -1.0}, "partition.alpha"),
        ({"alpha": float("nan")}, "partition.alpha"),
        ({"alpha": float("inf")}, "partition.alpha"),
        ({"clients": 0}, "at least one client"),
        ({"clients": 501}, "501 clients need at least 1002 training images .* there are 1000"),
        ({"labels": LABELS[:0]}, "there are 0"),
        ({"scenario": "nid2", "clients": 10}, "6 clients .* not 10: use --clients 6"),
        (
            {"scenario": "nid2", "clients": 6, "classes": 4, "labels": LABELS % 4},
            "this data set has 4 classes",
        ),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words):
        split(**options)


def test_describe():
    text = describe(split("nid2", clients=6), tuple("abcdefghij"))
    assert (
        text.splitlines()[0].startswith("nid2, seed 0: 1000 images, 6 clients, skew 0.66")
        and "a 83, b 83" in text
    )
    assert "alpha 0.3" in describe(split(), tuple("abcdefghij"))


def test_what_clients_keep_for_a_test_of_their_own():
    whole, p = split(alpha=0.3), split(alpha=0.3, held_out_share=0.29)
    for all_of_it, trains, keeps in zip(whole.indices, p.indices, p.held_out, strict=True):
        assert torch.cat([trains, keeps]).sort().values.equal(all_of_it)
        assert len(keeps) == len(all_of_it) * 29 // 100
    assert p.sizes == tuple(len(i) for i in p.indices) and p.sha256 != whole.sha256
    assert [list(row) for row in p.histograms] == [
        LABELS[i].bincount(minlength=10).tolist() for i in p.indices
    ]
    assert p.manifest()["held_out_sizes"] == [len(i) for i in p.held_out] and not any(
        len(i) for i in whole.held_out
    )
