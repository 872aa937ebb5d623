"""Where the kernels' tests run: natively on a GPU, through Triton's interpreter elsewhere; and
guards around their buffers.
"""

from collections.abc import Callable

import pytest
import torch

GUARD = 64  # entries on each side


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that has the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def impl(request) -> str:
    """Both implementations. The second is really Triton's: no test passes because it fell back to
    torch.
    """
    from semanticfl_ref.kernels.dispatch import implementation

    if request.param == "triton":
        pytest.importorskip("triton")
        tensor = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
        assert implementation("triton", tensor) == "triton"
    return request.param


@pytest.fixture
def guarded() -> Callable[..., torch.Tensor]:
    """Makes a copy of a tensor that lies in the middle of a buffer of NaN (of a sentinel, for
    integers); afterwards every buffer's guard must be untouched.

    What reads outside the tensor meets NaN, and what writes outside it is found when the test ends.
    """
    buffers = []

    def place(tensor: torch.Tensor) -> torch.Tensor:
        sentinel = float("nan") if tensor.is_floating_point() else -(2**30)
        buffer = torch.full(
            (tensor.numel() + 2 * GUARD,), sentinel, dtype=tensor.dtype, device=tensor.device
        )
        inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)
        buffers.append((buffer, tensor.numel()))
        return inner

    yield place
    for buffer, size in buffers:
        for edge in (buffer[:GUARD], buffer[GUARD + size :]):
            untouched = edge.isnan() if edge.is_floating_point() else edge == -(2**30)
            assert bool(untouched.all()), "a kernel wrote outside its buffer"
