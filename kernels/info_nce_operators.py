"""InfoNCE's Triton kernels as torch operators: shapes for `torch.compile`, gradients for autograd.
Triton is imported when one of them runs.

info_nce_frozen     loss and d(query), for at most 256 keys that want no gradient: backward
multiplies by the upstream gradient info_nce_streaming  loss and what backward needs, for any number
of keys; info_nce_streaming_backward: d(query), d(key), d(temperature)"""

import torch
from torch import Tensor

from semanticfl_ref.kernels.dispatch import on_device

MOST_KEYS = 256  # of the frozen form


def info_nce_triton(
    queries,
    keys,
    labels,
    temperature,
    normalize: bool,
    weights,
    reduction: str,
    symmetric: bool,
    precision: str,
) -> Tensor:
    """`info_nce` after its checks, through the kernels. Arguments as there."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    queries, keys = _rows(queries.to(dtype)), _rows(keys.to(dtype))
    labels = None if labels is None else labels.contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    scalar, tensor = (
        (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
    )
    if symmetric:
        there = info_nce_streaming(
            queries, keys, None, weights, weights, tensor, scalar, normalize, reduction, precision
        )[0]
        back = info_nce_streaming(
            keys, queries, None, weights, weights, tensor, scalar, normalize, reduction, precision
        )[0]
        return (there + back) / 2
    wants = torch.is_grad_enabled()
    if keys.shape[-2] <= MOST_KEYS and not (
        wants and (keys.requires_grad or (tensor is not None and tensor.requires_grad))
    ):
        return info_nce_frozen(
            queries,
            keys,
            labels,
            weights,
            tensor,
            scalar,
            normalize,
            reduction,
            precision,
            wants and queries.requires_grad,
        )[0]
    return info_nce_streaming(
        queries, keys, labels, weights, None, tensor, scalar, normalize, reduction, precision
    )[0]


@torch.library.custom_op("semanticfl_ref::info_nce_frozen", mutates_args=())
def info_nce_frozen(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    normalize: bool,
    reduction: str,
    precision: str,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and for an upstream gradient of 1 its d(query) in fp32 (empty unless `gradient`)."""
    from semanticfl_ref.kernels import info_nce_small

    with on_device(queries):
        loss, dq = info_nce_small.launch(
            queries,
            keys,
            labels,
            weights,
            temperature,
            tau,
            normalize,
            reduction,
            precision,
            gradient,
        )
    return loss.view(_loss_shape(queries, reduction)), dq


@info_nce_frozen.register_fake
def _(queries, keys, labels, weights, temperature, tau, normalize, reduction, precision, gradient):
    return queries.new_empty(
        _loss_shape(queries, reduction), dtype=torch.float32
    ), queries.new_empty(queries.shape if gradient else (0,), dtype=torch.float32)


def _save_frozen(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.rows = inputs[0].dtype, inputs[7] == "none"
    ctx.set_materialize_grads(False)


def _scale_frozen(ctx, upstream, through_gradient):
    if through_gradient is not None:
        raise RuntimeError(
            "info_nce: a second derivative was asked for. The Triton kernels have the first only; impl='torch' has both"
        )
    nothing = (None,) * 9
    if upstream is None:
        return None, *nothing
    (dq,) = ctx.saved_tensors
    dims = (
        1 if ctx.rows else 2
    )  # a loss per row has every dimension of dq but the last; one per client lacks the rows' too
    return (dq * upstream.reshape(*upstream.shape, *(1,) * min(dims, dq.ndim - upstream.ndim))).to(
        ctx.dtype
    ), *nothing


info_nce_frozen.register_autograd(_scale_frozen, setup_context=_save_frozen)


@torch.library.custom_op("semanticfl_ref::info_nce_streaming", mutates_args=())
def info_nce_streaming(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    candidates: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    normalize: bool,
    reduction: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; statistics [2, G, B]; inverse norms of queries [G, B] and of keys [G or 1, N], empty
    without normalisation; what a mean multiplies a sum by [G].
    """
    from semanticfl_ref.kernels import info_nce_streaming as kernels

    with on_device(queries):
        loss, *rest = kernels.launch(
            queries,
            keys,
            labels,
            weights,
            candidates,
            temperature,
            tau,
            normalize,
            reduction,
            precision,
        )
    return loss.view(_loss_shape(queries, reduction)), *rest


@info_nce_streaming.register_fake
def _(
    queries, keys, labels, weights, candidates, temperature, tau, normalize, reduction, precision
):
    (G, B), N = (1, *queries.shape)[-3:-1], keys.shape[-2]
    shapes = (
        _loss_shape(queries, reduction),
        (2, G, B),
        (G, B) if normalize else (0, 0),
        (keys.shape[0] if keys.ndim == 3 else 1, N) if normalize else (0, 0),
        (G,),
    )
    return tuple(queries.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("semanticfl_ref::info_nce_streaming_backward", mutates_args=())
def info_nce_streaming_backward(
    upstream: Tensor,
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    candidates: Tensor | None,
    temperature: Tensor | None,
    statistics: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    mean_scale: Tensor,
    tau: float,
    normalize: bool,
    precision: str,
    want_queries: bool,
    want_keys: bool,
    want_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d(query), d(key), d(temperature); an empty tensor for what is not wanted."""
    from semanticfl_ref.kernels import info_nce_gradient

    G, B = statistics.shape[1:]
    coefficient = (
        upstream.reshape(
            G, B if upstream.numel() == G * B and upstream.ndim == queries.ndim - 1 else 1
        )
        * mean_scale[:, None]
    ).expand(G, B)
    labels, weights, candidates = (
        None if tensor is None else tensor.view(G, B) for tensor in (labels, weights, candidates)
    )  # candidates: N = B
    if labels is not None:
        coefficient = torch.where(
            (labels < 0) | (labels >= keys.shape[-2]), float("nan"), coefficient
        )
    if weights is not None:
        coefficient = torch.where(weights == 0, 0.0, coefficient * weights)
    with on_device(queries):
        return info_nce_gradient.launch(
            queries,
            keys,
            labels,
            weights is not None,
            candidates,
            temperature,
            coefficient.contiguous(),
            statistics,
            query_scale if normalize else None,
            key_scale if normalize else None,
            tau,
            precision,
            (want_queries, want_keys, want_temperature),
        )


@info_nce_streaming_backward.register_fake
def _(
    upstream,
    queries,
    keys,
    labels,
    weights,
    candidates,
    temperature,
    statistics,
    query_scale,
    key_scale,
    mean_scale,
    tau,
    normalize,
    precision,
    want_queries,
    want_keys,
    want_temperature,
):
    dq, dk = (
        queries.new_empty(queries.shape if want_queries else (0,)),
        keys.new_empty(keys.shape if want_keys else (0,)),
    )
    return dq, dk, queries.new_empty(() if want_temperature else (0,), dtype=torch.float32)


def _save_streaming(ctx, inputs, output) -> None:
    *tensors, ctx.tau, ctx.normalize, _, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _walk_back(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 10
    temperature, wants = (
        ctx.saved_tensors[5],
        (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5]),
    )
    dq, dk, dtau = info_nce_streaming_backward(
        upstream, *ctx.saved_tensors, ctx.tau, ctx.normalize, ctx.precision, *wants
    )
    dtau = dtau.to(temperature.dtype).reshape(temperature.shape) if wants[2] else None
    return (
        dq if wants[0] else None,
        dk if wants[1] else None,
        None,
        None,
        None,
        dtau,
        None,
        None,
        None,
        None,
    )


info_nce_streaming.register_autograd(_walk_back, setup_context=_save_streaming)


def _loss_shape(queries: Tensor, reduction: str) -> tuple[int, ...]:
    return tuple(queries.shape[:-1] if reduction == "none" else queries.shape[:-2])


def _rows(vectors: Tensor) -> Tensor:
    """A tensor whose rows are contiguous, and near enough for 32-bit offsets within a tile."""
    return (
        vectors if vectors.stride(-1) == 1 and vectors.stride(-2) < 2**23 else vectors.contiguous()
    )
