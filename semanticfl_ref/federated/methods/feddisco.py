"""FedDisco: a client whose labels are far from uniform gets a lower aggregation weight.

    p_k  proportional to  ReLU(n_k - a d_k + b)

n_k is the client's share of the round's images; d_k is its discrepancy KL(labels || uniform),
divided by the sum of the round's discrepancies.

Source: Ye, Xu, Wang, Xu, Chen, Wang: FedDisco: Federated Learning with Discrepancy-Aware
Collaboration. ICML 2023, and the authors' code (a = 0.5, b = 0.1; shares and discrepancies are
those of the round's clients). Clients reveal one number, their discrepancy before its
normalisation.

a = b = 0 is FedAvg; so is any a with b = a/K if all are equally skewed. Choice: where every weight
would be zero (large a, small b), sample counts are used, which the paper leaves open. The global
label distribution is taken to be uniform: with a long tail, the most faithful client may get the
lowest weight.

Letters: K clients of the round, C classes.
"""

import torch

from semanticfl_ref.federated.methods.method import Method, SampledClients


def discrepancy_weights(sampled: SampledClients) -> torch.Tensor:
    """The formula in units of images, n_k n instead of n_k: a = b = 0 gives sample counts, bitwise.

    Equation (feddisco-weights) [FedDisco]: p_k proportional to ReLU(n_k - a d_k + b)
    Test: tests/federated/test_method_equations.py::test_feddisco_on_numbers
    """
    settings, counts_K = sampled.config.method, sampled.counts_K.double()
    penalty_K = settings.a * discrepancy(sampled.histograms_KC) - settings.b
    weights_K = (counts_K - counts_K.sum() * penalty_K).clamp(min=0)
    return weights_K if weights_K.sum() > 0 else counts_K


def discrepancy(histograms_KC: torch.Tensor) -> torch.Tensor:
    """Each client's share of the round's discrepancies, float64 [K]; zeros if all are uniform.

    Equation (discrepancy) [FedDisco]:
        d_k = KL(labels of k || uniform) / sum_j KL(labels of j || uniform)
    Test: tests/federated/test_method_equations.py::test_feddisco_on_numbers
    """
    shares_KC = histograms_KC.double() / histograms_KC.sum(1, keepdim=True)
    classes = shares_KC.shape[1]
    divergence_K = torch.special.xlogy(shares_KC, shares_KC * classes).sum(1).clamp(min=0)
    return divergence_K / divergence_K.sum() if divergence_K.sum() > 0 else divergence_K


FEDDISCO = Method(weights=discrepancy_weights)
