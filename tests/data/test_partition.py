"""Partitions: complete, disjoint, bounded, repeatable; refusals by name; scenarios from outside."""

import json

import pytest
import torch
from splitting import split

from semanticfl_ref.config.registry import SCENARIOS, register_scenario
from semanticfl_ref.data.scenarios import _log_gamma_samples
from semanticfl_ref.errors import UserError
from semanticfl_ref.randomness import generator

LABELS = torch.arange(1000) % 10


def histograms(indices, labels=LABELS, classes=10) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(labels[own].bincount(minlength=classes).tolist()) for own in indices)


@pytest.mark.parametrize(
    "scenario, clients",
    [("iid", 1), ("iid", 7), ("nid1", 1), ("nid1", 10), ("nid1", 500), ("nid2", 6)],
)
@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.3, 1e6])
def test_complete_disjoint_repeatable(scenario, clients, alpha):
    p = split(LABELS, scenario, clients=clients, alpha=alpha)
    assert torch.cat(p.indices).sort().values.equal(torch.arange(1000))
    assert all(own.dtype == torch.int64 and own.equal(own.sort().values) for own in p.indices)
    assert p.sizes == tuple(len(own) for own in p.indices)
    assert min(p.sizes) >= 2
    assert p.histograms == histograms(p.indices)
    again = split(LABELS, scenario, clients=clients, alpha=alpha)
    other = split(LABELS, scenario, clients=clients, alpha=alpha, seed=1)
    assert p.sha256 == again.sha256
    assert clients == 1 or p.sha256 != other.sha256
    assert 0 <= p.skew <= 1
    json.dumps(p.manifest())


def test_the_manifest_is_json():
    options = {"clients": 4, "imbalance": 5.0, "modality": "mixed", "feature_shift": "corruption"}
    p = split(LABELS, held_out_share=0.2, alpha=0.3, **options)
    manifest = p.manifest()
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["alpha"] == 0.3
    assert manifest["clients"] == 4
    assert manifest["sizes"] == list(p.sizes)
    assert manifest["histograms"] == [list(row) for row in p.histograms]
    assert manifest["held_out_sizes"] == [len(own) for own in p.held_out]
    for name in ("dropped", "corruptions", "modalities"):
        assert manifest[name] == list(getattr(p, name)) != []
    for name in ("scenario", "seed", "skew", "kl", "sha256"):
        assert manifest[name] == getattr(p, name)
    assert len(manifest) == 14
    assert split(LABELS, "iid", alpha=0.3).manifest()["alpha"] is None


def test_the_global_generator_is_not_moved():
    before = torch.get_rng_state()
    for scenario in set(SCENARIOS) - {"natural"}:
        split(LABELS, scenario, clients=6)
    assert torch.get_rng_state().equal(before)


def test_iid_sizes_differ_by_one():
    assert sorted(set(split(LABELS, "iid", clients=7).sizes)) == [142, 143]


def test_skew_falls_with_alpha():
    skews = [
        sum(split(LABELS, alpha=alpha, seed=seed).skew for seed in range(5)) / 5
        for alpha in (0.01, 0.1, 1.0, 100.0)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.75
    assert skews[-1] < 0.1


def test_skew_by_hand():
    """Two clients of two classes, fully apart: each is at distance 1/2 from the global mix."""
    p = split(torch.tensor([0] * 50 + [1] * 50), clients=2, classes=2, alpha=1e-6)
    assert sorted(p.histograms) == [(0, 50), (50, 0)]
    assert p.skew == pytest.approx(0.5)


def test_dirichlet_samples_have_the_right_mean_and_variance():
    for alpha in (0.05, 0.5, 5.0):
        source = generator(0, "test")
        shares = [_log_gamma_samples(alpha, 4, source).softmax(0) for _ in range(8000)]
        shares = torch.stack(shares)
        assert shares.mean(0).sub(0.25).abs().max() < 0.02
        assert shares.var(0).sub(0.25 * 0.75 / (4 * alpha + 1)).abs().max() < 0.01


def test_nid1_leaves_no_giant():
    """A client at N / M gets no further class: it ends below N / M plus one class."""
    for seed in range(10):
        assert max(split(LABELS, alpha=0.05, seed=seed).sizes) <= 100 + 100


def test_repair_gives_every_client_the_minimum():
    p = split(LABELS[:200], clients=100, alpha=0.01, minimum=2)
    assert p.sizes == (2,) * 100
    assert min(split(LABELS, clients=50, alpha=0.01, minimum=15).sizes) == 15


def test_nid2():
    p = split(LABELS, "nid2", clients=6)
    held = [{c for c in range(10) if row[c]} for row in p.histograms]
    assert held == [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, set(range(10))]
    assert max(p.sizes) - min(p.sizes) <= 10
    p = split(torch.arange(6000) % 100, "nid2", clients=6, classes=100)
    assert [sum(n > 0 for n in row) for row in p.histograms] == [20] * 5 + [100]


def test_many_clients_is_quick():
    labels = torch.arange(50_000) % 100
    p = split(labels, clients=10_000, classes=100, alpha=0.1)
    assert min(p.sizes) >= 2


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scenario": "nid3"}, "unknown partition.scenario 'nid3'; did you mean"),
        ({"alpha": 0.0}, "partition.alpha = 0.0"),
        ({"alpha": -1.0}, "partition.alpha"),
        ({"alpha": 0.9e-6}, "partition.alpha"),
        ({"alpha": 1.1e6}, "partition.alpha"),
        ({"alpha": float("nan")}, "partition.alpha"),
        ({"alpha": float("inf")}, "partition.alpha"),
        ({"clients": 0}, "partition.clients = 0: must be at least 1"),
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
        split(**{"labels": LABELS, **options})


def test_the_clients_own_test_sets():
    whole = split(LABELS, alpha=0.3)
    p = split(LABELS, alpha=0.3, held_out_share=0.29)
    for everything, trained, kept in zip(whole.indices, p.indices, p.held_out, strict=True):
        assert torch.cat([trained, kept]).sort().values.equal(everything)
        assert len(kept) == len(everything) * 29 // 100
        assert kept.equal(kept.sort().values)
    assert p.sizes == tuple(len(own) for own in p.indices)
    assert p.sha256 != whole.sha256
    assert p.histograms == histograms(p.indices)
    assert p.manifest()["held_out_sizes"] == [len(own) for own in p.held_out]
    assert not any(len(own) for own in whole.held_out)


@pytest.fixture
def scenario():
    """`scenario(assign)` registers a scenario "mine" until the end of the test."""
    yield lambda assign: register_scenario("mine", assign)
    SCENARIOS.entries.pop("mine")


def test_a_scenario_from_outside(scenario):
    """Odd classes go to the first client, even ones to the second, in the order of the seed."""
    given = []

    def assign(a) -> torch.Tensor:
        given.append(a)
        order = torch.randperm(len(a.labels), generator=a.generator)
        client_N = (a.labels + 1) % 2
        client_N[order[:10]] = 2
        return client_N

    scenario(assign)
    p = split(LABELS, "mine", clients=4, seed=5, imbalance=2.0, held_out_share=0.1)
    assert p.scenario == "mine"
    assert p.manifest()["alpha"] is None
    assert sum(len(own) for own in p.held_out) + sum(p.sizes) + sum(p.dropped) == 1000
    assert {c for c in range(10) if p.histograms[0][c]} <= {1, 3, 5, 7, 9} | {
        c for c in range(10) if p.histograms[3][c]
    }
    assert len(p.indices[2]) + len(p.held_out[2]) == 10
    assert p.sizes[3] == 2, "a client that it forgets gets the minimum"
    assert (given[0].clients, given[0].classes, given[0].minimum) == (4, 10, 2)
    assert given[0].settings.imbalance == 2.0
    again = split(LABELS, "mine", clients=4, seed=5, imbalance=2.0, held_out_share=0.1)
    assert again.sha256 == p.sha256
    assert split(LABELS, "mine", clients=4, seed=6, imbalance=2.0).sha256 != p.sha256
    with pytest.raises(UserError, match="already registered"):
        register_scenario("mine", assign)


@pytest.mark.parametrize(
    "assign",
    [
        lambda a: a.labels[1:] % 2,
        lambda a: (a.labels % 2).int(),
        lambda a: (a.labels % 2).double(),
        lambda a: a.labels % 2 - 1,
        lambda a: a.labels % 2 + 9,
        lambda a: (a.labels % 2)[:, None],
    ],
)
def test_a_scenario_that_returns_something_else(scenario, assign):
    scenario(assign)
    with pytest.raises(UserError, match=r"'mine' must return .* int64 \[1000\] in 0 ... 9; it"):
        split(LABELS, "mine")
