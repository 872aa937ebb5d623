"""The only local-training loop: a client's epochs of SGD on cross-entropy plus the method's terms.

Letters: B batch, D feature width, C classes, P size of a flat vector.
"""

import copy

import torch
from torch import nn

from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.federated.flat import load_params, with_parameters
from semanticfl_ref.federated.losses import cross_entropy
from semanticfl_ref.federated.methods.method import LocalBatch, LocalUpdate, Terms
from semanticfl_ref.federated.report import ClientReport, first_batch
from semanticfl_ref.randomness import generator


def train_client(update: LocalUpdate) -> ClientReport:
    """Train the update's model in place on the client's images for the configured local epochs.

    The optimizer is new each time: momentum never crosses rounds or clients. Batches depend on
    (seed, round, client, epoch) only.

    Equation (local-step) [FedAvg, Alg. 1, with momentum; correction: SCAFFOLD]:
        g <- dL/dw + correction + decay w
        v <- beta v + g
        w <- w - eta v
    Test: tests/federated/test_round.py::test_a_round_by_hand,
        tests/federated/test_method_equations.py::test_scaffold_over_two_rounds
    """
    context, model, settings = update.context, update.model, update.config.federation
    method, data = context.method, context.dataset
    # On the device: an index on the CPU would stop it at every batch.
    indices = context.partition.indices[update.client].to(context.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    correction_P = method.correction(update)
    corrections = [] if correction_P is None else with_parameters(model, correction_P)
    references = {
        name: reference_model(model, params_P)
        for name, params_P in method.reference_models(update).items()
    }
    report = ClientReport()
    model.train()
    for epoch in range(settings.local_epochs):
        source = generator(update.config.run.seed, "batches", update.round, update.client, epoch)
        batches = epoch_batches(indices, batch_size=settings.batch_size, generator=source)
        epoch_loss = 0.0
        for index_B in batches:
            images = network_input(
                data.train_images[index_B], augment=update.config.data.augment, generator=source
            )
            terms, features_BD = objective(update, references, images, index_B)
            loss = sum(weight * value for weight, value in terms.values())
            if report.first is None:
                report.first = first_batch(index_B, terms, loss, features_BD)
            optimizer.zero_grad()
            loss.backward()
            for parameter, correction in corrections:
                if parameter.grad is not None:  # heads that no term uses have none
                    parameter.grad.add_(correction)
            optimizer.step()
            report.steps += 1
            report.loss += loss.detach()
            epoch_loss += loss.detach()
            for name, (_, value) in terms.items():
                report.terms[name] += value.detach()
        report.last_epoch_loss = epoch_loss / len(batches)
    return report


def objective(
    update: LocalUpdate,
    references: dict[str, nn.Module],
    images: torch.Tensor,
    index_B: torch.Tensor,
) -> tuple[Terms, torch.Tensor]:
    """Cross-entropy and the method's terms on one batch, and the features they are computed from.

    Equation (objective) [S; each baseline's publication]:
        L = CE(logits, y) + sum over terms of weight * term
    Test: tests/tools/trace/test_trace.py::test_the_weighted_terms_sum_to_the_loss

    Args:
        update: the client's local update.
        references: name -> reference model.
        images: float [B, 3, H, W].
        index_B: int64 [B], into the training images.

    Returns:
        The terms, and features float32 [B, D].
    """
    context, model = update.context, update.model
    method, labels_B = context.method, context.dataset.train_labels[index_B]
    forward = model.forward_with_levels if method.needs_levels else model
    with context.autocast():
        logits_BC, features_BD, *levels = forward(images)
        with torch.no_grad():
            of_references = {name: (other, other(images)[1]) for name, other in references.items()}
    visual_BD, text_CD = context.anchors_for(update.client, labels_B, index_B)
    batch = LocalBatch(
        update=update,
        features_BD=features_BD,
        levels=levels,
        references=of_references,
        labels_B=labels_B,
        visual_BD=visual_BD,
        text_CD=text_CD,
    )
    terms = {"cross_entropy": (1.0, cross_entropy(logits_BC, labels_B))}
    return terms | method.local_terms(batch), features_BD


def reference_model(model: nn.Module, params_P: torch.Tensor) -> nn.Module:
    """A second model with these parameters, in evaluation mode and without gradients."""
    other = copy.deepcopy(model).requires_grad_(False).eval()
    load_params(other, params_P)
    return other
