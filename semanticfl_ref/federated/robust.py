"""Robust aggregation: median, trimmed mean, Krum, and a bound on the norm of updates.

Letters: K clients of the round, P size of a flat vector.
"""

import torch

from semanticfl_ref.config.settings import ServerSettings, trimmed_clients
from semanticfl_ref.errors import unknown

CHUNK = 2**20  # entries of each client that are sorted at a time


def clip_update(
    params_P: torch.Tensor, start_P: torch.Tensor, excluded: torch.Tensor, bound: float
) -> None:
    """Scale a client's update down to the norm `bound`, in place; a shorter one keeps its bits.

    Equation (clip-update) [Sun et al. 2019, norm thresholding]:
        w_k <- w + (w_k - w) / max(1, |w_k - w| / bound)
    Test: tests/federated/test_aggregate.py::test_clipping_on_numbers

    Args:
        params_P: float32 [P], what the client returned; NaN and infinity end as NaN.
        start_P: float32 [P], what it had received.
        excluded: as in `Drift`; these entries have a norm of their own.
        bound: the setting `server.clip_norm`.

    Source: Sun, Kairouz, Suresh, McMahan: Can You Really Backdoor Federated Learning? arXiv
    1911.07963. Choice: the bound holds for what descends from the global model and for what does
    not (running statistics; with model.batch_norm = local all of BatchNorm), each by itself.
    """
    apart_P = torch.zeros_like(params_P, dtype=torch.bool)
    apart_P[excluded] = True
    for part in (apart_P, ~apart_P):
        change = params_P[part].double() - start_P[part]
        norm = change.norm()
        if norm > bound:
            params_P[part] = (start_P[part] + change * (bound / norm)).float()


def robust_aggregate(
    params_KP: torch.Tensor, rule: str, settings: ServerSettings, sampled: int
) -> torch.Tensor:
    """The median or trimmed mean of every entry, or Krum's mean, float32 [P]; each client counts
    once.

    BatchNorm's running statistics are treated alike. The rules tolerate fewer hostile clients than
    half, or than the share `server.trim`. Under label skew an honest client is an outlier too, and
    is lost with them.

    Args:
        params_KP: float32 [K, P], the clients that returned finite parameters.
        rule: "median", "trimmed-mean" or "multi-krum".
        settings: the section `server`.
        sampled: clients of the round. `server.trim` is a share of these, so that a client which
            returns NaN does not reduce the trimming; at most, the median is left.

    Raises:
        UserError: an unknown rule.

    Source: Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning. ICML 2018,
    Definitions 1 and 2.
    """
    median = (len(params_KP) - 1) // 2
    cut = min(trimmed_clients(settings.trim, sampled), median)
    rules = {"median": (trimmed_mean, median), "trimmed-mean": (trimmed_mean, cut)}
    rules["multi-krum"] = (multi_krum, cut)
    if rule not in rules:
        raise unknown("federation.aggregation", rule, ("mean", *rules))
    function, count = rules[rule]
    return function(params_KP, count)


def trimmed_mean(params_KP: torch.Tensor, cut: int) -> torch.Tensor:
    """The mean of every entry without its `cut` smallest and largest values, float32 [P].

    With all but one or two values cut, it is the median.

    Equation (trimmed-mean) [Yin et al. 2018, Definitions 1 and 2]:
        w_p = mean of the sorted w_1p ... w_Kp without the `cut` first and last
    Test: tests/federated/test_aggregate.py::test_median_and_trimmed_mean_on_numbers

    Args:
        params_KP: float32 [K, P], K > 2 cut.
        cut: clients cut at each end.
    """
    kept = slice(cut, len(params_KP) - cut)
    chunks = params_KP.split(CHUNK, dim=1)
    return torch.cat([c.sort(0).values[kept].double().mean(0).float() for c in chunks])


def multi_krum(params_KP: torch.Tensor, hostile: int) -> torch.Tensor:
    """The mean of the clients with the smallest scores, float32 [P].

    Equation (multi-krum) [Blanchard et al. 2017, Section 4]:
        s(k) = sum of |w_k - w_j|^2 over the K - f - 2 clients j nearest to k
    Test: tests/federated/test_aggregate.py::test_multi_krum_on_numbers

    Args:
        params_KP: float32 [K, P], K > 2 f.
        hostile: f, clients that may be hostile.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent. NeurIPS 2017, which needs K > 2 f + 2. Choice: the mean of K - 2 f,
    so that twice as many hostile clients as expected are still left out where they are far away;
    at least one neighbour counts.
    """
    clients = len(params_KP)
    distance_KK = torch.zeros(clients, clients, dtype=torch.float64, device=params_KP.device)
    for chunk in params_KP.split(CHUNK, dim=1):
        chunk = chunk.double()
        exact = "donot_use_mm_for_euclid_dist"
        distance_KK += torch.cdist(chunk, chunk, compute_mode=exact).square()
    nearest = max(1, clients - hostile - 2)
    score_K = distance_KK.sort(1).values[:, 1 : 1 + nearest].sum(1)  # the first is its own
    kept = score_K.argsort(stable=True)[: clients - 2 * hostile].sort().values
    chunks = params_KP[kept].split(CHUNK, dim=1)
    return torch.cat([chunk.double().mean(0).float() for chunk in chunks])
