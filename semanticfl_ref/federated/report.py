"""What a client reports of its local update.

Letters: B batch, D feature width.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from semanticfl_ref.federated.methods.method import Terms


class Gradient(NamedTuple):
    """The gradient of one weighted term at the features.

    Attributes:
        norm: its norm.
        share: its norm over the sum of all terms' norms.
        cosine: cosine similarity to cross-entropy's gradient; NaN if either vanishes.
    """

    norm: float
    share: float
    cosine: float


class FirstBatch(NamedTuple):
    """A client's first batch of a round, in detail.

    Attributes:
        indices: int64 [B], into the training images.
        terms: name -> (weight, unweighted value).
        loss: the objective.
        gradients: name -> gradient, of the terms that depend on the features.
    """

    indices: torch.Tensor
    terms: Terms
    loss: torch.Tensor
    gradients: dict[str, Gradient]


@dataclass
class ClientReport:
    """What a local update reports.

    Attributes:
        steps: SGD steps made.
        loss: objective summed over steps, scalar tensor.
        last_epoch_loss: mean objective of the last epoch, scalar tensor.
        terms: name -> unweighted term summed over steps, scalar tensor.
        first: the first batch.
    """

    steps: int = 0
    loss: torch.Tensor | float = 0.0
    last_epoch_loss: torch.Tensor | float = 0.0
    terms: Counter[str] = field(default_factory=Counter)
    first: FirstBatch | None = None


def first_batch(
    index_B: torch.Tensor, terms: Terms, loss: torch.Tensor, features_BD: torch.Tensor
) -> FirstBatch:
    """What is reported of a client's first batch."""
    values = {name: (weight, value.detach()) for name, (weight, value) in terms.items()}
    return FirstBatch(index_B, values, loss.detach(), feature_gradients(terms, features_BD))


def feature_gradients(terms: Terms, features_BD: torch.Tensor) -> dict[str, Gradient]:
    """Each weighted term's gradient at the features [B, D].

    At the features rather than at all parameters, since the backbone's backward pass, nearly all of
    the cost, is then not repeated per term. Terms that do not depend on the features (distances
    between parameters, inner levels) are left out.
    """
    found = {}
    for name, (weight, value) in terms.items():
        (gradient,) = torch.autograd.grad(
            weight * value, features_BD, retain_graph=True, allow_unused=True
        )
        if gradient is not None:
            found[name] = gradient.flatten()
    norms = {name: gradient.norm().item() for name, gradient in found.items()}
    total, base = sum(norms.values()), norms["cross_entropy"]
    gradients = {}
    for name, norm in norms.items():
        cosine = math.nan
        if norm * base:
            cosine = found[name].dot(found["cross_entropy"]).item() / (norm * base)
        gradients[name] = Gradient(norm, norm / total if total else 0.0, cosine)
    return gradients
