"""Cross-modal InfoNCE: each query against one key per class, the key of its own class being the positive.

    l_b = log sum_n exp(q_b . k_n / tau) - q_b . k_{y_b} / tau

Letters: B queries, N keys, D feature width.
"""

import torch
import torch.nn.functional as F


def info_nce(queries_BD: torch.Tensor, keys_ND: torch.Tensor, labels_B: torch.Tensor, temperature: float, normalize: bool = True) -> torch.Tensor:
    """Mean InfoNCE of queries against class anchors.

    Equals `F.cross_entropy(normalize(q) @ normalize(k).T / temperature, labels)`.

    Args:
        queries_BD: float32 [B, D].
        keys_ND: float32 [N, D].
        labels_B: int64 [B], the positive key of each query, 0 ... N - 1.
        temperature: tau > 0.
        normalize: divide queries and keys by their L2 norm first.

    Returns:
        float32 scalar, in nats. Two closed forms: all keys alike gives log N; orthonormal keys and q = its own key gives
        log(1 + (N - 1) exp(-1 / tau)).

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.

    Source: the contrastive term of SemanticFL's client objective (arXiv 2603.19337, tau = 0.05 as summarised second-hand).
    """
    if queries_BD.ndim != 2 or keys_ND.ndim != 2 or queries_BD.shape[1] != keys_ND.shape[1]:
        raise ValueError(f"queries {tuple(queries_BD.shape)} and keys {tuple(keys_ND.shape)}: expected [B, D] and [N, D]")
    if labels_B.shape != queries_BD.shape[:1]:
        raise ValueError(f"labels {tuple(labels_B.shape)}: expected one per query, [{len(queries_BD)}]")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    if normalize:
        queries_BD, keys_ND = F.normalize(queries_BD, dim=1), F.normalize(keys_ND, dim=1)
    return F.cross_entropy(queries_BD @ keys_ND.T / temperature, labels_B)
