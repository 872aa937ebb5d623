"""FedRCL: supervised contrast at every level of the network, relaxed: images of one class that are
already alike are pushed apart.

    L = CE + mean over levels ( contrast * L_SCL + beta * L_penalty )

Source: Seo, Kim, Kim, Han: Relaxed Contrastive Learning for Federated Learning. CVPR 2024, arXiv
2401.04928, and its public code, which gives the defaults: tau = 0.05, the single least similar
positive, the 2 most similar negatives, a penalty from similarity 0.7, both weights 1; the levels are
the stem and the four stages, each before its last ReLU and averaged over the image. The equations are
in losses.py. Supervised contrast alone makes features collapse; the penalty prevents it. Choice: the
code also clips the gradient's norm at 10; this is left out here, since no other method has it.

Both weights 0 is FedAvg. A batch of one class has no negatives: its contrast is zero, and under
strong label skew that is most batches.
"""

from semanticfl_ref.federated.losses import divergence_penalty, supervised_contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms


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


FEDRCL = Method(local_terms=relaxed_contrast_terms, needs_levels=True)
