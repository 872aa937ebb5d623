"""The GPU benchmark, rehearsed on a CPU: every stage, what it writes, and what it does with
failures, wrong results and time that runs out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import run as gpu
from bench.harness import BOTH, FORWARD, OURS, Bench, Case, Contender, guarded, measure
from bench.record import Record

ROOT = Path(__file__).parents[2]
CPU = Bench(torch.device("cpu"), rehearse=True, seconds=60)


@pytest.mark.heavy
def test_a_rehearsal_goes_through_every_stage(tmp_path):
    """The kernels run in Triton's interpreter; peers, records and all else are what a GPU would
    see.
    """
    out = tmp_path / "results.json"
    environment = os.environ | {"PYTHON": sys.executable, "TRITON_INTERPRET": "1"}
    command = [ROOT / "bench" / "gpu.sh", "--rehearse", "--together", "--out", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    statuses = {name: how["status"] for name, how in result["stages"].items()}
    assert statuses == dict.fromkeys(gpu.STAGES, "done")
    assert result["kind"] == "rehearsal" and "failures" not in result
    assert result["copy"]["gb_s"] > 0
    seen = {
        (row["kernel"], row["direction"], row["contender"])
        for row in result["rows"]
        if row.get("correct")
    }
    losses = (OURS, "eager, client by client", "eager, all clients at once")
    assert {("info_nce", BOTH, name) for name in losses} <= seen
    averages = (OURS, "ours, with diagnostics", "weights @ params", "device copy")
    assert {("weighted_average", FORWARD, name) for name in averages} <= seen
    norms = (OURS, "eager", "device copy")
    assert {("group_norm_silu", FORWARD, name) for name in norms} <= seen
    assert all(row["repeatable"] for row in result["rows"] if row["contender"] == OURS)
    assert result["tests"]["exit"] == 0 and "passed" in result["tests"]["last"]
    assert [line[:3] for line in result["diffusion"]["lines"]] == ["D4:"]


def test_a_stage_in_its_own_process_and_one_that_is_ended(tmp_path):
    done, ended = tmp_path / "a.json", tmp_path / "b.json"
    assert gpu.in_its_own_process("copy", done, 60, rehearse=True) == 0
    assert json.loads(done.read_text())["copy"]["gb_s"] > 0
    code = gpu.in_its_own_process("copy", ended, 0.2, rehearse=True)
    assert code == 124, "torch alone takes longer to import"
    assert not ended.exists()


def test_contenders_that_fail_or_are_wrong_are_rows_that_say_so(tmp_path):
    def broken():
        raise RuntimeError("no such kernel\nand more")

    record = Record(tmp_path / "r.json")
    counter = iter(range(1000))
    contenders = {
        OURS: Contender(lambda: torch.tensor(float(next(counter)))),
        "right": Contender(lambda: torch.tensor(7.0), {"bytes": 3}),
        "broken": Contender(broken),
    }

    def check(name, result) -> dict:
        return {"errors": {"e": float(result)}, "correct": result.item() == 7.0}

    measure(record, CPU, Case(kernel="k", case="c", dtype="fp32", bytes=1), contenders, check)
    written = json.loads((tmp_path / "r.json").read_text())["rows"]
    rows = {row["contender"]: row for row in written}
    assert rows["broken"]["failed"] == "RuntimeError: no such kernel"
    assert "median_ms" not in rows["broken"]
    assert rows["right"]["correct"] and rows["right"]["bytes"] == 3
    assert rows["right"]["median_ms"] >= 0
    assert not rows[OURS]["correct"] and not rows[OURS]["repeatable"]


def test_what_fails_beside_the_contenders_is_kept_and_the_run_goes_on(tmp_path):
    record = Record(tmp_path / "r.json")
    with guarded(record, "a case"):
        raise MemoryError("64 GiB")
    assert record.content["failures"] == [{"what": "a case", "why": "MemoryError: 64 GiB"}]


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        ({"rows": [{"contender": "ours", "correct": True, "repeatable": True}]}, 0, "one: done"),
        (
            {"rows": [{"contender": "ours", "correct": False, "errors": {"loss": 2.0}}]},
            1,
            "wrong, {'loss': 2.0}",
        ),
        (
            {"rows": [{"contender": "ours", "correct": True, "repeatable": False}]},
            1,
            "not the same twice",
        ),
        ({"rows": [{"contender": "ours", "failed": "out of memory"}]}, 1, "out of memory"),
        # A peer's failure is a finding.
        ({"rows": [{"contender": "eager", "failed": "out of memory"}]}, 0, "one: done"),
        ({"failures": [{"what": "a case", "why": "it broke"}]}, 1, "a case: it broke"),
        ({"stages": {"one": {"status": "ended", "why": "too slow"}}}, 1, "too slow"),
    ],
)
def test_the_last_words(tmp_path, capsys, content, status, said):
    record = Record(tmp_path / "r.json")
    place = {"kernel": "k", "case": "c", "dtype": "fp32", "direction": "forward"}
    record.content |= {"stages": {"one": {"status": "done"}}} | content
    record.content["rows"] = [place | row for row in record.content.get("rows", [])]
    with pytest.raises(SystemExit) as end:
        gpu.finish(record)
    assert end.value.code == status and said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "before", "status"),
    [
        (0, {}, {"status": "done", "seconds": 1.2}),
        (124, {}, {"status": "ended", "seconds": 1.2, "why": gpu.ENDED}),
        (-9, {}, {"status": "failed", "seconds": 1.2, "why": "exit status -9"}),
        # The stage has said why itself.
        (1, {"status": "failed", "why": "it broke"}, {"status": "failed", "why": "it broke"}),
    ],
)
def test_how_a_stage_went(tmp_path, code, before, status):
    record = Record(tmp_path / "r.json")
    record.set("stages", {"one": before})
    gpu.record_status(record, "one", code, 1.23)
    assert record.content["stages"]["one"] == status


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.describe(rehearse=False)


def test_a_device_has_a_file_name():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
