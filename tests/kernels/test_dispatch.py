"""Every branch of the choice between torch and Triton, and that no branch ends in an import error."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from semanticfl_ref.kernels import dispatch
from semanticfl_ref.kernels.dispatch import compile_failed, implementation, with_fallback

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
def triton_here(monkeypatch):
    """A Triton that can be used, whether or not there is one."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0+git1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chosen_with_warnings(*arguments) -> tuple[str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return implementation(*arguments), [str(w.message) for w in caught]


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
def test_by_device_and_dtype(triton_here, impl, tensors, expected):
    assert chosen_with_warnings(impl, *tensors) == (expected, [])


def test_cpu_tensors_by_name_need_the_interpreter(triton_here, monkeypatch):
    with pytest.raises(ValueError, match="impl = 'triton' with CPU tensors.*TRITON_INTERPRET=1"):
        implementation("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert implementation("triton", CPU) == "triton"
    assert implementation("auto", CPU) == "torch"


@pytest.mark.parametrize(
    ("word", "tensor", "expected"),
    [
        ("torch", CUDA, "torch"),
        ("triton", CUDA, "triton"),
        ("auto", CUDA, "triton"),
        ("", CPU, "torch"),
    ],
)
def test_the_environment_variable_replaces_auto(triton_here, monkeypatch, word, tensor, expected):
    monkeypatch.setenv("SEMANTICFL_KERNELS", word)
    assert implementation("auto", tensor) == expected


def test_the_environment_variable_does_not_replace_a_choice_by_name(triton_here, monkeypatch):
    monkeypatch.setenv("SEMANTICFL_KERNELS", "triton")
    assert implementation("torch", CPU) == "torch"
    with pytest.raises(ValueError, match="SEMANTICFL_KERNELS = 'triton' with CPU tensors"):
        implementation("auto", CPU)


def test_wrong_words_are_named(monkeypatch):
    with pytest.raises(ValueError, match="impl = 'cuda': expected one of auto, torch, triton"):
        implementation("cuda", CPU)
    monkeypatch.setenv("SEMANTICFL_KERNELS", "fast")
    with pytest.raises(ValueError, match="SEMANTICFL_KERNELS = 'fast'"):
        implementation("auto", CPU)


def test_float64_by_name_is_refused(triton_here):
    with pytest.raises(ValueError, match="float64"):
        implementation("triton", CUDA_FLOAT64)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_triton_missing(monkeypatch, impl):
    """`None` in sys.modules is how Python says that a module cannot be imported."""
    monkeypatch.setitem(sys.modules, "triton", None)
    chosen, said = chosen_with_warnings(impl, CUDA)
    assert chosen == "torch" and len(said) == 1 and "cannot be imported" in said[0]
    assert chosen_with_warnings(impl, CUDA) == ("torch", []), "one warning in a process"


def test_triton_broken(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise OSError("libcuda.so.1: wrong ELF class")

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    chosen, said = chosen_with_warnings("auto", CUDA)
    assert chosen == "torch" and "wrong ELF class" in said[0]


@pytest.mark.parametrize("version", ["2.1.0", "3.5.1", "unknown"])
def test_triton_too_old(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    chosen, said = chosen_with_warnings("auto", CUDA)
    assert chosen == "torch" and f"version is {version}" in said[0] and "3.6" in said[0]


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")]
)
def test_the_device_is_too_old(triton_here, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    chosen, said = chosen_with_warnings("auto", CUDA)
    assert chosen == expected and [("7.5" in text) for text in said] == [True] * (
        expected == "torch"
    )


def test_rocm_is_left_to_torch(triton_here, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    chosen, said = chosen_with_warnings("auto", CUDA)
    assert chosen == "torch" and "ROCm" in said[0]


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
def test_a_failed_compilation_is_warned_of_once_and_replaced_for_good(triton_here, error):
    assert implementation("auto", CUDA) == "triton"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [with_fallback(raising(error), lambda: "reference") for _ in range(2)] == [
            "reference"
        ] * 2
    assert (
        len(caught) == 1
        and type(error).__name__ in str(caught[0].message)
        and "more" not in str(caught[0].message)
    )
    assert chosen_with_warnings("auto", CUDA) == ("torch", [])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("weights"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_other_errors_are_raised(triton_here, error):
    with pytest.raises(type(error), match=str(error)):
        with_fallback(raising(error), lambda: "reference")
    assert implementation("auto", CUDA) == "triton"


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "true")
    assert not compile_failed(ImportError("from inside a kernel"))


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


def test_the_cpu_path_needs_no_triton():
    """Neither at import nor in a call, nor a word about it: in a process where it cannot be
    imported and a warning is an error.
    """
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from semanticfl_ref.kernels.weighted_average import RunningAverage, weighted_average;"
        "weighted_average(torch.ones(2, 3), torch.ones(2)); average = RunningAverage(3); average.add(torch.ones(3), 1.0); average.finish()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
