"""GroupNorm and SiLU as a torch operator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from semanticfl_ref.kernels import dispatch
from semanticfl_ref.kernels import group_norm_silu as module
from semanticfl_ref.kernels.group_norm_silu import group_norm_silu, group_norm_silu_operator

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(dispatch.IMPORT_ERROR is not None, reason="no Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(preferred, device, dtype, affine):
    x = maps(device=device, dtype=dtype)
    ones = torch.ones(6, dtype=dtype, device=device)
    vectors = (ones, ones, 1e-5, ones) if affine else (None, None, 1e-5, None)
    for given in (x, x.contiguous(), x.flatten(2)):
        torch.library.opcheck(group_norm_silu_operator, (given, 3, *vectors, affine, preferred))


def test_fake_tensors_have_the_strides_of_real_ones():
    real = [maps(), maps().contiguous(), maps().flatten(2), maps()[:, :, :1, :1], maps()[:, ::2]]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in real]
        found = [group_norm_silu(x, 3) for x in fakes]
        with pytest.raises(ValueError, match="4 groups"):
            group_norm_silu(fakes[0], 4)
    for x, y in zip(real, found, strict=True):
        expected = group_norm_silu(x, 3)
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, expected.stride())


def test_in_a_compiled_function(preferred, device):
    """Without a break in the graph, for two sizes of map."""

    def block(x, bias):
        return 2 * group_norm_silu(x, 3, shift_C=bias, impl=preferred)

    torch.compiler.reset()
    compiled, bias = torch.compile(block, fullgraph=True, backend="aot_eager"), torch.ones(6)
    bias = bias.to(device)
    for side in (4, 5):
        x = maps(side, device=device)
        assert torch.equal(compiled(x, bias), block(x, bias))
        assert compiled(x, bias).stride() == block(x, bias).stride()


def test_autocast_changes_nothing(impl, device):
    x = maps(device=device)
    expected = group_norm_silu(x, 3, impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(group_norm_silu(x, 3, impl=impl), expected)


@needs_cuda
def test_in_a_cuda_graph_without_waiting(device, check_capture):
    x, ones = maps(40, device=device, dtype=torch.float16), torch.ones(6, device=device).half()

    def work() -> tuple[torch.Tensor, ...]:
        y = group_norm_silu(x, 3, ones, ones, impl="triton")
        return y, group_norm_silu(y, 2, shift_C=ones, silu=False, impl="triton")

    check_capture(work, lambda: x.copy_(torch.randn_like(x)))


@needs_triton
def test_a_kernel_that_cannot_be_compiled_is_replaced(device, refused_by_the_compiler):
    """The compiler refuses: calls go on in torch, after one warning."""
    x = maps(device=device)
    expected = group_norm_silu(x, 3, impl="torch")
    with refused_by_the_compiler(module):
        for _ in range(2):
            assert torch.equal(group_norm_silu(x, 3), expected)


@needs_triton
def test_large_batches_do_not_overflow_an_offset(device, monkeypatch):
    """Programs are numbered by images, chunks and blocks; where an image begins is computed in 64
    bits. The launches of 300 images of Stable Diffusion's first level, 2.4 billion entries, as
    recorded.
    """

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append((grid, arguments))

    launches = []
    for name in ("statistics_kernel", "group_norm_kernel"):
        monkeypatch.setattr(module, name, Recorder())
    x = torch.empty(1, 300, 256, 256, 128, device="meta")[0].movedim(-1, 1)
    y = module.launch(x, 32, None, None, 1e-5, None, True)
    assert y.shape == x.shape and y.stride() == x.stride()
    (grid, first), (again, second) = launches
    assert grid == again == (300 * 64,)
    assert first["means"].shape == second["squares"].shape == (300, 64, 32)
    assert (first["S"], first["chunk_size"], first["C"]) == (65_536, 1024, 128)
    launches.clear()
    module.launch(x[:2, :, :16, :16].contiguous(), 32, None, None, 1e-5, None, True)
    assert [arguments["means"] for _, arguments in launches] == [None], "one launch"


@needs_triton
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_maps_of_any_alignment_take_the_same_compiled_kernel(device, monkeypatch, offset):
    """Triton compiles for addresses that 16 divides apart from others, and the layout of a tile, so
    the order of its sums, depends on it.
    """

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: addresses.append(arguments["x"].data_ptr() % 16)

    addresses = []
    buffer = torch.randn(2 * 9 * 16 + 8, device=device)
    x = buffer[offset : offset + 2 * 9 * 16].view(2, 9, 16).movedim(-1, 1)
    expected = group_norm_silu(x.clone(), 4, impl="triton")
    assert torch.equal(group_norm_silu(x, 4, impl="triton"), expected)
    monkeypatch.setattr(module, "group_norm_kernel", Recorder())
    module.launch(x, 4, None, None, 1e-5, None, True)
    assert addresses == [0]


def maps(side: int = 4, *, device="cpu", dtype=torch.float32) -> torch.Tensor:
    source = torch.Generator().manual_seed(side)
    x = torch.randn(2, side, 5, 6, generator=source).to(dtype).to(device)
    return x.movedim(-1, 1)
