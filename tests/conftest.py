"""A small job that tests share, and one unbroken run of it.

Tests run on the CPU, so that they are the same everywhere. With SEMANTICFL_TESTS=cuda those of the
kernels (tests/kernels) run natively, and replicas are compared on the device too.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported; a benchmark measures what there is.
if os.environ.get("SEMANTICFL_TESTS") != "cuda" and "--benchmark-only" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from processes import JOB, run_cli

if not torch.cuda.is_available():
    # Kernels run on the CPU through Triton's interpreter. Triton reads this when it is imported,
    # which some libraries do: before any test's module is.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and lose much where the cores are busy.

    A run in this process sets the number of threads, on which the last bits depend.
    """
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Features are computed once a session; a user's cache is neither used nor changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def job() -> list[str]:
    """Flags of a job of some seconds."""
    return list(JOB)


@pytest.fixture(scope="session")
def unbroken_run(tmp_path_factory) -> Path:
    """The folder of the small job, run to its end without a break."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = run_cli("train", *JOB, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def pytest_addoption(parser):
    parser.addoption(
        "--campaign-scale",
        type=float,
        default=1.0,
        metavar="N",
        help="tests/campaign with N times as many random cases (default: %(default)s)",
    )
