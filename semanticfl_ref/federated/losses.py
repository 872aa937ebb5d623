"""One pure function per term of a client's objective; the methods' files combine them.

Letters: B batch, D feature width, C classes.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.errors import unknown
from semanticfl_ref.kernels.info_nce import info_nce

cross_entropy = F.cross_entropy
ABSENT = -1e4  # a similarity that counts for nothing, but finite: a gradient at -inf would be NaN


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

    Source: SemanticFL's consistency term, as summarised second-hand; FedDifRC for the normalisation.
    Choice: kind and T.
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
    Test: tests/federated/test_losses.py::test_contrast_prefers_the_own_class

    Args:
        features_BD: float32 [B, D], after the text head.
        text_CD: float32 [C, D], constants.
        labels_B: int64 [B].
        tau: temperature; 0.05 in the paper's summary.

    Returns:
        float32 scalar in nats, mean over the batch.
    """
    return info_nce(features_BD, text_CD, labels_B, tau)


def proximal(parameters: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Half the squared distance to the model received; its gradient is w - w_t.

    Equation (proximal) [FedProx, Eq. 2]: |w - w_t|^2 / 2
    Test:
        tests/federated/test_method_equations.py::test_the_proximal_term_is_half_the_squared_distance

    Args:
        parameters: pairs of a parameter and its value in the model received.
    """
    return sum((w - received).square().sum() for w, received in parameters) / 2


def model_contrast(
    z_BD: torch.Tensor, received_BD: torch.Tensor, last_BD: torch.Tensor, tau: float
) -> torch.Tensor:
    """The model-contrastive term, mean over the batch.

    Equation (model-contrast) [MOON, Eq. 3]:
        - log( exp(cos(z, received) / tau) / (exp(cos(z, received) / tau) + exp(cos(z, last) / tau)) )
    Test: tests/federated/test_method_equations.py::test_moon_on_vectors

    Args:
        z_BD: float32 [B, D], of the model in training.
        received_BD, last_BD: float32 [B, D], constants: of the model received and of the client's
            previous one. Equal ones give log 2 and no gradient.
        tau: temperature.

    Source: MOON (Li et al. 2021), Eq. 3.
    """
    toward_B = F.cosine_similarity(z_BD, received_BD, dim=1)
    away_B = F.cosine_similarity(z_BD, last_BD, dim=1)
    return F.softplus((away_B - toward_B) / tau).mean()


def supervised_contrast(
    features_BD: torch.Tensor,
    labels_B: torch.Tensor,
    tau: float,
    positives: int = 1,
    negatives: int = 2,
) -> torch.Tensor:
    """Contrast of images with images, mean over the hardest positives p and the batch.

    The hardest positives are the least similar images of the same class, the image itself included;
    the hardest negatives the most similar images of other classes. An image alone in its class is
    its own positive (cosine similarity s = 1); a batch of one class gives zero.

    Equation (supervised-contrast) [FedRCL]:
        - log( exp(s_p / tau) / (exp(s_p / tau) + sum_n exp(s_n / tau)) )
    Test: tests/federated/test_method_equations.py::test_supervised_contrast_on_vectors

    Args:
        features_BD: float32 [B, D], of one level.
        labels_B: int64 [B].
        tau: temperature.
        positives, negatives: how many of each; fewer if the batch has fewer.

    Source: FedRCL (Seo et al. 2024), as in its public code.
    """
    similarity_BB, is_same_BB = _similarities(features_BD, labels_B)
    count = len(labels_B)
    candidates_BB = similarity_BB.masked_fill(~is_same_BB, torch.inf)
    s_p = candidates_BB.topk(min(positives, count), largest=False).values
    candidates_BB = similarity_BB.masked_fill(is_same_BB, -torch.inf)
    s_n = candidates_BB.topk(min(negatives, count)).values
    exists = s_p.isfinite()
    s_p = s_p.where(exists, 0.0)
    s_n = s_n[:, None, :].expand(-1, s_p.shape[1], -1)
    logits = torch.cat([s_p[:, :, None], s_n], dim=2) / tau
    terms = -logits.log_softmax(2)[:, :, 0] * exists
    return terms.sum(1).div(exists.sum(1)).mean()


def divergence_penalty(
    features_BD: torch.Tensor,
    labels_B: torch.Tensor,
    tau: float,
    threshold: float,
    positives: int = 1,
) -> torch.Tensor:
    """Pushes apart images of one class that are already alike, mean over the batch.

    Over the hardest positives p (the least similar other images of the class) with s_p >= threshold:
    where even these are alike, the class collapses.

    Equation (divergence-penalty) [FedRCL]:
        - log( exp(1 / tau) / (exp(1 / tau) + sum_p exp(s_p / tau)) )
    Test: tests/federated/test_method_equations.py::test_divergence_penalty_on_vectors

    Args:
        features_BD: float32 [B, D], of one level.
        labels_B: int64 [B].
        tau: temperature.
        threshold: lambda, a cosine similarity.
        positives: how many.

    Source: FedRCL (Seo et al. 2024), as in its public code.
    """
    similarity_BB, is_same_BB = _similarities(features_BD, labels_B)
    count = len(labels_B)
    is_other_BB = is_same_BB & ~torch.eye(count, dtype=torch.bool, device=is_same_BB.device)
    candidates_BB = similarity_BB.masked_fill(~is_other_BB, torch.inf)
    s_p = candidates_BB.topk(min(positives, count), largest=False).values
    s_p = s_p.masked_fill(~s_p.isfinite() | (s_p < threshold), ABSENT)
    return F.softplus(s_p.div(tau).logsumexp(1) - 1 / tau).mean()


def _similarities(
    features_BD: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities [B, B], and which pairs are of one class, bool [B, B]."""
    unit_BD = F.normalize(features_BD, dim=1)
    return unit_BD @ unit_BD.T, labels_B[:, None] == labels_B[None]
