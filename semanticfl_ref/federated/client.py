"""The only local-training loop: one client's epochs of SGD on cross-entropy plus the method's terms.

Letters: B batch, M clients, N images.
"""

from dataclasses import dataclass, field

import torch

from semanticfl_ref.data.batches import epoch_batches, network_input
from semanticfl_ref.federated.losses import cross_entropy
from semanticfl_ref.federated.methods import METHODS, LocalBatch
from semanticfl_ref.randomness import generator


@dataclass
class ClientReport:
    """What a client's training showed: sums over its steps, and each term's share of the gradient at its first step.

    Attributes:
        steps: SGD steps made.
        loss: sum over steps of the whole objective, float scalar tensor.
        terms: name -> sum over steps of the unweighted term.
        gradient_share: name -> norm of the weighted term's gradient at the features, over the sum of all terms' norms.
    """

    steps: int = 0
    loss: torch.Tensor | float = 0.0
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_share: dict[str, float] = field(default_factory=dict)


def train_client(world, model, client: int, round: int) -> ClientReport:
    """Train `model` in place on client `client`'s images for the configured local epochs.

    A fresh SGD optimizer each time: momentum never crosses rounds or clients. Images are drawn from the resident uint8
    tensor by seeded batches that depend on (seed, round, client, epoch) alone.
    """
    options, data, anchors = world.config.federation, world.dataset, world.anchors
    method = METHODS[options.method]
    optimizer = torch.optim.SGD(model.parameters(), options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay)
    report = ClientReport()
    model.train()
    for epoch in range(options.local_epochs):
        source = generator(world.config.run.seed, "batches", round, client, epoch)
        for index_B in epoch_batches(world.partition.indices[client], batch_size=options.batch_size, generator=source):
            labels_B = data.train_labels[index_B]
            with world.autocast():
                logits_BC, features_BD = model(network_input(data.train_images[index_B], augment=world.config.data.augment, generator=source))
            terms = {"cross_entropy": (1.0, cross_entropy(logits_BC, labels_B))}
            if anchors is not None:
                visual_BD = anchors.visual_for(labels_B, index_B)
                terms |= method.local_terms(LocalBatch(model=model, features_BD=features_BD, labels_B=labels_B, visual_BD=visual_BD, text_CD=anchors.text, options=world.config.semantic))
            if report.steps == 0 and len(terms) > 1:
                report.gradient_share = gradient_share(terms, features_BD)
            loss = sum(weight * value for weight, value in terms.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report.steps += 1
            report.loss = report.loss + loss.detach()
            for name, (_, value) in terms.items():
                report.terms[name] = report.terms.get(name, 0.0) + value.detach()
    return report


def gradient_share(terms, features_BD: torch.Tensor) -> dict[str, float]:
    """Each weighted term's gradient norm at the features [B, D], over the sum of the norms.

    At the features rather than at every weight: the backbone's share of the backward pass, which is nearly all of it, is not
    repeated for each term.
    """
    norms = {
        name: torch.autograd.grad(weight * value, features_BD, retain_graph=True)[0].norm().item() for name, (weight, value) in terms.items()
    }
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}
