"""What a layer knows of the classes: five numbers a layer, so that a user sees why one was chosen.

    linear probe     softmax regression fitted on one set of images, accuracy on another
    nearest          10 nearest neighbours by cosine, majority, fitted and judged alike
    Fisher ratio     variance between the classes over variance within, traces, on standardised
    features effective rank   exp of the entropy of the covariance's normalised eigenvalues: how
    many directions are in use text alignment   correlation, over pairs of classes, of the cosine
    between the classes' mean features and that between their texts

The first three judge features by labels, the fourth by nothing, the last by the model's own text
encoder. Correlating pairs rather than projecting means that wide features of few classes do not
agree by chance: unrelated ones score about 0, whatever their width.

Letters: N images, C classes, D width of a vector.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.diffusion.anchors import fisher_ratio

NEIGHBOURS = 10


def describe_layer(
    features,
    labels: torch.Tensor,
    test_features,
    test_labels: torch.Tensor,
    classes: int,
    text_CD: torch.Tensor | None,
) -> dict[str, float]:
    """All five numbers of a layer.

    Args:
        features, test_features: [N, D], any float type: what is fitted on, what is judged on.
        labels, test_labels: int64 [N] in 0 ... C-1.
        classes: C.
        text_CD: the classes' texts; None where there are none to align with.

    Returns:
        linear_probe and nearest in 0 ... 1, fisher_ratio, effective_rank in 1 ... D, text_alignment
        in -1 ... 1 (None without texts, or with fewer than three classes).
    """
    train, test = standardised(features, test_features)
    return {
        "linear_probe": linear_probe(features, labels, test_features, test_labels),
        "nearest": nearest_neighbours(train, labels, test, test_labels),
        "fisher_ratio": fisher_ratio(train, labels, classes),
        "effective_rank": effective_rank(features),
        "text_alignment": None if text_CD is None else text_alignment(train, labels, text_CD),
    }


def standardised(features, test_features) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as float32 with the first one's mean 0 and standard deviation 1, entry by entry."""
    mean, spread = features.double().mean(0), features.double().std(0).clamp(min=1e-8)
    return tuple(((part.double() - mean) / spread).float() for part in (features, test_features))


def nearest_neighbours(
    train_ND: torch.Tensor, labels: torch.Tensor, test_ND: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """Accuracy of the majority of the nearest by cosine; a tie goes to the class of the nearer sum
    of cosines.
    """
    known, classes = F.normalize(train_ND, dim=1), int(torch.cat([labels, test_labels]).max()) + 1
    right = 0
    for part, truth in zip(
        F.normalize(test_ND, dim=1).split(1024), test_labels.split(1024), strict=True
    ):
        cosines, places = (part @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[places], 1 + cosines / 100)
        right += int((votes.argmax(1) == truth).sum())
    return right / len(test_labels)


def effective_rank(features) -> float:
    """exp(-sum p log p) over the shares p of the covariance's eigenvalues (Roy and Vetterli, 2007,
    on the covariance).
    """
    values = features.double() - features.double().mean(0)
    small = (
        values.T @ values if values.shape[1] <= len(values) else values @ values.T
    )  # the same eigenvalues but for zeros
    shares = torch.linalg.eigvalsh(small).clamp(min=0)
    shares = shares[shares > 0] / shares.sum().clamp(min=1e-300)
    return float((-(shares * shares.log()).sum()).exp())


def text_alignment(features, labels: torch.Tensor, text_CD: torch.Tensor) -> float | None:
    """Pearson correlation of the two C x C tables of cosines, above the diagonal; class means and
    texts are centred over the classes first.
    """
    present = labels.unique()
    if len(present) < 3:
        return None
    means = torch.stack([features[labels == label].double().mean(0) for label in present])
    tables = []
    for rows in (means, text_CD[present].double()):
        rows = F.normalize(rows - rows.mean(0), dim=1)
        tables.append((rows @ rows.T)[*torch.triu_indices(len(present), len(present), 1)])
    return float(torch.corrcoef(torch.stack(tables))[0, 1])


def linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    penalty: float = 1e-3,
) -> float:
    """How much of the labels a linear map reads: softmax regression by L-BFGS on features
    standardised by the first set.

    Args:
        features, test_features: [N, D], any float type. labels, test_labels: int64 [N].
        penalty: weight of the squared weights, against the mean cross-entropy.

    Returns:
        The accuracy on the second set, 0 ... 1.
    """
    mean, spread = features.double().mean(0), features.double().std(0).clamp(min=1e-8)
    train, test = (((part.double() - mean) / spread).float() for part in (features, test_features))
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    weight, bias = (
        torch.zeros(train.shape[1], classes, requires_grad=True),
        torch.zeros(classes, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(((test @ weight + bias).argmax(1) == test_labels).double().mean())
