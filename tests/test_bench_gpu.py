"""The GPU benchmark's own paths, rehearsed on a CPU: every stage, what it writes, and what it does
with failures, wrong results and time that runs out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.measure import OURS, Bench, Contender, guarded, measure
from bench.record import Record

ROOT = Path(__file__).parent.parent
CPU = Bench(torch.device("cpu"), rehearse=True, seconds=60)


@pytest.mark.heavy
def test_a_rehearsal_goes_through_every_stage(tmp_path):
    """The kernels run in Triton's interpreter where there is one; peers, books and all else are
    what a GPU would see.
    """
    out = tmp_path / "results.json"
    environment = os.environ | {"PYTHON": sys.executable, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--rehearse", "--together", "--out", out],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {name: how["status"] for name, how in result["stages"].items()} == dict.fromkeys(
        gpu.STAGES, "done"
    )
    assert result["kind"] == "rehearsal" and "failures" not in result
    assert set(result["ceilings"]) == {"copy", "bf16", "fp16", "tf32", "fp32"}
    seen = {
        (row["kernel"], row["direction"], row["contender"])
        for row in result["rows"]
        if row.get("correct")
    }
    assert {
        ("info_nce", direction, name)
        for direction in ("forward", "forward and backward")
        for name in (OURS, "eager", "eager, client by client")
    } <= seen
    assert {
        ("weighted_average", "forward", name)
        for name in (
            OURS,
            "ours, a list of rows",
            "ours, with diagnostics",
            "ours, streaming",
            "weights @ rows",
        )
    } <= seen
    assert all(row["repeatable"] for row in result["rows"] if row["contender"] == OURS)
    assert result["tests"]["exit"] == 0 and "passed" in result["tests"]["last"]
    assert result["compiled"]["rows"][0]["problems"] == []
    assert [line[:3] for line in result["diffusion"]["lines"]] == ["D4:"]


def test_a_stage_in_its_own_process_and_one_that_is_ended(tmp_path):
    assert gpu.in_its_own_process("ceilings", tmp_path / "a.json", 60, rehearse=True) == 0
    assert "copy" in json.loads((tmp_path / "a.json").read_text())["ceilings"]
    assert gpu.in_its_own_process("ceilings", tmp_path / "b.json", 0.2, rehearse=True) == 124, (
        "torch alone takes longer to import"
    )
    assert not (tmp_path / "b.json").exists()


def test_contenders_that_fail_or_are_wrong_are_rows_that_say_so(tmp_path):
    def broken():
        raise RuntimeError("no such kernel\nand more")

    record = Record(tmp_path / "r.json")
    counter = iter(range(1000))
    contenders = {
        OURS: Contender(lambda: torch.tensor(float(next(counter)))),
        "right": Contender(lambda: torch.tensor(7.0), bytes=3),
        "broken": Contender(broken),
    }
    case = {
        "kernel": "k",
        "case": "c",
        "dtype": "fp32",
        "direction": "forward",
        "bytes": 1,
        "flop": 1,
    }
    measure(
        record,
        CPU,
        case,
        contenders,
        lambda name, result: {"errors": {"e": float(result)}, "correct": result.item() == 7.0},
    )
    rows = {row["contender"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert (
        rows["broken"]["failed"] == "RuntimeError: no such kernel"
        and "median_ms" not in rows["broken"]
    )
    assert (
        rows["right"]["correct"] and rows["right"]["bytes"] == 3 and rows["right"]["median_ms"] >= 0
    )
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
        (
            {"rows": [{"contender": "eager", "failed": "out of memory"}]},
            0,
            "one: done",
        ),  # a peer's failure is a finding
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


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.describe(rehearse=False)


def test_a_device_has_a_file_name():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
