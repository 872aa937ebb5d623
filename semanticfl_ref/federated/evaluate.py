"""Accuracy of the global model, overall and as each client would see it.

Letters: N images, B batch, M clients in all, C classes.
"""

import math

import torch
from torch import nn

from semanticfl_ref.data.batches import network_input
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.losses import cross_entropy

BATCH = {"cpu": 500, "cuda": 2_000}  # images per forward pass


# Entries of a round's line that are None in a round without an evaluation.
EVALUATED = (
    "test_accuracy",
    "test_loss",
    "macro_f1",
    "validation_accuracy",
    "class_accuracy",
    "client_accuracy",
)


def evaluate_round(context: RunContext, round: int) -> dict:
    """The accuracies of the global model after a round, if `run.evaluate_every` asks for them."""
    if round % context.config.run.evaluate_every:
        return dict.fromkeys(EVALUATED)
    return evaluate(context.model, context)


def evaluate(model: nn.Module, context: RunContext) -> dict:
    """Accuracies of `model`, 0 ... 1.

    Returns:
        test_accuracy; test_loss, the mean cross-entropy, None if it is not finite; macro_f1, the
        mean of the F1 scores of the classes with test images; validation_accuracy, None without
        validation images; class_accuracy, C values, None for a class without test images;
        client_accuracy, M values: the class accuracies averaged by the client's label histogram,
        which is the accuracy on a test set with its label distribution. With
        partition.held_out_share also own_accuracy, M values on the clients' own test images, None
        for a client without.
    """
    data, classes = context.dataset, context.dataset.classes
    logits_NC = logits_of(model, context, data.test_images)
    predicted_N, loss = logits_NC.argmax(1), float(cross_entropy(logits_NC, data.test_labels))
    correct_N = predicted_N == data.test_labels
    count_C = torch.bincount(data.test_labels, minlength=classes).double()
    correct_C = torch.bincount(data.test_labels, weights=correct_N.double(), minlength=classes)
    accuracy_C = correct_C / count_C.clamp(min=1)
    predicted_C = torch.bincount(predicted_N, minlength=classes)
    f1_C = 2 * correct_C / (count_C + predicted_C).clamp(min=1)
    histogram_MC = torch.tensor(
        context.partition.histograms, dtype=torch.float64, device=accuracy_C.device
    )
    histogram_MC = histogram_MC * (count_C > 0)
    client_M = (histogram_MC @ accuracy_C) / histogram_MC.sum(1).clamp(min=1)
    validation = None
    if len(data.validation_labels):
        predicted_N = predictions(model, context, data.validation_images)
        validation = share(predicted_N == data.validation_labels)
    accuracies = {
        "test_accuracy": share(correct_N),
        "test_loss": loss if math.isfinite(loss) else None,
        "macro_f1": f1_C[count_C > 0].mean().item(),
        "validation_accuracy": validation,
        "class_accuracy": [
            accuracy if count else None
            for accuracy, count in zip(accuracy_C.tolist(), count_C.tolist(), strict=True)
        ],
        "client_accuracy": client_M.tolist(),
    }
    if any(len(own) for own in context.partition.held_out):
        accuracies["own_accuracy"] = own_accuracy(model, context)
    return accuracies


def own_accuracy(model: nn.Module, context: RunContext) -> list[float | None]:
    """Accuracy on each client's own test images, M values; None for a client without."""
    data, held_out = context.dataset, context.partition.held_out
    index_N = torch.cat(held_out)
    predicted_N = predictions(model, context, data.train_images[index_N])
    correct_N = (predicted_N == data.train_labels[index_N]).cpu()
    return [share(own) for own in correct_N.split([len(own) for own in held_out])]


def confusion(model: nn.Module, context: RunContext) -> list[list[int]]:
    """How many test images of a class (row) are predicted as which class (column): C x C."""
    data, classes = context.dataset, context.dataset.classes
    pairs_N = data.test_labels * classes + predictions(model, context, data.test_images)
    return torch.bincount(pairs_N, minlength=classes**2).view(classes, classes).tolist()


def share(correct_N: torch.Tensor) -> float | None:
    """The share of bool [N] that is true; None without any."""
    return correct_N.double().mean().item() if len(correct_N) else None


def predictions(model: nn.Module, context: RunContext, images: torch.Tensor) -> torch.Tensor:
    """The most likely class of each of images uint8 [N, H, W, 3]: int64 [N]."""
    return logits_of(model, context, images).argmax(1)


def logits_of(model: nn.Module, context: RunContext, images: torch.Tensor) -> torch.Tensor:
    """The logits of images uint8 [N, H, W, 3]: float32 [N, C]."""
    model.eval()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), context.autocast():
            logits_BC, _ = model(network_input(batch))
        return logits_BC

    return torch.cat(context.replicas.map(forward, images.split(BATCH[context.device.type])))
