"""FedRCL: supervised contrast at every level of the network, relaxed: images of one class that are
alike already are driven apart.

    L = CE + mean over levels ( contrast * L_SCL + beta * L_penalty )

Source: Seo, Kim, Kim, Han: Relaxed Contrastive Learning for Federated Learning. CVPR 2024, arXiv
    2401.04928, and its public code, which gives the
defaults: tau = 0.05, the 1 least similar positive, the 2 most similar negatives, penalty from
    similarity 0.7, both weights 1, levels = the stem and
the four stages, each before its last ReLU and averaged over the image. The equations are in
losses.py. The paper's supervised contrast alone makes features collapse; the penalty is against
that. The code also clips the gradient's norm at 10; that is left out here, as no other method has
it.

Both weights 0 is FedAvg. A batch of one class has no negatives: the contrast is then zero, and
under strong skew that is most batches."""

from semanticfl_ref.federated.losses import divergence_penalty, supervised_contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms


def relaxed_contrast_terms(batch: LocalBatch) -> Terms:
    """The two terms beside the cross-entropy, each the mean over the network's levels.

    Equation (fedrcl) [FedRCL]: contrast * mean_levels supervised-contrast + beta * mean_levels
        divergence-penalty
    Test: tests/study/test_trace.py::test_the_weighted_terms_sum_to_the_loss
    """
    o, terms = batch.config.fedrcl, {}
    if o.contrast > 0:
        values = [
            supervised_contrast(level, batch.labels_B, o.tau, o.positives, o.negatives)
            for level in batch.levels
        ]
        terms["supervised_contrast"] = (o.contrast, sum(values) / len(values))
    if o.beta > 0:
        values = [
            divergence_penalty(level, batch.labels_B, o.tau, o.threshold, o.positives)
            for level in batch.levels
        ]
        terms["divergence_penalty"] = (o.beta, sum(values) / len(values))
    return terms


FEDRCL = Method(local_terms=relaxed_contrast_terms, needs_levels=True)
