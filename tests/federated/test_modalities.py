"""Clients that are not sent every kind of anchor: their terms, their bytes, and what is left of the
method.
"""

from dataclasses import replace

import pytest
import torch
from quadratic import play

from semanticfl_ref.federated.metrics import row_bytes

TERMS = {
    "semanticfl": ("consistency", "contrast"),
    "feddifrc": ("noise_consistency", "text_contrast"),
}
ALL = {"federation__clients_per_round": 3}


def with_modalities(context, *names):
    return replace(context, partition=replace(context.partition, modalities=names))


@pytest.mark.parametrize("method", TERMS)
def test_without_anchors_it_is_fedavg_bit_for_bit(small_context, method):
    plain, _ = play(small_context(federation__method="fedavg", **ALL), 2)
    nobody, lines = play(
        with_modalities(small_context(federation__method=method, **ALL), *["neither"] * 3), 2
    )
    assert torch.equal(nobody.row[: len(plain.row)], plain.row) and set(lines[0]["terms"]) == {
        "cross_entropy"
    }
    everybody, _ = play(
        with_modalities(small_context(federation__method=method, **ALL), *["visual and text"] * 3),
        2,
    )
    untold, _ = play(small_context(federation__method=method, **ALL), 2)
    assert torch.equal(everybody.row, untold.row) and not torch.equal(untold.row, nobody.row)


@pytest.mark.parametrize("method", TERMS)
def test_each_client_has_the_terms_and_the_bytes_of_its_anchors(small_context, method):
    """One client a context: 30 images, visual anchors of 8 entries, 3 text anchors of 6."""
    one = {
        "federation__method": method,
        "partition__clients": 1,
        "federation__clients_per_round": 1,
    }
    visual, text = TERMS[method]
    for name, terms, entries in (
        ("visual and text", {visual, text}, 30 * 8 + 3 * 6),
        ("visual", {visual}, 30 * 8),
        ("text", {text}, 3 * 6),
        ("neither", set(), 0),
    ):
        context = with_modalities(small_context(**one), name)
        _, lines = play(context, 2)
        assert set(lines[0]["terms"]) == {"cross_entropy"} | terms
        assert [
            line["bytes_down"] - sum(row_bytes(context)["down"].values()) for line in lines
        ] == [
            4 * entries,
            0,
        ], "anchors are sent once"


def test_a_mixed_federation_averages_all(small_context):
    """Every client's row counts, whatever it was sent: the mixed round differs from each pure one."""
    rows = [
        play(with_modalities(small_context(federation__method="semanticfl", **ALL), *names), 1)[
            0
        ].row
        for names in (
            ("visual", "text", "neither"),
            ("visual",) * 3,
            ("text",) * 3,
            ("neither",) * 3,
        )
    ]
    assert all(not torch.equal(rows[0], other) for other in rows[1:]) and all(
        torch.isfinite(row).all() for row in rows
    )
