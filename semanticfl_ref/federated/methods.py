"""The table of methods: what each adds to the local loss, and how it weighs the clients.

A method is a frozen dataclass of functions; to add one is to add an entry to `METHODS`.
Letters: B batch, C classes, D feature width, K clients in the round.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from semanticfl_ref.config import Semantic
from semanticfl_ref.federated.losses import consistency, contrast
from semanticfl_ref.federated.model import ResNet10

Terms = dict[str, tuple[float, torch.Tensor]]  # name -> (weight, unweighted value)


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What a local term may look at: one batch of one client, after the model's forward pass.

    Attributes:
        model: the client's model in training.
        features_BD: float32 [B, D].
        labels_B: int64 [B].
        visual_BD: float32 [B, width of a visual anchor], this batch's anchors; None for a method without.
        text_CD: float32 [C, width of a text anchor]; None for a method without.
        options: SemanticFL's settings.
    """

    model: ResNet10
    features_BD: torch.Tensor
    labels_B: torch.Tensor
    visual_BD: torch.Tensor | None
    text_CD: torch.Tensor | None
    options: Semantic


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated method.

    Attributes:
        needs_anchors: whether the server makes and sends anchors.
        local_terms: what is added to cross-entropy.
        weights: sample counts [K] -> aggregation weights [K], not normalised.
    """

    needs_anchors: bool
    local_terms: Callable[[LocalBatch], Terms]
    weights: Callable[[torch.Tensor], torch.Tensor]


def by_sample_count(counts_K: torch.Tensor) -> torch.Tensor:
    """w_k = n_k. Source: FedAvg (McMahan et al. 2017)."""
    return counts_K.double()


def no_terms(batch: LocalBatch) -> Terms:
    """FedAvg: cross-entropy alone."""
    return {}


def semantic_terms(batch: LocalBatch) -> Terms:
    """SemanticFL: lambda_kd * consistency + lambda_con * InfoNCE. A term of weight zero is not computed.

    Source: arXiv 2603.19337 (objective and weights as summarised second-hand). With both weights zero this is FedAvg.
    """
    o, terms = batch.options, {}
    if o.lambda_kd > 0:
        seen_BD = batch.features_BD if batch.model.visual_head is None else batch.model.visual_head(batch.features_BD)
        terms["consistency"] = (o.lambda_kd, consistency(seen_BD, batch.visual_BD, o.consistency, o.kd_temperature, o.kd_squared))
    if o.lambda_con > 0:
        terms["contrast"] = (o.lambda_con, contrast(batch.model.text_head(batch.features_BD), batch.text_CD, batch.labels_B, o.tau))
    return terms


METHODS: dict[str, Method] = {
    "fedavg": Method(needs_anchors=False, local_terms=no_terms, weights=by_sample_count),
    "semanticfl": Method(needs_anchors=True, local_terms=semantic_terms, weights=by_sample_count),
}
