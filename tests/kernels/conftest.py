"""Where the kernels' tests run: natively on a GPU, through Triton's interpreter elsewhere; guards
around their buffers; and the checks that a call can be captured in a CUDA graph, and that torch
takes over where the compiler refuses.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import pytest
import torch

GUARD = 64  # entries on each side
SENTINEL = -(2**30)  # in the guards of integers


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that has the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def impl(request, device) -> str:
    """Both implementations. The second is really Triton's: no test passes because it fell back to
    torch.
    """
    from semanticfl_ref.kernels.dispatch import implementation

    if request.param == "triton":
        pytest.importorskip("triton")
        assert implementation("triton", torch.empty(0, device=device)) == "triton"
    return request.param


@pytest.fixture
def preferred(impl, monkeypatch) -> str:
    """Both implementations as a preference of the environment, for calls that the kernel may not
    take.
    """
    monkeypatch.setenv("SEMANTICFL_KERNELS", impl)
    return "auto"


@pytest.fixture
def guarded() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Makes a copy of a tensor that lies in the middle of a buffer of NaN (of a sentinel, for
    integers); afterwards every buffer's guard must be untouched.

    What reads outside the tensor meets NaN, and what writes outside it is found when the test ends.
    """
    buffers = []

    def place(tensor: torch.Tensor) -> torch.Tensor:
        sentinel = float("nan") if tensor.is_floating_point() else SENTINEL
        size = (tensor.numel() + 2 * GUARD,)
        buffer = torch.full(size, sentinel, dtype=tensor.dtype, device=tensor.device)
        inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)
        buffers.append((buffer, tensor.numel()))
        return inner

    yield place
    for buffer, size in buffers:
        for edge in (buffer[:GUARD], buffer[GUARD + size :]):
            untouched = edge.isnan() if edge.is_floating_point() else edge == SENTINEL
            assert bool(untouched.all()), "a kernel wrote outside its buffer"


@pytest.fixture
def guarded_outputs(guarded, monkeypatch) -> list[torch.Tensor]:
    """Every tensor that a launch allocates lies between guards and holds NaN (or the sentinel)
    before; the list collects them.
    """
    new_empty, outputs = torch.Tensor.new_empty, []

    def guarded_new_empty(self: torch.Tensor, *size, **options) -> torch.Tensor:
        tensor = new_empty(self, *size, **options)
        if "device" in options:  # the interpreter's own
            return tensor
        sentinel = float("nan") if tensor.is_floating_point() else SENTINEL
        outputs.append(guarded(tensor.fill_(sentinel)))
        return outputs[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new_empty)
    return outputs


@pytest.fixture
def check_capture() -> Callable[..., None]:
    """Checks that `work` waits for no GPU, and that a CUDA graph of it, replayed after
    `change_inputs`, gives what it gives, bit for bit.
    """

    def check(
        work: Callable[[], tuple[torch.Tensor, ...]], change_inputs: Callable[[], None]
    ) -> None:
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
            change_inputs()
        graph.replay()
        for replayed, expected in zip(results, work(), strict=True):
            assert torch.equal(replayed, expected)

    return check


@pytest.fixture
def refused_by_the_compiler(monkeypatch) -> Callable[[ModuleType], AbstractContextManager]:
    """A function: a kernel's module -> a context in which its launches are chosen, and refused as
    the compiler does; one warning has to come of it.
    """
    from triton.runtime.errors import OutOfResources

    from semanticfl_ref.kernels import dispatch

    def refuse(*arguments):
        raise OutOfResources(300, 227, "shared memory")

    @contextmanager
    def refused(module: ModuleType) -> Iterator[None]:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in {"_unusable": None, "_examined": True}.items():
            monkeypatch.setattr(dispatch, name, value)
        monkeypatch.setattr(module, "implementation", lambda *given, **_: "triton")
        monkeypatch.setattr(module, "launch", refuse)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        assert len(caught) == 1 and "shared memory" in str(caught[0].message)

    return refused
