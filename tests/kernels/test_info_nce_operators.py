"""InfoNCE's kernels as torch operators: registration, tracing without a break, autocast, CUDA
graphs.
"""

import pytest
import torch
from info_nce_cases import derive, draw, inputs

from semanticfl_ref.kernels.info_nce import info_nce

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # NumPy's, where the interpreter meets what a mask leaves out


@pytest.mark.parametrize(
    ("reduction", "clients", "dtype"), [("mean", None, torch.float32), ("none", 2, torch.bfloat16)]
)
def test_opcheck(reduction, clients, dtype, device):
    from semanticfl_ref.kernels.info_nce_operators import (
        info_nce_frozen,
        info_nce_streaming,
        info_nce_streaming_backward,
    )

    q, k, y = inputs((clients, 6, 5, 9), dtype, device)
    w, tau = draw(*y.shape, seed=3, device=device).abs(), torch.tensor(0.1, device=device)
    for gradient in (True, False):
        torch.library.opcheck(
            info_nce_frozen, (q, k, y, w, tau, 1.0, True, reduction, "ieee", gradient)
        )
    registered = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
    )  # the other test derives all outputs, and d(query) has no derivative
    torch.library.opcheck(
        info_nce_frozen,
        (q.clone().requires_grad_(), k, y, w, tau, 1.0, True, reduction, "ieee", True),
        test_utils=registered,
    )
    for normalize in (True, False):
        learnt = [tensor.clone().requires_grad_() for tensor in (q, k, tau)]
        torch.library.opcheck(
            info_nce_streaming,
            (*learnt[:2], y, w, None, learnt[2], 1.0, normalize, reduction, "ieee"),
        )
        loss, *saved = info_nce_streaming(q, k, y, w, None, tau, 1.0, normalize, reduction, "ieee")
        torch.library.opcheck(
            info_nce_streaming_backward,
            (
                torch.ones_like(loss),
                q,
                k,
                y,
                w,
                None,
                tau,
                *saved,
                1.0,
                normalize,
                "ieee",
                True,
                False,
                True,
            ),
        )


@pytest.mark.parametrize("form", ["frozen", "learn", "symmetric"])
def test_in_a_compiled_function_with_its_gradients(form, impl, device):
    """Without a break in the graph."""
    q, k, y = inputs((None, 7, 7, 12), device=device)
    w = draw(7, seed=3, device=device).abs()

    def loss(q, *learnt):
        keys, tau = learnt or (k, 0.1)
        return 2 * info_nce(
            q,
            keys,
            None if form == "symmetric" else y,
            tau,
            weights=w,
            symmetric=form == "symmetric",
            impl=impl,
        )

    given = (q,) if form == "frozen" else (q, k, torch.tensor(0.1, device=device))
    torch.compiler.reset()
    for ours, expected in zip(
        derive(torch.compile(loss, fullgraph=True, backend="aot_eager"), *given),
        derive(loss, *given),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("learn", [False, True])
def test_autocast_changes_nothing(learn, impl, device):
    q, k, y = inputs((2, 7, 5, 12), device=device)

    def loss(q, *keys):
        return info_nce(q, *(keys or (k,)), y, 0.05, impl=impl)

    def under_autocast(q, *keys):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return loss(q, *keys)

    given = (q, k) if learn else (q,)
    assert all(
        torch.equal(ours, expected)
        for ours, expected in zip(derive(under_autocast, *given), derive(loss, *given), strict=True)
    )


@pytest.mark.parametrize("keys", [5, 300])
def test_a_second_derivative_is_refused(keys, device):
    q, k, y = inputs((None, 4, keys, 8), device=device)
    q.requires_grad_()
    (first,) = torch.autograd.grad(info_nce(q, k, y, 0.1, impl="triton"), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("learn", [False, True])
def test_in_a_cuda_graph_without_waiting(learn, device):
    q, k, y = inputs((2, 40, 33, 24), device=device)
    q.requires_grad_(), k.requires_grad_(learn)

    def work():
        loss = info_nce(q, k, y, 0.05)
        return loss, *torch.autograd.grad(loss.sum(), (q, k) if learn else (q,))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    with torch.no_grad():
        q.copy_(draw(2, 40, 24, seed=7, device=device))
    graph.replay()
    assert all(torch.equal(got, expected) for got, expected in zip(results, work(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_calls_run(dtype, device):
    """What compute-sanitizer watches in `bench/gpu.sh`. It has no time to compile: this leaves the
    kernels in Triton's cache for it.
    """
    from bench.gpu_checks import small_calls

    small_calls(device, (dtype,))
