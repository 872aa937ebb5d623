"""From measurements to the document: clocks, records, claims and the rendered tables, on numbers
that a reader redoes on paper.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import claims, harness, record, render

TRAINING, AVERAGE = "10 clients x 64 x 10 x 512", "10 x 4.9 M"
NUMPY = "NumPy, Flower's arithmetic, on the host"
DOCUMENT = """\
Before.
<!-- kernels:compiler:begin -->
old
<!-- kernels:compiler:end -->
Between.
<!-- kernels:gpu:begin -->
<!-- kernels:gpu:end -->
After.
"""


def row(kernel: str, case: str, contender: str, median_ms: float, **more) -> dict:
    """A row of a correct, repeatable contender."""
    return {
        "kernel": kernel,
        "case": case,
        "dtype": "fp32",
        "direction": "forward and backward" if kernel == "info_nce" else "forward",
        "shape": {"G": 10, "N": 10},
        "contender": contender,
        "bytes": 10**6,
        "median_ms": median_ms,
        "low_ms": median_ms,
        "high_ms": median_ms,
        "samples": 5,
        "peak_bytes": 2**20,
        "errors": {"loss": 1e-4},
        "correct": True,
        **more,
    }


def made_up() -> dict:
    """A device that copies 1 TB/s."""
    launches = {"info_nce_kernel": 1, "elementwise": 1}
    eager = "eager, client by client"
    rows = [
        row("info_nce", TRAINING, "ours", 0.1, launches=launches, repeatable=True),
        row("info_nce", TRAINING, eager, 0.8),
        row("info_nce", TRAINING, "ours, as a CUDA graph", 0.012),
        row("info_nce", TRAINING, f"{eager}, as a CUDA graph", 0.3),
        # The target is for up to ten clients and two hundred anchors.
        row("info_nce", "many", "ours, as a CUDA graph", 0.5, shape={"G": 50, "N": 10}),
        row("info_nce", "large", "ours, as a CUDA graph", 0.5, shape={"G": 1, "N": 1000}),
        row("weighted_average", AVERAGE, "ours", 2.0, bytes=18 * 10**8, repeatable=False),
        row("weighted_average", AVERAGE, "ours, with diagnostics", 4.0, bytes=2 * 10**9),
        row("weighted_average", AVERAGE, "device copy", 2.0, bytes=2 * 10**9),
        row("weighted_average", AVERAGE, NUMPY, 20.0, bytes=0, correct=False),
        row("group_norm_silu", "128", "ours", 9.0, bytes=24 * 10**8, repeatable=True),
        row("group_norm_silu", "128", "ours, as a CUDA graph", 3.0, bytes=24 * 10**8),
        row("group_norm_silu", "128", "device copy", 2.0, bytes=2 * 10**9),
        row("group_norm_silu", "320", "ours, as a CUDA graph", 3.0, bytes=18 * 10**8),
        row("group_norm_silu", "320", "device copy", 2.0, bytes=2 * 10**9),
    ]
    failed = row("weighted_average", AVERAGE, "eager, fp64", 0.0) | {"failed": "out of memory"}
    del failed["median_ms"]
    return {
        "kind": "gpu",
        "device": "Made Up 1",
        "kernels": record.kernels_digest(),
        "copy": {"gb_s": 1000.0},
        "rows": [*rows, failed],
        "loop": [
            client_step("ours, 5 replicas", 64, 1.0) | {"equals_eager": True},
            client_step("bare eager loop", 64, 8.0),
            client_step("ours, 5 replicas", 16, 0.5) | {"equals_eager": False},
            client_step("bare eager loop", 16, 6.0),
        ],
        "round": {"ms_per_client_step": 0.5, "device_share": 0.7},
        "date": "2026-01-02",
        "commit": "0123abc",
        "torch": "2.11",
        "triton": "3.6",
        "cuda": "13.0",
        "driver": "1",
        "command": "bench/gpu.sh",
        "timer": "A clock",
        "stages": {"tests": {"status": "done"}},
        "tests": {"last": "== 7 passed in 1s =="},
    }


def client_step(contender: str, width: int, time: float) -> dict:
    return {
        "method": "fedavg",
        "width": width,
        "contender": contender,
        "ms_per_client_step": time,
    }


def report() -> dict:
    """A report of one variant for three architectures."""
    kinds = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    rows = [
        {
            "variant": "forward",
            "arch": arch,
            "registers": 100 + arch,
            "shared_bytes": 64 << 10,
            "stack_bytes": 0,
            "spill_instructions": 0,
            "tensor_instructions": {kind: 4},
            "load_bits": {"128": 8},
            "problems": [],
        }
        for arch, kind in kinds.items()
    ]
    kernels = record.kernels_digest()
    return {"kind": "compile_report", "triton": "3.9", "kernels": kernels, "rows": rows}


@pytest.fixture
def place(tmp_path):
    """A folder with a document that has the markers, and a folder of results; and a function that
    renders and returns the exit status.
    """
    (tmp_path / "results").mkdir()
    document = tmp_path / "kernels.md"
    document.write_text(DOCUMENT)

    def run(monkeypatch, *flags):
        places = ["--document", str(document), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", ["render", *places, *flags])
        try:
            render.main()
        except SystemExit as end:
            return end.code
        return 0

    return tmp_path, run


def test_claims_are_ratios_of_the_rows():
    lines = [line[2:-2].split(" | ") for line in claims.claims(made_up())]
    assert [(line[0], *line[3:]) for line in lines] == [
        ("K1", "12 us", "yes"),
        ("K1", "8.00x", "yes"),
        ("K2", "info_nce_kernel x1, elementwise x1", "yes"),
        ("K3", "25.00x", "yes"),
        ("K8", "2 of 3 cases", "missed in 1 of 3"),
        ("A1", "90%", "yes"),
        ("A1", "50%", "missed in 1 of 1"),
        # Its result was wrong, and a wrong result has no speed.
        ("A3", f"not measured ({NUMPY})", ""),
        ("N1", "60% ... 80%", "missed in 1 of 2"),
        ("G1", "8.0x ... 12.0x", "missed in 1 of 2"),
        ("G1", "1.0x ... 1.1x", "missed in 1 of 2"),
        ("G1", "1 of 2 cases", "missed in 1 of 2"),
        ("G3", "70%", "yes"),
    ]


def test_claims_without_measurements_say_so():
    lines = claims.claims({"rows": []})
    assert len(lines) == 13 and all(line.endswith("| not measured |  |") for line in lines)


def test_launches_are_counted_by_dtype():
    many = {"info_nce_kernel": 1, "add_tiles_kernel": 1, "mul": 1, "cast": 1}
    ours = row("info_nce", TRAINING, "ours", 0.1, launches=many)
    assert claims.launched([ours])[1] == "missed in 1 of 1"
    assert claims.launched([ours | {"dtype": "bf16"}])[1] == "yes"
    assert claims.launched([ours, ours | {"dtype": "bf16"}])[1] == "missed in 1 of 2"


def test_share_of_the_copy_rate_on_paper():
    average = row("weighted_average", "x", "ours", 2.0, bytes=18 * 10**8)  # at least 1.8 ms
    on_host = row("weighted_average", "x", NUMPY, 2.0, bytes=0)
    assert "| 900 | 90% |" in render.measurement(average, 1000.0)
    assert "| 900 |  |" in render.measurement(average, None), "that rate was not measured"
    assert "|  |  |" in render.measurement(on_host, 1000.0)


def test_without_results_the_document_says_so(place, monkeypatch):
    folder, run = place
    assert run(monkeypatch) == 0
    text = (folder / "kernels.md").read_text()
    assert "No results from a GPU yet" in text and "No report of the compiler yet" in text
    assert "old" not in text
    assert text.startswith("Before.\n") and "\nBetween.\n" in text and text.endswith("After.\n")
    assert run(monkeypatch, "--check") == 0


def test_results_are_rendered_and_checked(place, monkeypatch, capsys):
    folder, run = place

    def write(name: str, content: dict) -> None:
        (folder / "results" / f"{name}.json").write_text(json.dumps(content))

    write("made-up-1", made_up())
    write("rehearsal", made_up() | {"kind": "rehearsal", "device": "nothing"})
    write("compile_report", report())
    assert run(monkeypatch, "--check") == 1, "the tables are not in the document yet"
    assert run(monkeypatch) == 0
    text = (folder / "kernels.md").read_text()
    assert "| `forward` | 180 / 190 / 200 | 0 | 64 | 128 x8 |" in text
    place_of_row = f"| weighted_average | {AVERAGE} | fp32 | forward |"
    assert f"{place_of_row} ours | 2 (2 ... 2) | 900 | 90% | 1 | loss 1.0e-04 |" in text
    assert f"{place_of_row} {NUMPY} | 20 (20 ... 20) |  |  | 1 | **wrong** loss 1.0e-04 |" in text
    assert f"{place_of_row} eager, fp64 | out of memory | | | | |" in text
    assert "Tests on it: 7 passed in 1s." in text
    assert "measured with the kernels of commit 0123abc" in text
    assert "nothing" not in text, "a rehearsal's numbers are not results"
    assert run(monkeypatch, "--check") == 0
    changed = made_up()
    changed["rows"][0]["median_ms"] = 0.05
    write("made-up-1", changed)
    assert run(monkeypatch, "--check") == 1
    write("made-up-1", made_up())
    write("compile_report", report() | {"kernels": "of another day"})
    assert run(monkeypatch, "--check") == 1 and "other kernels" in capsys.readouterr().out


def test_a_broken_rule_is_in_the_table():
    broken = report()
    problems = ["spills: 7 instructions, 32 bytes a thread"]
    broken["rows"][1] |= {"spill_instructions": 7, "problems": problems}
    assert "rules broken: forward, sm_90: spills: 7" in render.compiler_section(broken)
    assert "| 0 / 7 / 0 |" in render.compiler_section(broken)


def test_results_of_older_kernels_say_so():
    older = render.gpu_section([made_up() | {"kernels": "of another day"}])
    assert "The kernels have changed since" in older
    assert "| 90% | yes, earlier kernel |" in older
    assert f"| not measured ({NUMPY}) |  |" in older, "nothing was measured"
    assert "| ours, with diagnostics (earlier kernel) | 4 (4 ... 4) |" in older
    assert "| device copy | 2 (2 ... 2) |" in older, "a peer's row still holds"
    now = render.gpu_section([made_up()])
    assert "The kernels have changed since" not in now and "earlier kernel" not in now


def test_what_benchmarks_print_is_in_the_summary():
    """And nothing that tests print."""
    from bench.conftest import pytest_terminal_summary

    def report(nodeid: str, when: str = "call") -> SimpleNamespace:
        return SimpleNamespace(nodeid=nodeid, when=when, capstdout=f"{nodeid} {when};")

    passed = [report("bench/a.py::x"), report("tests/b.py::y"), report("bench/a.py::x", "teardown")]
    written = []
    reporter = SimpleNamespace(getreports=lambda outcome: passed, write=written.append)
    pytest_terminal_summary(reporter)
    assert written == ["bench/a.py::x call;"]


def test_a_stage_that_is_not_done_is_named():
    stages = {"tests": {"status": "ended", "why": "out of time"}}
    section = render.gpu_section([made_up() | {"stages": stages}])
    assert "Not complete: tests: ended, out of time." in section
    assert "Not complete" not in render.gpu_section([made_up()])


def test_the_diffusion_tables_are_taken_over():
    table = {"lines": ["D1: up.1", "| | images/s |", "| --- | --- |", "| ours | 3 |"]}
    table["lines"] += ["N2: encoder", "| norms | ms |"]
    section = render.gpu_section([made_up() | {"diffusion": table}])
    assert "\n\nD1: up.1\n\n| | images/s |\n| --- | --- |\n| ours | 3 |\n" in section
    assert "| ours | 3 |\n\nN2: encoder\n\n| norms | ms |\n" in section
    skipped = made_up() | {"diffusion": {"skipped": "diffusers is not installed"}}
    assert "D1" not in render.gpu_section([skipped])


def test_markers_that_are_missing_are_named(place, monkeypatch):
    folder, run = place
    (folder / "kernels.md").write_text("No markers.\n")
    assert "<!-- kernels:compiler:begin -->" in run(monkeypatch)
    assert (folder / "kernels.md").read_text() == "No markers.\n"


def test_the_digest_is_of_what_runs_on_the_device(tmp_path):
    def digest(text: str) -> str:
        (tmp_path / "k.py").write_text(text)
        return record.kernels_digest(tmp_path)

    text = (
        '"""What."""\nSIZE = 4\nOTHER = 1\n\n\n@triton.jit\ndef f(x):\n    """Twice."""\n'
        "    return 2 * g(x)  # why\n\n\ndef g(x):\n    return x\n\n\n"
        "def launch(x):\n    f[(1,)](x, SIZE)\n\n\ndef check(x):\n    assert x > OTHER\n"
    )
    before = digest(text)
    for old, harmless in {
        '"""What."""': '"""Another."""\n# More.',
        '"""Twice."""': '"""Two times."""',
        "OTHER = 1": "OTHER = 2",
        "x > OTHER": "x >= OTHER",
        "  # why": "",
    }.items():
        assert digest(text.replace(old, harmless)) == before
    for old, new in {
        "2 * g": "3 * g",
        "return x": "return -x",
        "= 4": "= 8",
        "(1,)": "(2,)",
    }.items():
        assert digest(text.replace(old, new)) != before, old


def test_a_record_is_whole_after_every_change(tmp_path):
    path = tmp_path / "r.json"
    record.Record(path).add("rows", {"a": 1})
    assert json.loads(path.read_text()) == {"rows": [{"a": 1}]}
    record.Record(path).stage("one", status="done")  # another process, later
    stages = {"one": {"status": "done"}}
    assert json.loads(path.read_text()) == {"rows": [{"a": 1}], "stages": stages}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_median_and_spread():
    assert harness.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == {
        "median_ms": 3.5,
        "low_ms": 2.0,
        "high_ms": 5.0,
        "samples": 6,
    }


def test_contenders_take_turns():
    order = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = harness.interleaved(contenders, torch.device("cpu"), seconds=0.0, least=3)
    assert order == ["a", "b"] * 4  # once to warm up
    assert times["a"]["samples"] == times["b"]["samples"] == 3
