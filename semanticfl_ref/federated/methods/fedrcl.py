"""FedRCL: supervised contrast at every level of the network, relaxed: images of one class that are
already alike are pushed apart.

    L = CE + mean over levels ( contrast * L_SCL + beta * L_penalty )

Source: Seo, Kim, Kim, Han: Relaxed Contrastive Learning for Federated Learning. CVPR 2024, arXiv
2401.04928, and its public code, which gives the defaults: tau = 0.05, the single least similar
positive, the 2 most similar negatives, a penalty from similarity 0.7, both weights 1; the levels
are the stem and the four stages, each before its last ReLU and averaged over the image. Supervised
contrast alone makes features collapse; the penalty prevents it. Choice: the code also clips the
gradient's norm at 10; this is left out here, since no other method has it.

Both weights 0 is FedAvg. A batch of one class has no negatives: its contrast is zero, and under
strong label skew that is most batches.

Letters: B batch, D feature width.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms

ABSENT = -1e4  # a similarity that counts for nothing, but finite: a gradient at -inf would be NaN


def relaxed_contrast_terms(batch: LocalBatch) -> Terms:
    """Two terms, each the mean over the network's levels.

    Equation (fedrcl) [FedRCL]:
        contrast * mean_levels supervised-contrast + beta * mean_levels divergence-penalty
    Test: tests/tools/trace/test_trace.py::test_the_weighted_terms_sum_to_the_loss
    """
    s, labels_B, levels, terms = batch.settings, batch.labels_B, batch.levels, {}
    if s.contrast > 0:
        values = [
            supervised_contrast(level, labels_B, s.tau, s.positives, s.negatives)
            for level in levels
        ]
        terms["supervised_contrast"] = (s.contrast, sum(values) / len(levels))
    if s.beta > 0:
        values = [
            divergence_penalty(level, labels_B, s.tau, s.threshold, s.positives) for level in levels
        ]
        terms["divergence_penalty"] = (s.beta, sum(values) / len(levels))
    return terms


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

    Over the hardest positives p (the least similar other images of the class) with s_p >=
    threshold: where even these are alike, the class collapses.

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
    is_other_BB = is_same_BB.fill_diagonal_(False)  # no image with itself
    candidates_BB = similarity_BB.masked_fill(~is_other_BB, torch.inf)
    s_p = candidates_BB.topk(min(positives, len(labels_B)), largest=False).values
    s_p = s_p.masked_fill(~s_p.isfinite() | (s_p < threshold), ABSENT)
    return F.softplus(s_p.div(tau).logsumexp(1) - 1 / tau).mean()


def _similarities(
    features_BD: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities [B, B], and which pairs are of one class, bool [B, B]."""
    unit_BD = F.normalize(features_BD, dim=1)
    return unit_BD @ unit_BD.T, labels_B[:, None] == labels_B[None]


FEDRCL = Method(local_terms=relaxed_contrast_terms, needs_levels=True)
