"""Accuracy of the global model, in all and as each client would see it.

Letters: N images, M clients, C classes.
"""

import torch

from semanticfl_ref.data.batches import network_input

BATCH = 500  # images a forward pass


def evaluate(model, world) -> dict:
    """Accuracies of `model` in 0 ... 1.

    Returns:
        test_accuracy; validation_accuracy (None without a validation part); class_accuracy, a list
        of C, None for a class without a test image; client_accuracy, a list of M: the test part's
        class accuracies averaged by the client's label histogram, which is the accuracy on a test
        set with its label mix; with
        partition.held_out_share, own_accuracy: a list of M accuracies on the clients' own tests,
            None for a client without.
    """
    data = world.dataset
    right_N = correct(model, world, data.test_images, data.test_labels)
    classes = len(data.class_names)
    seen_C = torch.bincount(data.test_labels, minlength=classes).double()
    class_accuracy_C = torch.bincount(
        data.test_labels, weights=right_N.double(), minlength=classes
    ) / seen_C.clamp(min=1)
    mix_MC = torch.tensor(
        world.partition.histograms, dtype=torch.float64, device=class_accuracy_C.device
    )
    mix_MC = mix_MC * (seen_C > 0)
    client_M = (mix_MC @ class_accuracy_C) / mix_MC.sum(1).clamp(min=1)
    own = (
        {"own_accuracy": own_accuracy(model, world)}
        if any(len(i) for i in world.partition.held_out)
        else {}
    )
    return {
        "test_accuracy": right_N.double().mean().item(),
        "validation_accuracy": correct(model, world, data.validation_images, data.validation_labels)
        .double()
        .mean()
        .item()
        if len(data.validation_labels)
        else None,
        "class_accuracy": [
            accuracy if seen else None
            for accuracy, seen in zip(class_accuracy_C.tolist(), seen_C.tolist(), strict=True)
        ],
        "client_accuracy": client_M.tolist(),
        **own,
    }


def own_accuracy(model, world) -> list[float | None]:
    """The model's accuracy on each client's own test, None for a client that keeps none: M values."""
    data, held_out = world.dataset, world.partition.held_out
    all_N = torch.cat(held_out).to(data.train_images.device)
    right = (
        correct(model, world, data.train_images[all_N], data.train_labels[all_N])
        .cpu()
        .split([len(i) for i in held_out])
    )
    return [r.double().mean().item() if len(r) else None for r in right]


def confusion(model, world) -> list[list[int]]:
    """How many test images of a class (row) the model takes for which class (column): C x C."""
    data, classes = world.dataset, len(world.dataset.class_names)
    pairs_N = data.test_labels * classes + predictions(model, world, data.test_images)
    return torch.bincount(pairs_N, minlength=classes**2).view(classes, classes).tolist()


def correct(model, world, images: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Which of images uint8 [N, H, W, 3] the model classifies rightly: bool [N]."""
    return predictions(model, world, images) == labels_N


@torch.no_grad()
def predictions(model, world, images: torch.Tensor) -> torch.Tensor:
    """The class that the model finds likeliest for each of images uint8 [N, H, W, 3]: int64 [N]."""
    model.eval()
    predicted = []
    for batch in images.split(BATCH):
        with world.autocast():
            predicted.append(
                model(network_input(batch, augment=False, generator=None))[0].argmax(1)
            )
    return torch.cat(predicted)
