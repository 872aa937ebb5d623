"""Clients that do not receive every kind of anchor: their terms, their bytes, what is left."""

from dataclasses import replace

import pytest
import torch
from quadratic import run_rounds

from semanticfl_ref.federated.metrics import communication_cost

TERMS = {
    "semanticfl": ("consistency", "contrast"),
    "feddifrc": ("noise_consistency", "text_contrast"),
}
ALL = {"federation__clients_per_round": 3}


def with_modalities(context, *names):
    return replace(context, partition=replace(context.partition, modalities=names))


@pytest.mark.parametrize("method", TERMS)
def test_without_anchors_it_is_fedavg_bitwise(small_context, method):
    def run(*modalities):
        context = small_context(federation__method=method, **ALL)
        return run_rounds(with_modalities(context, *modalities))

    plain, _ = run_rounds(small_context(federation__method="fedavg", **ALL))
    without, lines = run(*["neither"] * 3)
    assert torch.equal(without.params[: len(plain.params)], plain.params)
    assert set(lines[0]["terms"]) == {"cross_entropy"}
    with_all, _ = run(*["visual and text"] * 3)
    unset, _ = run()
    assert torch.equal(with_all.params, unset.params)
    assert not torch.equal(unset.params, without.params)


@pytest.mark.parametrize("method", TERMS)
def test_each_client_has_the_terms_and_the_bytes_of_its_anchors(small_context, method):
    """One client per context: 30 images, visual anchors of width 8, 3 text anchors of width 6."""
    visual, text = TERMS[method]
    expected = {
        "visual and text": ({visual, text}, 30 * 8 + 3 * 6),
        "visual": ({visual}, 30 * 8),
        "text": ({text}, 3 * 6),
        "neither": (set(), 0),
    }
    for name, (terms, values) in expected.items():
        context = with_modalities(
            small_context(
                federation__method=method, partition__clients=1, federation__clients_per_round=1
            ),
            name,
        )
        _, lines = run_rounds(context, 2)
        assert set(lines[0]["terms"]) == {"cross_entropy"} | terms
        model = sum(communication_cost(context)["down"].values())
        assert [line["bytes_down"] - model for line in lines] == [4 * values, 0], "sent once"


def test_a_mixed_federation_averages_all(small_context):
    """Every client's model counts, whatever it received: the mixed round differs from pure ones."""
    results = []
    for names in (
        ("visual", "text", "neither"),
        ("visual",) * 3,
        ("text",) * 3,
        ("neither",) * 3,
    ):
        context = with_modalities(small_context(federation__method="semanticfl", **ALL), *names)
        results.append(run_rounds(context, 1)[0].params)
    assert all(not torch.equal(results[0], other) for other in results[1:])
    assert all(torch.isfinite(params_P).all() for params_P in results)
