"""The terms of a client's objective that several methods share, one pure function each.

A term of a single method is in that method's file.

Letters: B batch, D feature width, C classes.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.errors import unknown
from semanticfl_ref.kernels.info_nce import info_nce

cross_entropy = F.cross_entropy


def consistency(
    features_BD: torch.Tensor,
    anchors_BD: torch.Tensor,
    kind: str,
    temperature: float = 1.0,
    squared: bool = False,
) -> torch.Tensor:
    """How far features are from their images' visual anchors.

    Equation (consistency) [S; T and the form O]:
        kl-unit:  KL( softmax(a / |a| / T) || softmax(f / |f| / T) )
        kl-raw:   KL( softmax(a / T) || softmax(f / T) )
        cosine:   1 - cos(f, a)
    Test: tests/federated/test_losses.py::test_kl_by_its_sum,
        tests/federated/test_losses.py::test_cosine_of_opposite_and_orthogonal_vectors

    Args:
        features_BD: float32 [B, D], after the visual head.
        anchors_BD: float32 [B, D], constants.
        kind: the form, see above. The paper's literal one is kl-unit at T = 1: between unit vectors
            of 512 entries it is 0.002 nats on average, so its gradient is negligible.
        temperature: T > 0 of both softmaxes; cosine has none.
        squared: multiply the KL divergence by T^2 (Hinton et al. 2015), which keeps the gradient's
            scale when T changes.

    Returns:
        float32 scalar >= 0, mean over the batch; zero if features equal anchors.

    Raises:
        UserError: an unknown form.

    Source: SemanticFL's consistency term, as summarised second-hand; FedDifRC for the
    normalisation. Choice: kind and T.
    """
    if kind == "cosine":
        return (1 - F.cosine_similarity(features_BD, anchors_BD, dim=1)).mean()
    if kind == "kl-unit":
        features_BD, anchors_BD = F.normalize(features_BD, dim=1), F.normalize(anchors_BD, dim=1)
    elif kind != "kl-raw":
        raise unknown("consistency", kind, ("kl-unit", "kl-raw", "cosine"))
    student = F.log_softmax(features_BD / temperature, dim=1)
    teacher = F.log_softmax(anchors_BD / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if squared else divergence


def contrast(
    features_BD: torch.Tensor, text_CD: torch.Tensor, labels_B: torch.Tensor, tau: float
) -> torch.Tensor:
    """InfoNCE of features against every class's text anchor; the own class is the positive.

    Equation (contrast) [S]:
        - log( exp(cos(f, text_y) / tau) / sum_c exp(cos(f, text_c) / tau) )
    Test: tests/federated/test_losses.py::test_contrast_prefers_the_own_class,
        tests/federated/test_losses.py::test_contrast_with_keys_per_image_by_its_sum

    Args:
        features_BD: float32 [B, D], after the text head.
        text_CD: float32 [C, D], or per image [B, C, D]; constants.
        labels_B: int64 [B].
        tau: temperature; 0.05 in the paper's summary.

    Returns:
        float32 scalar in nats, mean over the batch.
    """
    if text_CD.ndim == 2:
        return info_nce(features_BD, text_CD, labels_B, tau)
    # As many clients with one query each as there are images.
    return info_nce(features_BD[:, None], text_CD, labels_B[:, None], tau).mean()
