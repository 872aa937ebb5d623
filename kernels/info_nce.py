"""Cross-modal InfoNCE: each query against keys, one of which is its positive.

    s_bn = q_b . k_n / (|q_b| |k_n|)                        cosine similarity
    x_bn = s_bn / tau                                       logits
    l_b  = log sum_n exp(x_bn) - x_by                       y = labels[b], the positive of query b
    loss = sum_b l_b / B

Gradient of the queries, the keys being constants. With p_bn = exp(x_bn) / sum_m exp(x_bm), unit
vectors q^ = q / |q| and k^ = k / |k|, and because probabilities sum to one,

    dl_b/dx_bn = p_bn - [n = y]
    dl_b/dq^_b = 1/tau (sum_n p_bn k^_n - k^_y) = 1/tau sum_{n != y} p_bn (k^_n - k^_y) =: g_b
    dloss/dq_b = (g_b - q^_b (q^_b . g_b)) / (|q_b| B)

The last line removes the part of g along q, since a change of q along itself does not change q^.
Two details keep d(query) accurate at small tau. The positive is left out of both sums, so p_by - 1
is never formed: it would lose its digits where p_by is nearly 1. And q^ . g is the product with the
g that was computed, so that its rounding errors along q go too.

One launch gives d(query) and the loss of every BLOCK_B queries; a second, tiny one adds up these
losses in a fixed order. A program owns BLOCK_B queries of one client and walks that client's keys
in blocks. The logits of a block live in registers. Their exponentials are relative to the largest
logit so far, and sums of them are rescaled when a larger one comes (online softmax);
sum_n exp(x_bn) k^_n is carried along. Bytes of device memory, for entries of e bytes:

    reads     G B D e (queries) + N D e (keys; G N D e unless shared) + 8 G B (labels)
    writes    4 G B D (d(query)) + 4 G ceil(B / BLOCK_B) (losses)

Keys count once: every program reads them again from the cache, twice for a gradient. Never
allocated: logits, probabilities, normalised copies. All products are float32: a client's batch is
too small for tensor cores to pay, and rounded probabilities would cost accuracy.

Letters: G clients, B queries, N keys, D feature width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from semanticfl_ref.kernels.checks import require_floating, require_positive, require_tensors
from semanticfl_ref.kernels.dispatch import implementation, on_device, tl, triton, with_fallback

KEYS_THAT_PAY = 64  # times G; beyond, torch was faster in a CUDA graph (docs/kernels.md)
MOST_KEYS = MOST_FEATURES = 1024  # d(query) of a block of queries lives in registers
PRECISION = "ieee"  # of products; "tf32x3" uses tensor cores, but is unproven at tau = 0.005
NO_LABEL = -(2**63)  # ignore_index that no caller uses: -100 is an error, and is not skipped


def info_nce_reference(
    queries: Tensor, keys: Tensor, labels: Tensor, temperature: float | Tensor
) -> Tensor:
    """The definition in plain torch, in float32 or float64 whatever autocast says.

    Differentiable in queries, keys and temperature. Arguments and result as `info_nce` has them.
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(dtype)

    def one_client(q_BD: Tensor, k_ND: Tensor, labels_B: Tensor) -> Tensor:
        cosine_BN = F.normalize(q_BD, dim=1) @ F.normalize(k_ND, dim=1).T
        return F.cross_entropy(cosine_BN / temperature, labels_B, ignore_index=NO_LABEL)

    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = queries.to(dtype), keys.to(dtype)
        if queries.ndim == 2:
            return one_client(queries, keys, labels)
        if len(queries) == 0:
            return queries.sum((1, 2)) + 0 * keys.sum()
        keys_G = [keys] * len(queries) if keys.ndim == 2 else keys
        clients = zip(queries, keys_G, labels, strict=True)
        # One after another: a client's bits must not depend on how many there are.
        return torch.stack([one_client(*client) for client in clients])


@triton.jit
def info_nce_kernel(
    queries, keys, labels, losses, gradient, tau, B, N,
    query_stride_g, query_stride_b, key_stride_g, key_stride_n, D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of a client's queries: their part of the loss and, unless `gradient` is None, their
    d(query). Grid (tiles of BLOCK_B queries, clients).
    """
    tile, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    in_batch = b < B
    label = tl.load(labels + g * B + b, mask=in_batch, other=0)
    is_valid = (label >= 0) & (label < N)  # a label out of range gives NaN, and reads nothing
    keys += g * key_stride_g
    query_rows = queries + g * query_stride_g + b.to(tl.int64)[:, None] * query_stride_b

    # Of the positive: logit and norm. Of all other keys: the largest logit so far (finite from the
    # start: -inf - -inf is NaN), and the sums of exp(x - row_max) and of exp(x - row_max) k^.
    positive = tl.zeros((BLOCK_B,), tl.float32)
    positive_norm = tl.zeros((BLOCK_B,), tl.float32)
    query_norm = tl.zeros((BLOCK_B,), tl.float32)
    row_max = tl.full((BLOCK_B,), -1e38, tl.float32)
    exp_sum = tl.zeros((BLOCK_B,), tl.float32)
    weighted_keys = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_keys = n < N
        key_rows = keys + n.to(tl.int64)[:, None] * key_stride_n
        products, query_squares, key_squares = multiply(
            query_rows, key_rows, in_batch, in_keys, D, PRECISION, BLOCK_B, BLOCK_N, CHUNK
        )
        query_norm, key_norm = norm(query_squares), norm(key_squares)
        # Exact divisions: with rounded inverses, errors would grow with the logit.
        cosine = tl.div_rn(products, query_norm[:, None] * key_norm[None, :])
        logits = tl.div_rn(cosine, tau)

        is_positive = n[None, :] == label[:, None]
        positive += tl.sum(tl.where(is_positive, logits, 0.0), 1)
        positive_norm += tl.sum(tl.where(is_positive, key_norm[None, :], 0.0), 1)
        logits = tl.where(is_positive | ~in_keys[None, :], float("-inf"), logits)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        exp_logits = tl.exp(logits - new_max[:, None])
        shrink = tl.exp(row_max - new_max)
        exp_sum = exp_sum * shrink + tl.sum(exp_logits, 1)
        row_max = new_max
        if gradient is not None:
            k = load(key_rows, d, in_keys, D, BLOCK_D)
            weights = tl.div_rn(exp_logits, key_norm[None, :])
            weighted_keys *= shrink[:, None]
            weighted_keys = tl.dot(weights, k, weighted_keys, input_precision=PRECISION)

    new_max = tl.maximum(row_max, positive)
    shrink = tl.exp(row_max - new_max)
    total = exp_sum * shrink + tl.exp(positive - new_max)
    loss = tl.where(is_valid, tl.log(total) + (new_max - positive), float("nan"))
    loss = tl.sum(tl.where(in_batch, loss, 0.0), 0) / B
    tl.store(losses + g * tl.num_programs(0) + tile, loss)

    if gradient is not None:
        # tau g = sum_{n != y} p_n k^_n - (sum_{n != y} p_n) k^_y
        k_y = load(keys + label[:, None] * key_stride_n, d, in_batch & is_valid, D, BLOCK_D)
        positive_weight = tl.div_rn(exp_sum, positive_norm)
        to_probability = tl.div_rn(shrink, total)
        tau_g = (weighted_keys - positive_weight[:, None] * k_y) * to_probability[:, None]
        q = load(query_rows, d, in_batch, D, BLOCK_D) * tl.div_rn(1.0, query_norm)[:, None]
        # Below F.normalize's 1e-12 a query is divided by that constant: no part to remove.
        along = tl.where(query_norm > 1e-12, tl.sum(q * tau_g, 1), 0.0)
        scale = tl.where(is_valid, tl.div_rn(1.0, query_norm * (tau * B)), float("nan"))
        tl.store(
            gradient + (g * B + b)[:, None] * D + d[None, :],
            (tau_g - q * along[:, None]) * scale[:, None],
            mask=in_batch[:, None] & (d < D)[None, :],
        )


@triton.jit
def multiply(
    query_rows, key_rows, in_batch, in_keys, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """q . k of a block of each and, on the way, the sums of squares of both."""
    products = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    query_squares = tl.zeros((BLOCK_B,), tl.float32)
    key_squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        q = load(query_rows, d, in_batch, D, CHUNK)
        k = load(key_rows, d, in_keys, D, CHUNK)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
        query_squares += tl.sum(q * q, 1)
        key_squares += tl.sum(k * k, 1)
    return products, query_squares, key_squares


@triton.jit
def load(rows, d, exists, D: tl.constexpr, SIZE: tl.constexpr):
    """SIZE columns d, as float32, of the rows that exist, and zeros elsewhere."""
    mask = exists[:, None]
    if D % SIZE != 0:
        mask = mask & (d < D)[None, :]
    return tl.load(rows + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm(squares):
    """max(|v|, 1e-12), as F.normalize has it, from a sum of squares."""
    return tl.maximum(tl.sqrt_rn(squares), 1e-12)


@triton.jit
def add_tiles_kernel(losses, total, tiles, BLOCK: tl.constexpr):
    """total[g] = sum of losses[g, :], always in the same order. Grid (clients,)."""
    g = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        sums += tl.load(losses + g * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(total + g, tl.sum(sums, 0))


ADD_TILES = {"BLOCK": 128, "num_warps": 1}


def block_sizes(N: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile shape and launch options, by the keys alone: they depend on neither G nor B."""
    block_d = max(16, triton.next_power_of_2(D))
    # A block of keys passes through shared memory, of which many devices have 99 KiB a program;
    # only wide float32 rows go straight from memory to registers.
    few = N <= 16 or (block_d > 512 and dtype != torch.float32)
    return {
        "BLOCK_B": 8,  # a client's batch of 64 is eight programs, side by side
        "BLOCK_N": 16 if few else 32,
        "BLOCK_D": block_d,
        "CHUNK": min(64, block_d),
        "num_warps": 8 if block_d > 256 else 4,
        "num_stages": 4,  # chunks under way at once: most of a small call's time is latency
    }


def launch(
    queries: Tensor, keys: Tensor, labels: Tensor, tau: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss [G], and d(query) for an upstream gradient of 1, or empty; both float32."""
    (G, B, D), N = (1, *queries.shape)[-3:], keys.shape[-2]
    dq = queries.new_empty(queries.shape if gradient else (0,), dtype=torch.float32)
    queries, labels = _rows(queries).expand(G, B, D), labels.contiguous()
    keys = _rows(keys).expand(G, N, D)  # of shared keys the stride is 0
    blocks = block_sizes(N, D, queries.dtype)
    tiles = triton.cdiv(B, blocks["BLOCK_B"])
    losses = queries.new_empty((G, tiles), dtype=torch.float32)
    with on_device(queries):
        info_nce_kernel[(tiles, G)](
            queries=queries,
            keys=keys,
            labels=labels,
            losses=losses,
            gradient=dq if gradient else None,
            tau=tau,
            B=B,
            N=N,
            query_stride_g=queries.stride(0),
            query_stride_b=queries.stride(1),
            key_stride_g=keys.stride(0),
            key_stride_n=keys.stride(1),
            D=D,
            PRECISION=PRECISION,
            **blocks,
        )
        if tiles == 1:
            return losses.view(G), dq
        loss = losses.new_empty(G)
        add_tiles_kernel[(G,)](losses=losses, total=loss, tiles=tiles, **ADD_TILES)
    return loss, dq


@torch.library.custom_op("semanticfl_ref::info_nce", mutates_args=())
def info_nce_operator(
    queries: Tensor, keys: Tensor, labels: Tensor, tau: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """`launch` as an operator, which torch.compile and autograd know; its loss is [] or [G].

    d(query) stays float32 until it is multiplied by the upstream gradient: in float16 a row's part
    of a mean would vanish before the loss scale, which is there to prevent that, arrives.
    """
    loss, dq = launch(queries, keys, labels, tau, gradient)
    return loss.view(queries.shape[:-2]), dq


@info_nce_operator.register_fake
def _(queries, keys, labels, tau, gradient):
    loss = queries.new_empty(queries.shape[:-2], dtype=torch.float32)
    return loss, queries.new_empty(queries.shape if gradient else (0,), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, through_gradient):
    if through_gradient is not None:
        raise RuntimeError("info_nce: the kernel has no second derivative; pass impl='torch'")
    if upstream is None:
        return (None,) * 5
    (dq,) = ctx.saved_tensors
    return (dq * upstream[..., None, None]).to(ctx.dtype), None, None, None, None


info_nce_operator.register_autograd(_backward, setup_context=_save)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.05,
    *,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor:
    """Mean InfoNCE loss of queries against keys, by the label of each query.

    Equals `F.cross_entropy(normalize(q) @ normalize(k).T / temperature, labels)` in float32,
    without allocating the logits on a GPU. The kernel takes up to 1024 keys of up to 1024 features
    that want no gradient, a temperature that is a number, and at least one query.

    Equation (info-nce) [van den Oord et al. 2018, Eq. 4]:
        l_b = log sum_n exp(x_bn) - x_{b, y_b},  x_bn = q_b . k_n / (|q_b| |k_n| tau)
    Test: tests/kernels/test_info_nce.py::test_orthonormal_keys_and_aligned_queries,
        tests/kernels/test_info_nce.py::test_reference_by_finite_differences

    Args:
        queries: float32, bfloat16, float16 or float64 (torch only), [B, D], or [G, B, D]: G
            independent losses, one per client.
        keys: [N, D], shared by all clients, or [G, N, D]. If queries and keys have two dtypes, both
            are converted to their common type (`torch.promote_types`).
        labels: int64 [B] or [G, B], the positive key of each query, 0 ... N - 1.
        temperature: tau > 0, a number or a tensor of one element.
        impl: "auto" (for CUDA tensors and N <= 64 G the kernel, if it takes the call, else torch),
            "torch", or "triton" (the kernel or an error); see `dispatch`.
        validate: check the values of labels and of a temperature tensor, which waits for a GPU.
            Unchecked, one label out of range makes its client's loss NaN in the kernel; in torch it
            is an IndexError on a CPU, and on a GPU an assertion that ends the CUDA context.

    Returns:
        float32 (float64 for float64) in nats, [] or [G]; the mean of no queries is NaN. All keys
        alike give log N; orthonormal keys and q = its own key give log(1 + (N - 1) exp(-1 / tau)).
        Gradients have the inputs' dtype.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes, dtypes or devices that do not fit; a temperature that is not a positive
            number in float32's range (a tensor on a GPU or under `torch.compile`: with `validate`);
            with `validate`, labels out of range; `impl` unknown, or "triton" where it cannot run.

    Source: van den Oord et al. 2018 (Eq. 4); the contrastive term of SemanticFL's client objective
    (arXiv 2603.19337, tau = 0.05 as summarised second-hand).
    """
    _check(queries, keys, labels)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    computed = torch.promote_types(dtype, torch.float32)
    require_positive("temperature", temperature, computed, queries.device, validate)
    if validate:
        _check_labels(labels, keys.shape[-2])

    def reference() -> Tensor:
        return info_nce_reference(queries, keys, labels, temperature)

    def kernel() -> Tensor:
        q, gradient = queries.to(dtype), torch.is_grad_enabled() and queries.requires_grad
        return info_nce_operator(q, keys.to(dtype), labels, float(temperature), gradient)[0]

    obstacle = _obstacle(queries, keys, temperature)
    pays = keys.shape[-2] <= KEYS_THAT_PAY * labels.shape[:-1].numel()
    if implementation(impl, queries, keys, obstacle=obstacle, pays=pays) == "torch":
        return reference()
    if torch.compiler.is_compiling():  # whether the kernel can be compiled shows in the run
        return kernel()
    return with_fallback(kernel, reference, impl)


def _obstacle(queries: Tensor, keys: Tensor, temperature: float | Tensor) -> str | None:
    """What the kernel does not take in this call."""
    if isinstance(temperature, Tensor):
        return "a temperature that is a tensor"
    if keys.requires_grad and torch.is_grad_enabled():
        return "keys that want a gradient"
    if keys.shape[-2] > MOST_KEYS:
        return f"more than {MOST_KEYS} keys"
    if keys.shape[-1] > MOST_FEATURES:
        return f"more than {MOST_FEATURES} features"
    return "no queries" if queries.numel() == 0 else None


def _rows(vectors: Tensor) -> Tensor:
    """Vectors whose features lie side by side."""
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _check(queries: Tensor, keys: Tensor, labels: Tensor) -> None:
    require_tensors(queries=queries, keys=keys, labels=labels)
    require_floating(queries=queries, keys=keys)
    q, k = tuple(queries.shape), tuple(keys.shape)
    same_clients = len(k) == 2 or k[:-2] == q[:-2]
    if len(q) not in (2, 3) or len(k) not in (2, len(q)) or q[-1] != k[-1] or not same_clients:
        raise ValueError(
            f"queries {q} and keys {k}: their shapes do not fit; expected [B, D] and [N, D], or "
            "[G, B, D] and [N, D] or [G, N, D]"
        )
    if 0 in k[-2:]:
        raise ValueError(f"keys {k}: must have at least one row and one feature")
    if tuple(labels.shape) != q[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}: expected one int64 per query, {q[:-1]}"
        )


def _check_labels(labels: Tensor, N: int) -> None:
    low, high = (0, 0) if labels.numel() == 0 else map(int, labels.aminmax())
    if low < 0 or high >= N:
        raise ValueError(f"labels from {low} to {high}, {N} keys: expected 0 ... {N - 1}")
