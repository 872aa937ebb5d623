"""What a client reports of its local update.

Letters: B batch, D feature width.
"""

import math
from dataclasses import dataclass
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
        products: of the terms that depend on the features, see `gradient_products`.
    """

    indices: torch.Tensor
    terms: Terms
    loss: torch.Tensor
    products: dict[str, torch.Tensor]

    @property
    def gradients(self) -> dict[str, Gradient]:
        """Name -> gradient, of the terms that depend on the features."""
        return gradients_of(self.products)

    def clone(self) -> "FirstBatch":
        """A copy that the next step does not overwrite."""
        terms = {name: (weight, value.clone()) for name, (weight, value) in self.terms.items()}
        products = {name: value.clone() for name, value in self.products.items()}
        return FirstBatch(self.indices.clone(), terms, self.loss.clone(), products)


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

    steps: int
    loss: torch.Tensor
    last_epoch_loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    first: FirstBatch


def first_batch(
    index_B: torch.Tensor, terms: Terms, loss: torch.Tensor, features_BD: torch.Tensor
) -> FirstBatch:
    """What is reported of a client's first batch."""
    values = {name: (weight, value.detach()) for name, (weight, value) in terms.items()}
    return FirstBatch(index_B, values, loss.detach(), gradient_products(terms, features_BD))


def gradient_products(terms: Terms, features_BD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each weighted term's gradient at the features [B, D]: name -> [2], its norm, and its inner
    product with cross-entropy's gradient.

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
    base = found["cross_entropy"]
    return {name: torch.stack([g.norm(), g.dot(base)]) for name, g in found.items()}


def gradients_of(products: dict[str, torch.Tensor]) -> dict[str, Gradient]:
    """Name -> gradient, from the results of `gradient_products`."""
    numbers = {name: pair.tolist() for name, pair in products.items()}
    total = sum(norm for norm, _ in numbers.values())
    base, _ = numbers["cross_entropy"]
    return {
        name: Gradient(
            norm=norm,
            share=norm / total if total else 0.0,
            cosine=product / (norm * base) if norm * base else math.nan,
        )
        for name, (norm, product) in numbers.items()
    }
