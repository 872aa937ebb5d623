"""Every branch of the choice between torch and Triton; none ends in an import error."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from semanticfl_ref.kernels import dispatch
from semanticfl_ref.kernels.dispatch import implementation, with_fallback

ROOT = Path(__file__).parents[2]
CPU = torch.empty(0)
CUDA = SimpleNamespace(is_cuda=True, dtype=torch.float32)  # all that is read of a tensor
CUDA_FLOAT64 = SimpleNamespace(is_cuda=True, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As at the start of a process: nothing examined, no variable set, the interpreter off."""
    monkeypatch.setattr(dispatch, "_unusable", None)
    monkeypatch.setattr(dispatch, "_examined", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("SEMANTICFL_KERNELS", raising=False)


@pytest.fixture
def usable_triton(monkeypatch):
    """A Triton that can be used, whether or not there is one."""
    monkeypatch.setattr(dispatch, "triton", SimpleNamespace(__version__="3.6.0+git1"))
    monkeypatch.setattr(dispatch, "IMPORT_ERROR", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chosen_with_warnings(*arguments) -> tuple[str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return implementation(*arguments), [str(w.message) for w in caught]


def test_an_obstacle_is_an_error_by_name_and_left_to_torch_otherwise(usable_triton, monkeypatch):
    with pytest.raises(ValueError, match=r"impl = 'triton' with no queries: .*use 'auto'"):
        implementation("triton", CUDA, obstacle="no queries")
    assert implementation("auto", CUDA, obstacle="no queries") == "torch"
    assert implementation("torch", CUDA, obstacle="no queries") == "torch"
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    assert implementation("auto", CUDA, obstacle="no queries") == "torch"
    assert implementation("auto", CUDA) == "triton"


def test_a_kernel_that_does_not_pay_has_to_be_asked_for(usable_triton, monkeypatch):
    assert implementation("auto", CUDA, pays=False) == "torch"
    assert implementation("triton", CUDA, pays=False) == "triton"
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    assert implementation("auto", CUDA, pays=False) == "triton"


@pytest.mark.parametrize(
    ("impl", "tensors", "expected"),
    [
        ("auto", [CPU], "torch"),
        ("auto", [CUDA, CUDA], "triton"),
        ("auto", [CUDA, CPU], "torch"),
        ("auto", [CUDA, CUDA_FLOAT64], "torch"),
        ("torch", [CUDA], "torch"),
        ("triton", [CUDA], "triton"),
    ],
)
def test_by_device_and_dtype(usable_triton, impl, tensors, expected):
    assert chosen_with_warnings(impl, *tensors) == (expected, [])


def test_cpu_tensors_by_name_need_the_interpreter(usable_triton, monkeypatch):
    with pytest.raises(ValueError, match=r"impl = 'triton' with CPU tensors.*TRITON_INTERPRET=1"):
        implementation("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert implementation("triton", CPU) == "triton"
    assert implementation("auto", CPU) == "torch"


@pytest.mark.parametrize(
    ("value", "tensor", "expected"),
    [
        ("torch", CUDA, "torch"),
        ("triton", CUDA, "triton"),
        ("auto", CUDA, "triton"),
        ("", CPU, "torch"),
    ],
)
def test_the_environment_variable_replaces_auto(
    usable_triton, monkeypatch, value, tensor, expected
):
    monkeypatch.setenv("SEMANTICFL_KERNELS", value)
    assert implementation("auto", tensor) == expected


def test_the_environment_variable_does_not_replace_a_choice_by_name(usable_triton, monkeypatch):
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    assert implementation("torch", CPU) == "torch"
    with pytest.raises(ValueError, match="SEMANTICFL_KERNELS = 'triton' with CPU tensors"):
        implementation("auto", CPU)


def test_unknown_values_are_named(monkeypatch):
    with pytest.raises(ValueError, match="impl = 'cuda': expected one of auto, torch, triton"):
        implementation("cuda", CPU)
    monkeypatch.setenv("SEMANTICFL_KERNELS", "fast")
    with pytest.raises(ValueError, match="environment variable SEMANTICFL_KERNELS = 'fast'"):
        implementation("auto", CPU)


def test_float64_by_name_is_refused(usable_triton, monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        implementation("triton", CUDA_FLOAT64)
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    assert implementation("auto", CUDA_FLOAT64) == "torch", "the variable is a preference"


@pytest.mark.parametrize("preference", ["auto", "triton"])
@pytest.mark.parametrize(
    "error", [ImportError("No module named 'triton'"), OSError("libcuda.so.1: wrong ELF class")]
)
def test_triton_missing_or_broken(usable_triton, monkeypatch, preference, error):
    monkeypatch.setenv("SEMANTICFL_KERNELS", preference)
    monkeypatch.setattr(dispatch, "IMPORT_ERROR", error)
    chosen, messages = chosen_with_warnings("auto", CUDA)
    assert chosen == "torch" and len(messages) == 1
    assert "cannot be imported" in messages[0] and str(error) in messages[0]
    assert chosen_with_warnings("auto", CUDA) == ("torch", []), "one warning in a process"
    with pytest.raises(ValueError, match="impl = 'triton', but Triton cannot be used") as raised:
        implementation("triton", CUDA)
    assert str(error) in str(raised.value)


@pytest.mark.parametrize("version", ["2.1.0", "3.5.1", "unknown"])
def test_triton_too_old(usable_triton, monkeypatch, version):
    monkeypatch.setattr(dispatch, "triton", SimpleNamespace(__version__=version))
    chosen, messages = chosen_with_warnings("auto", CUDA)
    assert chosen == "torch" and f"version is {version}" in messages[0] and "3.6" in messages[0]


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")]
)
def test_the_device_is_too_old(usable_triton, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    chosen, messages = chosen_with_warnings("auto", CUDA)
    assert chosen == expected
    assert ["7.5" in message for message in messages] == [True] * (expected == "torch")


def test_rocm_is_left_to_torch(usable_triton, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    chosen, messages = chosen_with_warnings("auto", CUDA)
    assert chosen == "torch" and "ROCm" in messages[0]


def raising(error: Exception):
    def launch():
        raise error

    return launch


@pytest.mark.parametrize(
    "error",
    [
        type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})(
            "at 3:4: bad\nmore"
        ),
        subprocess.CalledProcessError(1, ["gcc"]),
        ImportError("cuda_utils.so"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_compilation_is_warned_of_once_and_replaced_for_good(usable_triton, error):
    assert implementation("auto", CUDA) == "triton"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert with_fallback(raising(error), lambda: "reference") == "reference"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert type(error).__name__ in message and "more" not in message
    assert chosen_with_warnings("auto", CUDA) == ("torch", [])
    with pytest.raises(ValueError, match=f"could not compile a kernel .{type(error).__name__}"):
        with_fallback(raising(error), lambda: "reference", "triton")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("weights"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_other_errors_are_raised(usable_triton, error):
    with pytest.raises(type(error), match=str(error)):
        with_fallback(raising(error), lambda: "reference")
    assert implementation("auto", CUDA) == "triton"


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "true")
    with pytest.raises(ImportError, match="from inside a kernel"):
        with_fallback(raising(ImportError("from inside a kernel")), lambda: "reference")


def test_a_launch_that_works():
    assert with_fallback(lambda: "launched", raising(AssertionError("not needed"))) == "launched"


def test_in_a_compiled_function():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: x + 1 if implementation("auto", x) == "torch" else x - 1,
        fullgraph=True,
        backend="eager",
    )
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # how Python says that a module cannot be imported

import torch
from semanticfl_ref.kernels import dispatch
from semanticfl_ref.kernels.info_nce import info_nce
from semanticfl_ref.kernels.weighted_average import weighted_average

info_nce(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.long))
first = weighted_average(torch.ones(2, 3), torch.ones(2), final=False)
weighted_average(torch.ones(2, 3), torch.ones(2), torch.ones(3), first)
print(dispatch.IMPORT_ERROR)
"""


def test_the_cpu_path_needs_no_triton():
    """Neither at import nor in a call, nor a word about it: in a process where it cannot be
    imported and a warning is an error.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", WITHOUT_TRITON],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "triton" in done.stdout
