"""The only local-training loop: a client's epochs on cross-entropy plus the method's terms.

Letters: B batch, D feature width, C classes, P size of a flat vector.
"""

from typing import TYPE_CHECKING

import torch

from semanticfl_ref.data.batches import draw_crops, epoch_batches, network_input
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.losses import cross_entropy
from semanticfl_ref.federated.methods.method import LocalBatch, LocalUpdate, Terms
from semanticfl_ref.federated.report import ClientReport, FirstBatch, first_batch
from semanticfl_ref.randomness import generator

if TYPE_CHECKING:
    from semanticfl_ref.federated.replicas import Replica


def train_client(update: LocalUpdate, replica: "Replica") -> ClientReport:
    """Train a replica on the client's images for the configured local epochs.

    The optimizer starts afresh: nothing of it crosses rounds or clients. Batches depend on (seed,
    round, client, epoch) only.
    """
    context, settings = update.context, update.config.federation
    # On the device: indexing with a CPU tensor would hold it up at every batch.
    indices = context.partition.indices[update.client].to(context.device)
    steps, first = 0, None
    replica.model.train()
    for epoch in range(settings.local_epochs):
        source = generator(update.config.run.seed, "batches", update.round, update.client, epoch)
        batches = epoch_batches(indices, batch_size=settings.batch_size, generator=source)
        crops = [None] * len(batches)
        if update.config.data.augment:
            crops = draw_crops(batches, source)
        replica.epoch_loss.zero_()
        for index_B, crop_3B in zip(batches, crops, strict=True):
            seen = replica.step(update, index_B, crop_3B, is_first=steps == 0)
            first = first or seen.clone()
            steps += 1
    return ClientReport(
        steps=steps,
        loss=replica.loss.clone(),
        last_epoch_loss=replica.epoch_loss / len(batches),
        terms={name: replica.terms[name].clone() for name in first.terms},
        first=first,
    )


def local_step(
    update: LocalUpdate,
    replica: "Replica",
    index_B: torch.Tensor,
    crop_3B: torch.Tensor | None,
    is_first: bool,
) -> FirstBatch | None:
    """One step of a client's local update; below, that of SGD (see `make_optimizer`).

    No operation in it waits for the device, and no shape depends on a value.

    Equation (local-step) [FedAvg, Alg. 1, with momentum; correction: SCAFFOLD]:
        g <- dL/dw + correction + decay w
        v <- beta v + g
        w <- w - eta v,  or w - eta (v + correction) with the correction after momentum
    Test: tests/federated/test_round.py::test_a_round_by_hand,
        tests/federated/test_method_equations.py::test_scaffold_over_two_rounds,
        tests/federated/test_method_equations.py::test_scaffold_after_the_momentum_step

    Args:
        update: the client's local update.
        replica: what it trains.
        index_B: int64 [B], into the training images.
        crop_3B: int64 [3, B], see `draw_crops`; None without augmentation.
        is_first: whether to report this batch in detail.

    Returns:
        The batch in detail; None if not asked for.
    """
    images = network_input(update.context.dataset.train_images[index_B], crop_3B)
    terms, features_BD = objective(update, replica, images, index_B)
    loss = sum(weight * value for weight, value in terms.values())
    first = first_batch(index_B, terms, loss, features_BD) if is_first else None
    replica.optimizer.zero_grad()
    loss.backward()
    after_momentum = update.context.method.corrects_step(update.config)
    for parameter, correction in replica.corrections:
        # Heads that no term uses have no gradient.
        if parameter.grad is not None and not after_momentum:
            parameter.grad.add_(correction)
    replica.optimizer.step()
    if after_momentum:
        for parameter, correction in replica.corrections:
            parameter.data.addcmul_(correction, replica.rate, value=-1)
    replica.loss += loss.detach()
    replica.epoch_loss += loss.detach()
    for name, (_, value) in terms.items():
        replica.add_term(name, value.detach())
    return first


def objective(
    update: LocalUpdate,
    replica: "Replica",
    images: torch.Tensor,
    index_B: torch.Tensor,
) -> tuple[Terms, torch.Tensor]:
    """Cross-entropy and the method's terms on one batch, and the features they are computed from.

    Equation (objective) [S; each baseline's publication]:
        L = CE(logits, y) + sum over terms of weight * term
    Test: tests/tools/trace/test_trace.py::test_the_weighted_terms_sum_to_the_loss

    Args:
        update: the client's local update.
        replica: the model in training, and the reference models.
        images: float [B, 3, H, W].
        index_B: int64 [B], into the training images.

    Returns:
        The terms, and features float32 [B, D].
    """
    context, model = update.context, replica.model
    method, labels_B = context.method, context.dataset.train_labels[index_B]
    forward = model.forward_with_levels if method.needs_levels else model
    with context.autocast():
        logits_BC, features_BD, *levels = forward(images)
        with torch.no_grad():
            references = {name: (m, m(images)[1]) for name, m in replica.references.items()}
    visual_BD, text_CD = context.anchors_for(update.client, labels_B, index_B)
    batch = LocalBatch(
        update=update,
        model=model,
        parameters=replica.parameters,
        features_BD=features_BD,
        levels=levels,
        references=references,
        labels_B=labels_B,
        visual_BD=visual_BD,
        text_CD=text_CD,
    )
    terms, base = method.local_terms(batch), "cross_entropy"
    if base in terms:
        raise UserError(f"method {update.config.federation.method!r}: rename its term {base!r}")
    return {base: (1.0, cross_entropy(logits_BC, labels_B))} | terms, features_BD
