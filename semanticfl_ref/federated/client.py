"""The only local-training loop: one client's epochs of SGD on cross-entropy plus the method's
terms.

Letters: B batch, D feature width, M clients, P entries of a row.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.federated.flat import beside_parameters, load_row
from semanticfl_ref.federated.losses import cross_entropy
from semanticfl_ref.federated.methods import METHODS
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms, Visit
from semanticfl_ref.randomness import generator


class Gradient(NamedTuple):
    """Of one weighted term, at the features: its norm; the norm over the sum of all terms' norms;
    its cosine to cross-entropy's, NaN where one vanishes.
    """

    norm: float
    share: float
    cosine: float


@dataclass
class ClientReport:
    """What a client's training showed: sums over its steps, and each term's gradient at the
    features at its first step.

    Attributes:
        steps: SGD steps made.
        loss: sum over steps of the whole objective, float scalar tensor.
        last_epoch_loss: mean of the objective over the last epoch's steps, float scalar tensor.
        terms: name -> sum over steps of the unweighted term.
        gradients: name -> what `feature_gradients` says of the term.
    """

    steps: int = 0
    loss: torch.Tensor | float = 0.0
    last_epoch_loss: torch.Tensor | float = 0.0
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, Gradient] = field(default_factory=dict)


def train_client(visit: Visit) -> ClientReport:
    """Train the world's model in place on the client's images for the configured local epochs.

    A fresh SGD optimizer each time: momentum never crosses rounds or clients. Images are drawn from
    the resident uint8 tensor by seeded batches that depend on (seed, round, client, epoch) alone.

    Equation (local-step) [FedAvg, Alg. 1, with momentum; correction: SCAFFOLD]:
        g <- dL/dw + correction + decay w
        v <- beta v + g
        w <- w - eta v
    Test: tests/federated/test_round.py::test_a_round_by_hand,
        tests/federated/test_method_equations.py::test_scaffold_over_two_rounds
    """
    world, model, options = visit.world, visit.world.model, visit.config.federation
    method, data = METHODS[options.method], world.dataset
    optimizer = torch.optim.SGD(
        model.parameters(),
        options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    correction_P = method.correction(visit)
    corrections = [] if correction_P is None else beside_parameters(model, correction_P)
    frozen = {name: frozen_copy(model, row_P) for name, row_P in method.frozen(visit).items()}
    report = ClientReport()
    model.train()
    for epoch in range(options.local_epochs):
        source, epoch_loss, before = (
            generator(visit.config.run.seed, "batches", visit.round, visit.client, epoch),
            0.0,
            report.steps,
        )
        for index_B in epoch_batches(
            world.partition.indices[visit.client], batch_size=options.batch_size, generator=source
        ):
            images = network_input(
                data.train_images[index_B], augment=visit.config.data.augment, generator=source
            )
            terms, features_BD = objective(visit, method, frozen, images, index_B)
            if report.steps == 0:
                report.gradients = feature_gradients(terms, features_BD)
            loss = sum(weight * value for weight, value in terms.values())
            optimizer.zero_grad()
            loss.backward()
            for parameter, correction in corrections:
                if parameter.grad is not None:  # a head that no term used
                    parameter.grad.add_(correction)
            optimizer.step()
            report.steps += 1
            report.loss = report.loss + loss.detach()
            epoch_loss = epoch_loss + loss.detach()
            for name, (_, value) in terms.items():
                report.terms[name] = report.terms.get(name, 0.0) + value.detach()
        report.last_epoch_loss = epoch_loss / (report.steps - before)
    return report


def objective(
    visit: Visit,
    method: Method,
    frozen: dict[str, nn.Module],
    images: torch.Tensor,
    index_B: torch.Tensor,
) -> tuple[Terms, torch.Tensor]:
    """Cross-entropy and the method's terms on one batch of images float [B, 3, H, W], and the
    features [B, D] that they were computed from.

    Equation (objective) [S; each baseline's publication]: L = CE(logits, y) + sum over terms of
        weight * term
    Test: tests/study/test_trace.py::test_the_weighted_terms_sum_to_the_loss
    """
    world, model, anchors = visit.world, visit.world.model, visit.world.anchors
    labels_B, levels = world.dataset.train_labels[index_B], ()
    with world.autocast():
        if method.needs_levels:
            logits_BC, features_BD, levels = model.forward_with_levels(images)
        else:
            logits_BC, features_BD = model(images)
        with torch.no_grad():
            looks = {name: (other, other(images)[1]) for name, other in frozen.items()}
    visual_BD = (
        anchors.visual_for(labels_B, index_B)
        if anchors is not None and world.partition.gets(visit.client, "visual")
        else None
    )
    text_CD = (
        anchors.text if anchors is not None and world.partition.gets(visit.client, "text") else None
    )
    batch = LocalBatch(
        visit=visit,
        model=model,
        features_BD=features_BD,
        levels=levels,
        frozen=looks,
        labels_B=labels_B,
        visual_BD=visual_BD,
        text_CD=text_CD,
    )
    return {"cross_entropy": (1.0, cross_entropy(logits_BC, labels_B))} | method.local_terms(
        batch
    ), features_BD


def frozen_copy(model: nn.Module, row_P: torch.Tensor) -> nn.Module:
    """A second model that holds a row, in evaluation mode and without gradients."""
    other = copy.deepcopy(model).requires_grad_(False).eval()
    load_row(other, row_P)
    return other


def feature_gradients(terms: Terms, features_BD: torch.Tensor) -> dict[str, Gradient]:
    """Each weighted term's gradient at the features [B, D]: how long it is, and whether it pulls
    with cross-entropy or against it.

    At the features rather than at every weight: the backbone's share of the backward pass, which is
    nearly all of it, is not repeated for each term. Terms that do not pass through the features (a
    distance between weights, inner levels) are not in it."""
    found = {
        name: torch.autograd.grad(
            weight * value, features_BD, retain_graph=True, allow_unused=True
        )[0]
        for name, (weight, value) in terms.items()
    }
    found = {name: gradient.flatten() for name, gradient in found.items() if gradient is not None}
    norms = {name: gradient.norm().item() for name, gradient in found.items()}
    total, base = sum(norms.values()), norms["cross_entropy"]
    cosines = {
        name: gradient.dot(found["cross_entropy"]).item() / (norms[name] * base)
        if norms[name] * base
        else math.nan
        for name, gradient in found.items()
    }
    return {
        name: Gradient(norm, norm / total if total else 0.0, cosines[name])
        for name, norm in norms.items()
    }
