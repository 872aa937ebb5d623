"""How much a layer's features say about the classes: five numbers, to choose layers by.

    linear probe     accuracy of softmax regression, fitted on one set of images, tested on another
    nearest          accuracy of a vote of the 10 nearest neighbours in cosine similarity, likewise
    Fisher ratio     variance between classes over variance within them
    effective rank   number of directions in use: exp of the entropy of the covariance's eigenvalues
    text alignment   correlation, over pairs of classes, of the cosine similarity of their mean
                     features and that of their texts

The first three use labels, the fourth nothing else, the last the model's own text encoder.
Correlating pairs, instead of projecting, keeps wide features of few classes from agreeing by
chance: unrelated ones score about 0, whatever their width.

Letters: N images, C classes, D width of a vector.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.diffusion.anchors import fisher_ratio

NEIGHBOURS = 10
PENALTY = 1e-3  # weight of the sum of squared weights beside the mean cross-entropy
CHUNK = 1024  # test images whose neighbours are looked up at a time


def describe_layer(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    classes: int,
    text_CD: torch.Tensor | None,
) -> dict[str, float | None]:
    """All five numbers of a layer.

    Args:
        features, test_features: [N, D] of any real dtype.
        labels, test_labels: int64 [N] in 0 ... C-1.
        classes: C.
        text_CD: the classes' texts; None if there are none.

    Returns:
        linear_probe and nearest in 0 ... 1, fisher_ratio, effective_rank in 1 ... D, text_alignment
        in -1 ... 1 (None without texts, or with fewer than three classes).
    """
    train, test = standardised(features, test_features)
    return {
        "linear_probe": linear_probe(train, labels, test, test_labels),
        "nearest": nearest_neighbours(train, labels, test, test_labels),
        "fisher_ratio": fisher_ratio(train, labels, classes),
        "effective_rank": effective_rank(features),
        "text_alignment": None if text_CD is None else text_alignment(train, labels, text_CD),
    }


def standardised(
    features: torch.Tensor, test_features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets in float32, every entry with mean 0 and standard deviation 1 over the first set."""
    mean = features.double().mean(0)
    deviation = features.double().std(0).clamp(min=1e-8)
    return tuple(((part.double() - mean) / deviation).float() for part in (features, test_features))


def linear_probe(
    train_ND: torch.Tensor,
    labels: torch.Tensor,
    test_ND: torch.Tensor,
    test_labels: torch.Tensor,
) -> float:
    """Test accuracy, 0 ... 1, of softmax regression by L-BFGS, with a penalty on squared weights.

    Args:
        train_ND, test_ND: standardised features, float32.
        labels, test_labels: int64 [N].
    """
    classes = int(labels.max()) + 1
    weight = torch.zeros(train_ND.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train_ND @ weight + bias, labels) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (test_ND @ weight + bias).argmax(1)
    return float((predicted == test_labels).double().mean())


def nearest_neighbours(
    train_ND: torch.Tensor, labels: torch.Tensor, test_ND: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """Test accuracy, 0 ... 1, of the majority of the nearest neighbours in cosine similarity.

    A tie goes to the class with the larger sum of cosine similarities. Arguments as in
    `linear_probe`.
    """
    train_ND, test_ND = F.normalize(train_ND, dim=1), F.normalize(test_ND, dim=1)
    classes = int(labels.max()) + 1
    correct = 0
    for part, truth in zip(test_ND.split(CHUNK), test_labels.split(CHUNK), strict=True):
        cosines, indices = (part @ train_ND.T).topk(min(NEIGHBOURS, len(train_ND)), dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[indices], 1 + cosines / 100)
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(test_labels)


def effective_rank(features_ND: torch.Tensor) -> float:
    """exp(-sum p log p) of the covariance's eigenvalues p, which are scaled to sum to 1.

    Source: Roy and Vetterli (2007), applied to the covariance.
    """
    centred = features_ND.double() - features_ND.double().mean(0)
    # The smaller of the two products: the same eigenvalues except for zeros.
    wide = centred.shape[1] > len(centred)
    product = centred @ centred.T if wide else centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(product).clamp(min=0)
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum().clamp(min=1e-300)
    return float((-(p * p.log()).sum()).exp())


def text_alignment(
    features_ND: torch.Tensor, labels: torch.Tensor, text_CD: torch.Tensor
) -> float | None:
    """Pearson correlation, over pairs of classes, of two cosine similarities: of their mean
    features, and of their texts, both centred over the classes first.

    Returns:
        -1 ... 1; None with fewer than three classes.
    """
    present = labels.unique()
    if len(present) < 3:
        return None
    means = torch.stack([features_ND[labels == label].double().mean(0) for label in present])
    pairs = torch.triu_indices(len(present), len(present), 1)
    similarities = []
    for vectors in (means, text_CD[present].double()):
        centred = F.normalize(vectors - vectors.mean(0), dim=1)
        similarities.append((centred @ centred.T)[*pairs])
    return float(torch.corrcoef(torch.stack(similarities))[0, 1])
