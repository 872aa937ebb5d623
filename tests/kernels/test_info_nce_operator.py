"""InfoNCE's kernel as a torch operator: registration, tracing autocast, CUDA graphs."""

import pytest
import torch
from info_nce_cases import derive, draw, inputs

from semanticfl_ref.kernels.dispatch import IMPORT_ERROR
from semanticfl_ref.kernels.info_nce import info_nce, info_nce_operator

# NumPy's, where the interpreter meets what a mask leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(IMPORT_ERROR is not None, reason="no Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_triton
@pytest.mark.parametrize(("clients", "dtype"), [(None, torch.float32), (2, torch.bfloat16)])
def test_opcheck(clients, dtype, device):
    q, k, y = inputs((clients, 9, 5, 9), dtype, device)
    for gradient in (True, False):
        torch.library.opcheck(info_nce_operator, (q, k, y, 0.1, gradient))
    # The remaining test derives all outputs, and d(query) has no derivative.
    registered = ("test_schema", "test_autograd_registration", "test_faketensor")
    learnt = (q.clone().requires_grad_(), k, y, 0.1, True)
    torch.library.opcheck(info_nce_operator, learnt, test_utils=registered)


@pytest.mark.parametrize("learn", [False, True])
def test_in_a_compiled_function_with_its_gradients(learn, preferred, device):
    """Without a break in the graph."""
    q, k, y = inputs((None, 7, 7, 12), device=device)

    def loss(q, k=k, tau=0.1):
        return 2 * info_nce(q, k, y, tau, impl=preferred)

    leaves = (q, k, torch.tensor(0.1, device=device)) if learn else (q,)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(derive(compiled, *leaves), derive(loss, *leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("learn", [False, True])
def test_autocast_changes_nothing(learn, preferred, device):
    q, k, y = inputs((2, 7, 5, 12), device=device)

    def loss(q, k=k):
        return info_nce(q, k, y, 0.05, impl=preferred)

    def under_autocast(q, k=k):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return loss(q, k)

    leaves = (q, k) if learn else (q,)
    for ours, expected in zip(derive(under_autocast, *leaves), derive(loss, *leaves), strict=True):
        assert torch.equal(ours, expected)


@needs_triton
def test_a_second_derivative_is_refused(device):
    q, k, y = inputs((None, 4, 5, 8), device=device)
    q.requires_grad_()
    (first,) = torch.autograd.grad(info_nce(q, k, y, 0.1, impl="triton"), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), q)


@needs_cuda
@pytest.mark.parametrize("keys", [10, 33])
def test_in_a_cuda_graph_without_waiting(keys, device, check_capture):
    q, k, y = inputs((2, 40, keys, 24), device=device)
    q.requires_grad_()

    def work():
        loss = info_nce(q, k, y, 0.05)
        return loss, *torch.autograd.grad(loss.sum(), q)

    check_capture(work, lambda: q.copy_(draw(2, 40, 24, seed=7, device=device)))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_calls_run(dtype, device):
    """What compute-sanitizer watches in `bench/gpu.sh`. It has no time to compile: this leaves the
    kernels in Triton's cache for it.
    """
    from bench.gpu.checks import small_calls

    small_calls(device, (dtype,))
