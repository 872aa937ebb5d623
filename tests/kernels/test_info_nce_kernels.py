"""InfoNCE's Triton kernels against float64, by the rule that torch's own error sets; and their
bits: guards, repeats, cuts.
"""

import weakref

import pytest
import torch
from info_nce_cases import NAMES, assert_as_exact_as_eager, derive, draw, eager, factors_of, inputs

from semanticfl_ref.kernels.info_nce import info_nce

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # (clients, B, N, D), keys shared by the clients
    "training": ((None, 64, 10, 512), True),
    "ragged": ((2, 70, 37, 100), True),
    "one of each": ((None, 1, 1, 1), True),
    "own keys": ((3, 5, 200, 33), False),
    "beyond 256 keys": ((None, 150, 300, 64), True),
    "wide": ((2, 17, 130, 530), True),
}


@pytest.mark.parametrize("learn", [False, True], ids=["frozen keys", "keys and temperature learn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape, dtype, learn, device):
    size, shared = SHAPES[shape]
    q, k, y = inputs(size, dtype, device, shared)
    check(q, k, y, 0.05, learn, weights=draw(*y.shape, seed=3, device=device).abs())


@pytest.mark.parametrize("tau", [0.005, 0.01, 1.0])
@pytest.mark.parametrize("learn", [False, True], ids=["frozen keys", "keys and temperature learn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_eager_on_hard_inputs(dtype, learn, tau, device):
    """A query that is its own key, one that is opposite to it, equal queries and equal keys, a row
    for whom another key dominates; lengths from 0.01 to 100.
    """
    q, k, y = inputs((None, 19, 21, 48), dtype, device)
    k[7] = k[3]
    q[0], q[1], q[2] = k[y[0]], -k[y[1]], k[(y[2] + 1) % 21]
    q[5] = q[4]
    lengths = torch.logspace(-2, 2, 19, device=device).to(dtype)
    check(q * lengths[:, None], k, y, tau, learn, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ["diagonal", "symmetric", "raw"])
def test_forms_and_reductions(options, reduction, device):
    q, k, y = inputs((2, 37, 37, 20), device=device, shared=options == "raw")
    weights = draw(2, 37, seed=3, device=device).abs() if reduction != "none" else None
    labels, normalize = (y, False) if options == "raw" else (None, True)
    check(
        q,
        k,
        labels,
        1.5,
        True,
        normalize=normalize,
        weights=weights,
        reduction=reduction,
        symmetric=options == "symmetric",
    )
    if options != "symmetric":
        check(q, k, labels, 1.5, False, normalize=normalize, weights=weights, reduction=reduction)


def test_tf32_is_near(device):
    q, k, y = inputs((None, 40, 50, 64), device=device)
    for ours, exact in zip(
        results(info_nce, q, k, y, 0.1, True, impl="triton", precision="tf32"),
        results(eager, q.double(), k.double(), y, 0.1, True),
        strict=True,
    ):
        torch.testing.assert_close(
            ours.double(), exact, rtol=0, atol=5e-3 * exact.abs().max().item()
        )


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_two_dtypes_are_taken_in_the_wider_one(dtypes, learn, device):
    (q, k, y), wider = inputs((None, 9, 7, 20), device=device), torch.promote_types(*dtypes)
    q, k = q.to(dtypes[0]), k.to(dtypes[1])
    ours, expected = (
        results(info_nce, q, k, y, 0.1, learn, impl="triton"),
        results(info_nce, q.to(wider), k.to(wider), y, 0.1, learn, impl="triton"),
    )
    assert ours[1].dtype == dtypes[0] and (not learn or ours[2].dtype == dtypes[1])
    assert all(
        torch.equal(our, other.to(our.dtype)) for our, other in zip(ours, expected, strict=True)
    )


@pytest.mark.parametrize("learn", [False, True])
def test_strides_do_not_matter(learn, device):
    q, k, y = inputs((3, 11, 13, 24), device=device, shared=False)
    strided_q = q.repeat_interleave(2, 2)[:, :, ::2]
    strided_k = torch.zeros(13, 3, 30, device=device).transpose(0, 1)
    strided_k[:, :, :24] = k
    strided = (strided_q, strided_k[:, :, :24], y.T.contiguous().T)
    assert not any(tensor.is_contiguous() for tensor in strided)
    leaves = (
        (lambda q, k: info_nce(q, k, strided[2], 0.1, impl="triton")),
        (lambda q, k: info_nce(q, k, y, 0.1, impl="triton")),
    )
    given = [
        [t.detach().requires_grad_(learn or i == 0) for i, t in enumerate(pair)]
        for pair in (strided[:2], (q, k))
    ]
    for ours, expected in zip(
        *(
            torch.autograd.grad(loss(*pair).sum(), pair if learn else pair[:1])
            for loss, pair in zip(leaves, given, strict=True)
        ),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    shared = info_nce(q, k[:1].expand(3, 13, 24), y, 0.1, impl="triton")
    assert torch.equal(shared, info_nce(q, k[0], y, 0.1, impl="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learn", [False, True])
def test_guards_stay_and_every_entry_is_written(learn, dtype, guarded, device, monkeypatch):
    """What is read lies between NaN, what is written too and is NaN before: results without a NaN
    were read and written where they should be.
    """
    q, k, y = inputs((2, 35, 18, 21), dtype, device)
    w, tau = draw(2, 35, seed=3, device=device).abs(), torch.tensor(0.1, device=device)
    expected = results(info_nce, q, k, y, tau, learn, impl="triton", weights=w)
    q, k, y, w, tau = (guarded(tensor) for tensor in (q, k, y, w, tau))
    new_empty, counted = torch.Tensor.new_empty, []

    def guarded_new_empty(self, *size, **options):
        if "device" in options:  # the interpreter's own
            return new_empty(self, *size, **options)
        counted.append(size)
        return guarded(new_empty(self, *size, **options).fill_(float("nan")))

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new_empty)
    leaves = [tensor.requires_grad_() for tensor in ((q, k, tau) if learn else (q,))]
    loss = info_nce(q, k, y, tau, weights=w, impl="triton")
    gradients = torch.autograd.grad(
        (loss * torch.linspace(0.5, 2.5, 2, device=device)).sum(), leaves
    )
    monkeypatch.undo()
    assert len(counted) >= (8 if learn else 2)
    for our, other in zip((loss, *gradients), expected, strict=True):
        assert torch.equal(our.detach(), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_gives_the_same_bits(dtype, device):
    q, k, y = inputs((2, 70, 33, 40), dtype, device)
    for learn in (False, True):
        first, second = (results(info_nce, q, k, y, 0.05, learn, impl="triton") for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_the_residuals_are_cut_changes_no_bit(dtype, device, monkeypatch):
    from semanticfl_ref.kernels import info_nce_gradient

    for shared in (True, False):
        q, k, y = inputs((2, 140, 130, 12), dtype, device, shared)
        whole = results(info_nce, q, k, y, 0.05, True, impl="triton")
        assert len(info_nce_gradient.cuts(2, 140, 130, 4)) == 1
        with monkeypatch.context() as patch:
            patch.setattr(info_nce_gradient, "SPACE", 128 * 128 * 4)
            patch.setattr(info_nce_gradient, "COLUMNS", 128)
            assert len(info_nce_gradient.cuts(2, 140, 130, 4)) == 8
            cut = results(info_nce, q, k, y, 0.05, True, impl="triton")
        assert all(torch.equal(one, other) for one, other in zip(whole[:3], cut[:3], strict=True))
        torch.testing.assert_close(
            whole[3], cut[3], rtol=1e-6, atol=0
        )  # summed in float64 over the blocks


def test_one_block_of_residuals_is_held_at_a_time(device, monkeypatch):
    """A block that outlived the making of the next would double the memory that K6 limits."""
    from semanticfl_ref.kernels import info_nce_gradient

    q, k, y = inputs((None, 140, 130, 12), device=device)
    monkeypatch.setattr(info_nce_gradient, "SPACE", 128 * 128 * 4)
    monkeypatch.setattr(info_nce_gradient, "COLUMNS", 128)
    launch_residual, seen = info_nce_gradient.launch_residual, []

    def watched(*arguments):
        assert not any(block() is not None for block in seen)
        seen.append(weakref.ref(arguments[9]))
        return launch_residual(*arguments)

    monkeypatch.setattr(info_nce_gradient, "launch_residual", watched)
    results(info_nce, q, k, y, 0.05, True, impl="triton")
    assert len(seen) == 4


def test_cuts_cover_every_pair_once():
    from semanticfl_ref.kernels import info_nce_gradient

    for G, B, N in (
        (5, 64, 200),
        (2, 9000, 5000),
        (1, 65536, 65536),
        (3, 40000, 1000),
        (700, 300, 300),
        (2, 3_000_000, 1),
        (0, 4, 4),
        (4, 0, 4),
    ):
        blocks = info_nce_gradient.cuts(G, B, N, 2)
        sizes = [(g.stop - g.start) * (b.stop - b.start) * (n.stop - n.start) for g, b, n in blocks]
        assert sum(sizes) == G * B * N
        assert all(
            (g.stop - g.start) * (b.stop - b.start) * info_nce_gradient.padded(n.stop - n.start) * 2
            <= info_nce_gradient.SPACE
            for g, b, n in blocks
        )
        assert len({(g.start, b.start, n.start) for g, b, n in blocks}) == len(blocks)
        assert all(b.start % 128 == 0 and n.start % 128 == 0 for _, b, n in blocks)


@pytest.mark.parametrize("learn", [False, True])
def test_an_unchecked_bad_label_gives_nan_in_its_row_alone(learn, device):
    """What a GPU does without `validate`: the operator is called past the checks."""
    from semanticfl_ref.kernels.info_nce_operators import info_nce_triton

    q, k, y = inputs((None, 20, 7, 9), device=device)
    y[3], y[8] = 7, -1
    rows, dq, *dk = derive(
        lambda q, k=k: info_nce_triton(q, k, y, 0.1, True, None, "none", False, "ieee"),
        *((q, k) if learn else (q,)),
    )
    bad = torch.zeros(20, dtype=torch.bool, device=device)
    bad[3] = bad[8] = True
    assert (
        torch.equal(rows.isnan(), bad)
        and torch.equal(dq.isnan().all(1), bad)
        and torch.equal(dq.isnan().any(1), bad)
    )
    assert not dk or dk[0].isnan().all()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_vector_has_a_finite_gradient(dtype, learn, device):
    q, k, y = inputs((None, 6, 5, 8), dtype, device)
    q[2], k[3] = 0, 0
    ours = results(info_nce, q, k, y, 0.1, learn, impl="triton")
    assert ours[0].isfinite() and ours[1][[0, 1, 3, 4, 5]].isfinite().all()
    exact = results(eager, q.double(), k.double(), y, 0.1, learn)
    torch.testing.assert_close(
        ours[1][[0, 1, 3, 4, 5]].double(), exact[1][[0, 1, 3, 4, 5]], rtol=0.02, atol=1e-3
    )
    if dtype != torch.float16:  # divided by 1e-12, as F.normalize does: out of fp16's range
        torch.testing.assert_close(ours[1][2].double(), exact[1][2], rtol=0.02, atol=1e9)


def check(q, k, labels, tau, learn: bool, **options) -> None:
    """The kernels' loss and gradients have no larger errors than K7 allows: see
    `assert_as_exact_as_eager`.
    """
    ours, eagers = (
        results(info_nce, q, k, labels, tau, learn, impl="triton", **options),
        results(eager, q, k, labels, tau, learn, **options),
    )
    exact = results(eager, q.double(), k.double(), labels, tau, learn, **options)
    scales = {"d temperature": sum_of_magnitudes(q, k, labels, tau, **options)} if learn else None
    assert_as_exact_as_eager(ours, eagers, exact, NAMES[: len(ours)], scales)


def results(loss, q, k, labels, tau, learn: bool, **options) -> tuple[torch.Tensor, ...]:
    """Loss and d queries; with learn d keys and d temperature as well."""
    if not learn:
        return derive(lambda q: loss(q, k, labels, tau, **options), q)
    tau = torch.as_tensor(
        tau, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32, device=q.device
    )
    return derive(lambda q, k, tau: loss(q, k, labels, tau, **options), q, k, tau)


def sum_of_magnitudes(
    q, k, labels, tau, normalize=True, weights=None, reduction="mean", symmetric=False
) -> float:
    """Of the rows' contributions to the temperature's gradient, which cancel: the rounding of any
    one of them stays in the sum.
    """
    tau = torch.full((), tau, dtype=torch.float64, device=q.device)
    slopes = torch.autograd.functional.jacobian(
        lambda tau: eager(q.double(), k.double(), labels, tau, normalize, None, "none", symmetric),
        tau,
    )
    weights = torch.ones_like(slopes) if weights is None else weights.double()
    shares = weights / weights.sum(-1, keepdim=True) if reduction == "mean" else weights
    contributions = (
        shares * slopes.abs() if reduction == "none" else (shares * slopes.abs()).sum(-1)
    )
    return (contributions * factors_of(contributions)).sum().item()
