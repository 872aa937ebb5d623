"""`doctor`: what is available, what is missing, and what that means for the settings given."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from processes import ROOT, environment

from semanticfl_ref import cli
from semanticfl_ref.data import digits
from semanticfl_ref.diffusion import model_files
from semanticfl_ref.tools import doctor

Usage = namedtuple("Usage", "total used free")
NO_DATA = ("--dataset", "cifar10", "--sd", "tiny")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, which stays empty, and an empty cache."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    assert not list((tmp_path / "cwd").iterdir())


@pytest.fixture
def no_self_test(monkeypatch):
    """The kernels' self-test takes seconds; here it says that all is well."""
    answer(monkeypatch, 0, '{"info_nce": 1e-7, "weighted_average": 1e-8}')


def answer(monkeypatch, code: int, out: str, err: str = "") -> None:
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def checks(capsys, code: int, *arguments: str) -> dict[str, dict]:
    """item -> check, of a doctor that exits with `code`."""
    assert cli.main(["doctor", *arguments, "--json"]) == code, capsys.readouterr().out
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code and document["ready"] == (code == 0)
    return {check["item"]: check for check in document["checks"]}


def test_all_is_well_here(capsys):
    pytest.importorskip("triton")
    found = checks(capsys, 0)
    required = {name: check for name, check in found.items() if name not in doctor.OPTIONAL}
    assert {check["state"] for check in required.values()} <= {"ok", "warn"}
    for item in (
        "torch imports",
        "device",
        "kernels",
        "embedded data",
        "embedded model",
        "data set",
        "weights",
        "disk",
        "offline",
    ):
        assert found[item]["state"] == "ok", found[item]
    assert "relative errors" in found["kernels"]["found"]
    assert "450 train" in found["data set"]["found"]


def test_the_table_for_a_reader(capsys, no_self_test):
    assert cli.main(["doctor", "--method", "fedavg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    python ") and lines[-1] == "ready"
    assert not any("  weights " in line for line in lines)


@pytest.mark.parametrize(
    "code, out, err, state",
    [
        (0, '{"info_nce": 0.1, "weighted_average": 0.0}', "", "FAIL"),
        (0, '{"info_nce": NaN, "weighted_average": 0.0}', "", "FAIL"),
        (0, '{"info_nce": 0.0, "weighted_average": NaN}', "", "FAIL"),
        (1, "", "Traceback\nRuntimeWarning: Triton is not used: no such thing\n", "warn"),
        (-11, "", "", "warn"),
    ],
)
def test_kernels_that_are_wrong_fail_and_kernels_that_cannot_run_warn(
    capsys, monkeypatch, code, out, err, state
):
    answer(monkeypatch, code, out, err)
    assert checks(capsys, 4 if state == "FAIL" else 0)["kernels"]["state"] == state


def test_the_self_test_compares_with_the_truth():
    """A kernel that is off by a ten-thousandth is found."""
    pytest.importorskip("triton")
    code = """
from semanticfl_ref.kernels import weighted_average as module
right = module.weighted_average

def wrong(*arguments, impl):
    average = right(*arguments, impl="torch")
    scale = 1 if impl == "torch" else 1.0001
    return average._replace(values_P=average.values_P * scale)

module.weighted_average = wrong
from semanticfl_ref.tools.doctor import self_test
self_test()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(), "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = json.loads(done.stdout)
    assert errors["weighted_average"] == pytest.approx(1e-4, rel=0.01)
    assert max(errors["info_nce"], errors["its gradient"]) <= doctor.TOLERANCE


def test_without_triton_the_self_test_does_not_compare_torch_with_itself():
    code = f"import sys; sys.modules['triton'] = None; {doctor.SELF_TEST}"
    command = [sys.executable, *doctor.NO_FALLBACK, "-c", code]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""


def test_a_damaged_model_fails_where_it_is_used(capsys, tmp_path, monkeypatch, no_self_test):
    damaged = shutil.copytree(model_files.TINY, tmp_path / "tiny")
    file = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(model_files, "TINY", damaged)
    found = checks(capsys, 3)["embedded model"]
    assert found["state"] == "FAIL" and str(damaged) in found["found"]
    assert checks(capsys, 0, "--method", "fedavg")["embedded model"]["state"] == "warn"


def test_damaged_digits(capsys, tmp_path, monkeypatch, no_self_test):
    monkeypatch.setattr(digits, "FILE", tmp_path / "gone.safetensors")
    found = checks(capsys, 3)
    assert found["embedded data"]["state"] == found["data set"]["state"] == "FAIL"
    assert "gone.safetensors" in found["embedded data"]["found"]


def test_a_data_set_that_is_not_here(capsys, no_self_test):
    found = checks(capsys, 5, *NO_DATA, "--offline")
    assert found["data set"]["state"] == "FAIL"
    assert "partition show --dataset cifar10" in found["data set"]["found"]
    assert found["weights"]["state"] == "ok" and found["disk"]["state"] == "warn"
    assert found["offline"]["found"] == "not ready, missing or damaged: data set"
    fetched = checks(capsys, 0, *NO_DATA)["data set"]
    assert fetched["state"] == "warn", "a run would download it"
    absent = checks(capsys, 3, *NO_DATA, "--data-dir", "absent")["data set"]
    assert absent["state"] == "FAIL", "a run would not"


def test_weights_that_are_not_here(capsys, no_self_test):
    found = checks(capsys, 5, "--sd", "somebody/no-such-model", "--offline")
    assert "hf download somebody/no-such-model" in found["weights"]["found"]
    assert "weights" in found["offline"]["found"]
    assert checks(capsys, 3, "--sd", "./absent")["weights"]["state"] == "FAIL"


def test_a_full_disk(capsys, monkeypatch, no_self_test):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    assert "of 10 B free" in checks(capsys, 3)["disk"]["found"]


def test_cuda_where_there_is_none(capsys, no_self_test):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "run.device" in checks(capsys, 2, "--set", "run.device=cuda")["device"]["found"]


def test_packages_that_are_missing_or_of_another_version(capsys, monkeypatch, no_self_test):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("tqdm", "matplotlib", "scipy", "triton"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.14.1" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = checks(capsys, 2)
    expected = {
        "tqdm": "FAIL",
        "matplotlib": "warn",
        "scipy": "warn",
        "triton": "warn",
        "torch": "warn",
        "numpy": "ok",
    }
    assert {name: found[name]["state"] for name in expected} == expected
    assert "pip install" in found["tqdm"]["found"] and "<2.14" in found["torch"]["found"]


@pytest.mark.parametrize("missing", ["torch", "packaging"])
def test_a_broken_installation_still_has_its_table(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from semanticfl_ref import cli
from semanticfl_ref.tools import doctor
doctor._kernels = lambda: ""
sys.exit(cli.main(["doctor", "--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    failed = [check for check in json.loads(done.stdout)["checks"] if check["state"] == "FAIL"]
    assert any(missing in check["found"] for check in failed)


def test_requirements_are_setup_py_s_own(monkeypatch, tmp_path):
    found = doctor.requirements()
    assert "torch>=2.11,<2.14" in found and "packaging" in found
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    lines = ["numpy", 'pytest; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    assert doctor.requirements() == ["numpy"]
