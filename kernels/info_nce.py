"""Cross-modal InfoNCE: each query against keys, one of which is its positive.

    x_bn = q_b . k_n / (|q_b| |k_n| tau)         l_b = log sum_n exp(x_bn) - x_{b, y_b}         loss
    = sum_b w_b l_b / sum_b w_b

The gradient, with p_bn = exp(x_bn) / sum_m exp(x_bm), ds = p - [n = y_b], and c_b what l_b counts
for (w_b / sum w, times the upstream gradient). The softmax gives dl_b / dx_bn = ds_bn. With q^ = q
/ |q|, x is linear in q^ and dq^_b = c_b / tau sum_n ds_bn k^_n; a change of q along itself does not
change q^, so that part is taken out and the rest divided by the norm. The part along q^ is known
from the logits already, as q^_b . k^_n = tau x_bn:

    dq_b = c_b / |q_b| ( 1 / tau sum_n ds_bn k^_n  -  q^_b sum_n ds_bn x_bn )
    dk_n =   1 / |k_n| ( 1 / tau sum_b c_b ds_bn q^_b  -  k^_n sum_b c_b ds_bn x_bn )          dtau
    = - 1 / tau sum_bn c_b ds_bn x_bn

This file has the plain torch reference, the checks and the public function. The kernels:
`info_nce_small.py` (up to 256 keys without a gradient: one launch for the loss and dq, which is
what SemanticFL's text anchors need), `info_nce_streaming.py` (any number of keys, nothing of size B
x N), `info_nce_gradient.py` (its backward); each counts its bytes. They are torch operators, see
`info_nce_operators.py`.

Letters: G clients, B queries, N keys, D feature width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from semanticfl_ref.kernels.dispatch import implementation, with_fallback

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
PRECISIONS = ("ieee", "tf32")


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.05,
    normalize: bool = True,
    *,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    symmetric: bool = False,
    precision: str = "ieee",
    impl: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """InfoNCE of queries against keys: class anchors by label, or in-batch pairs on the diagonal.

    Equals `F.cross_entropy(normalize(q) @ normalize(k).T / temperature, labels)`, computed in
    float32, without allocating the logits on a GPU.

    Equation (info-nce) [van den Oord et al. 2018, Eq. 4]: l_b = log sum_n exp(x_bn) - x_{b, y_b},
        x_bn = q_b . k_n / (|q_b| |k_n| tau)
    Test: tests/kernels/test_info_nce.py::test_orthonormal_keys_and_aligned_queries,
        tests/kernels/test_info_nce.py::test_reference_by_finite_differences

    Args:
        queries: float32, bfloat16, float16 or float64, [B, D], or [G, B, D]: G independent losses,
            a client each.
        keys: [N, D], shared by all clients, or [G, N, D]. Queries and keys of two dtypes are both
            taken in the wider one.
        labels: int64 [B] or [G, B], the positive key of each query, 0 ... N - 1; None: query b's is
            key b, and N = B.
        temperature: tau > 0, a number or a tensor of one element, which gets its gradient.
        normalize: divide queries and keys by their L2 norm, no smaller than 1e-12, first.
        weights: [B] or [G, B], not negative; constants. A mean is sum(w l) / sum(w), a sum is sum(w
            l), "none" gives w l. Weight 0: the row is absent, whatever it holds; with `symmetric`
            the pair is, as a candidate too.
        reduction: "mean" or "sum" over the B rows of a client, or "none".
        symmetric: the mean of both directions, queries against keys and keys against queries
            (CLIP); without labels only.
        precision: of float32 products in the kernels, "ieee" or "tf32". The torch implementation
            follows torch's own setting.
        impl: "auto" (the kernels on CUDA, torch elsewhere), "torch" or "triton"; the environment
            variable SEMANTICFL_KERNELS replaces "auto".
        validate: check the tensors' values on a GPU too, which waits for it. Unchecked, a bad label
            gives NaN. On the CPU they are always checked, except while `torch.compile` traces.

    Returns:
        float32 (float64 for float64) in nats: [], or [G] for clients; [B] or [G, B] for "none". The
        mean of no rows is NaN. Two closed forms: all keys alike gives log N; orthonormal keys and q
        = its own key gives log(1 + (N - 1) exp(-1 / tau)). Gradients have the inputs' dtype; under
        autocast the inputs' dtypes are used as they are.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive
            and finite, an unknown word; labels out of range; weights that are negative, not finite,
            or zero for every row of a client.

    Source: van den Oord et al. 2018 (Eq. 4); symmetric: CLIP (Radford et al. 2021, Fig. 3); the
        contrastive term of SemanticFL's client objective (arXiv
    2603.19337, tau = 0.05 as summarised second-hand).
    """
    _check_shapes(queries, keys, labels, weights, symmetric)
    _check_options(queries, temperature, reduction, precision)
    if (validate or not queries.is_cuda) and not torch.compiler.is_compiling():
        _check_values(keys, labels, temperature, weights)
    if weights is not None:
        weights = weights.detach()
    arguments = (queries, keys, labels, temperature, normalize, weights, reduction, symmetric)
    if implementation(impl, queries, keys) == "torch":
        return _reference(*arguments)
    from semanticfl_ref.kernels.info_nce_operators import info_nce_triton

    # what happens when a kernel cannot be compiled is decided when it runs, outside of the traced
    # graph
    if torch.compiler.is_compiling():
        return info_nce_triton(*arguments, precision)
    return with_fallback(
        lambda: info_nce_triton(*arguments, precision), lambda: _reference(*arguments)
    )


class InfoNCE(nn.Module):
    """`info_nce` with its options fixed. With `learnable` the temperature is a parameter; it is the
    caller's to keep it positive.

    Args:
        temperature: tau > 0 at the start.
        learnable: make the temperature a parameter, float32 [].
        options: the keyword arguments of `info_nce`, and `normalize`.
    """

    def __init__(self, temperature: float = 0.05, *, learnable: bool = False, **options):
        super().__init__()
        self.temperature = (
            nn.Parameter(torch.tensor(float(temperature))) if learnable else temperature
        )
        self.options = options

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result as `info_nce` has them."""
        return info_nce(queries, keys, labels, self.temperature, weights=weights, **self.options)


def _reference(
    queries, keys, labels, temperature, normalize, weights, reduction, symmetric
) -> torch.Tensor:
    """The loss in plain torch, in the inputs' dtypes whatever autocast says."""
    if torch.is_autocast_enabled(queries.device.type):
        with torch.autocast(queries.device.type, enabled=False):
            return _reference(
                queries, keys, labels, temperature, normalize, weights, reduction, symmetric
            )
    if not queries.dtype == keys.dtype == torch.float32:
        dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
        queries, keys = queries.to(dtype), keys.to(dtype)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.reshape(()).to(queries.dtype)
    if queries.ndim == 2:
        return _one_client(
            queries, keys, labels, temperature, normalize, weights, reduction, symmetric
        )
    losses = []
    for g, queries_BD in enumerate(
        queries
    ):  # one after another, so that a client's bits do not depend on how many there are
        keys_ND, labels_B, weights_B = (
            (keys[g] if keys.ndim == 3 else keys),
            (None if labels is None else labels[g]),
            (None if weights is None else weights[g]),
        )
        losses.append(
            _one_client(
                queries_BD,
                keys_ND,
                labels_B,
                temperature,
                normalize,
                weights_B,
                reduction,
                symmetric,
            )
        )
    return (
        torch.stack(losses)
        if losses
        else queries.sum(2 if reduction == "none" else (1, 2)) + 0 * keys.sum()
    )


def _one_client(
    queries_BD, keys_ND, labels_B, temperature, normalize, weights_B, reduction, symmetric
) -> torch.Tensor:
    present_B = None if weights_B is None else weights_B != 0
    if labels_B is None:
        labels_B = torch.arange(len(queries_BD), device=queries_BD.device)
    if (
        present_B is not None
        # what an absent row holds must reach neither the loss nor a gradient, not even multiplied by
        # zero
    ):
        queries_BD, labels_B = (
            torch.where(present_B[:, None], queries_BD, 0),
            torch.where(present_B, labels_B, 0),
        )
        if symmetric:
            keys_ND = torch.where(present_B[:, None], keys_ND, 0)
    if normalize:
        queries_BD, keys_ND = F.normalize(queries_BD, dim=1), F.normalize(keys_ND, dim=1)
    logits_BN = queries_BD @ keys_ND.T / temperature
    if weights_B is None and not symmetric:
        return F.cross_entropy(logits_BN, labels_B, reduction=reduction)
    if symmetric:
        if present_B is not None:
            present_BN = (present_B[:, None] & present_B) | torch.eye(
                len(present_B), dtype=torch.bool, device=present_B.device
            )
            logits_BN, labels_B = (
                logits_BN.masked_fill(~present_BN, float("-inf")),
                torch.arange(len(labels_B), device=labels_B.device),
            )
        losses_B = (
            F.cross_entropy(logits_BN, labels_B, reduction="none")
            + F.cross_entropy(logits_BN.T, labels_B, reduction="none")
        ) / 2
    else:
        losses_B = F.cross_entropy(logits_BN, labels_B, reduction="none")
    if weights_B is None:
        return {"mean": torch.mean, "sum": torch.sum, "none": lambda losses: losses}[reduction](
            losses_B
        )
    weighted_B = weights_B.to(losses_B.dtype) * losses_B
    if reduction == "none":
        return weighted_B
    return (
        weighted_B.sum() / weights_B.to(losses_B.dtype).sum()
        if reduction == "mean"
        else weighted_B.sum()
    )


def _check_shapes(queries, keys, labels, weights, symmetric) -> None:
    q, k, rows = tuple(queries.shape), tuple(keys.shape), queries.shape[:-1]
    if (
        len(q) not in (2, 3)
        or len(k) not in (2, len(q))
        or q[-1] != k[-1]
        or (len(k) == 3 and k[0] != q[0])
    ):
        raise ValueError(
            f"queries {q} and keys {k}: expected [B, D] and [N, D], or [G, B, D] and [N, D] or [G, N, D]"
        )
    if 0 in k[-2:]:
        raise ValueError(f"keys {k}: at least one key with at least one feature is needed")
    if labels is None and k[-2] != q[-2]:
        raise ValueError(
            f"queries {q} and keys {k} without labels: expected a key for each query; or pass labels"
        )
    if symmetric and (labels is not None or k != q):
        raise ValueError(
            f"symmetric = True with queries {q}, keys {k}{'' if labels is None else ' and labels'}: expected equal shapes and no labels"
        )
    if labels is not None and (labels.shape != rows or labels.dtype != torch.int64):
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}: expected one per query, {tuple(rows)} torch.int64"
        )
    if weights is not None and (weights.shape != rows or not weights.is_floating_point()):
        raise ValueError(
            f"weights {tuple(weights.shape)} {weights.dtype}: expected one floating-point number per query, {tuple(rows)}"
        )
    if queries.dtype not in DTYPES or keys.dtype not in DTYPES:
        raise ValueError(
            f"queries {queries.dtype} and keys {keys.dtype}: expected each to be one of {', '.join(map(str, DTYPES))}"
        )
    device = queries.device
    if (
        keys.device != device
        or (labels is not None and labels.device != device)
        or (weights is not None and weights.device != device)
    ):
        others = {
            name: str(tensor.device)
            for name, tensor in (("keys", keys), ("labels", labels), ("weights", weights))
            if tensor is not None
        }
        raise ValueError(f"queries on {device}, {others}: move them to one device")


def _check_options(queries, temperature, reduction, precision) -> None:
    if isinstance(temperature, torch.Tensor):
        if (
            temperature.numel() != 1
            or not temperature.is_floating_point()
            or temperature.device != queries.device
        ):
            raise ValueError(
                f"temperature {tuple(temperature.shape)} {temperature.dtype} on {temperature.device}: expected one floating-point number on {queries.device}"
            )
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: must be positive and finite")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction = {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision = {precision!r}: expected one of {', '.join(PRECISIONS)}")


def _check_values(keys, labels, temperature, weights) -> None:
    if isinstance(temperature, torch.Tensor) and not 0 < temperature.item() < float("inf"):
        raise ValueError(f"temperature = {temperature.item()}: must be positive and finite")
    if weights is not None and weights.numel():
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError(
                f"weights from {weights.min().item()} to {weights.max().item()}: must be finite and not negative"
            )
        if not bool((weights > 0).any(-1).all()):
            raise ValueError("weights are zero for every row of a client: no loss is defined")
    if labels is not None and labels.numel():
        used = labels if weights is None else torch.where(weights != 0, labels, 0)
        low, high = used.aminmax()
        if low.item() < 0 or high.item() >= keys.shape[-2]:
            raise ValueError(
                f"labels from {low.item()} to {high.item()}: expected 0 ... {keys.shape[-2] - 1}, as there are {keys.shape[-2]} keys"
            )
