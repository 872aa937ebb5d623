"""The compiler's report: it finds what is wrong with kernels that are known to break the rules, and
nothing wrong with ours (K9).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KNOWN = ["--modules", "compiled_examples"]
# A variant of each kernel at the loop's shape, and the large one with most registers: the rest is
# heavy.
QUICK = [
    "info_nce fp32 64x10x512",
    "info_nce fp32 64x1000x768",
    "weighted_average fp32, final",
    "weighted_average bf16, running sum",
    "weighted_average fp32, with diagnostics",
    "group_norm bf16 128, statistics",
    "group_norm bf16 128",
    "group_norm fp16 1280",
]
USAGE = """
 Function mm:
  REG:255 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.LTC128B R4, desc[UR4][R2.64] ;
        /*0030*/              @P1 LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0050*/              @UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ ;
        /*0070*/                   STL [R1+0x4], R0 ;
        /*0080*/                   LDL.LU R0, [R1+0x4] ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/                   FFMA R0, R1, R2, R3 ;
.L_x_1:
"""


def test_what_is_read_from_the_instructions():
    from bench.compile_report import read_code, read_usage

    found = read_code(SASS)
    assert found["load_bits"] == {"128": 2, "32": 1, "16": 1, "TMA": 1}
    assert found["tensor_instructions"] == {"HGMMA": 1}
    assert found["spill_instructions"] == 2
    assert read_usage(USAGE) == {"registers": 255, "stack_bytes": 32}


@pytest.mark.heavy
def test_each_broken_rule_is_found(tmp_path):
    rows, done = report(tmp_path, *KNOWN, "--arch", "90")
    said = {row["variant"]: row["problems"] for row in rows}
    assert done.returncode == 1
    assert said["scale"] == said["scale-unaligned"] == said["product"] == []
    assert len(said["spills"]) == 1 and "spills" in said["spills"][0]
    assert len(said["shared-memory"]) == 1 and "the chip has 232448" in said["shared-memory"][0]
    assert len(said["no-tensor-cores"]) == 1 and "tensor-core" in said["no-tensor-cores"][0]
    tensor = {row["variant"]: row["tensor_instructions"] for row in rows}
    assert list(tensor["product"]) == ["HGMMA"]
    loads = {row["variant"]: row["load_bits"] for row in rows}
    assert set(loads["scale"]) == {"128"} and set(loads["scale-unaligned"]) == {"32"}


def test_each_generation_has_its_own_tensor_cores(tmp_path):
    rows, done = report(tmp_path, *KNOWN, "--only", "product", "--arch", "80", "100")
    assert done.returncode == 0, done.stdout
    tensor = {row["arch"]: list(row["tensor_instructions"]) for row in rows}
    assert tensor == {80: ["HMMA"], 100: ["UTCHMMA"]}


def test_our_kernels_at_the_shapes_of_the_loop(tmp_path):
    rows, done = report(tmp_path, "--arch", "90", "--only", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == len(QUICK)


@pytest.mark.heavy
def test_all_our_kernels_for_all_architectures(tmp_path):
    rows, done = report(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["arch"] for row in rows} == {80, 90, 100}


def report(folder: Path, *arguments: str) -> tuple[list[dict] | None, subprocess.CompletedProcess]:
    """The rows of a report, made in a process without the interpreter that these tests turn on."""
    path = folder / "report.json"
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_report", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return json.loads(path.read_text())["rows"] if path.exists() else None, done
