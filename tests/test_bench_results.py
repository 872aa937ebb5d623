"""From measurements to the README: clocks, records, claims, the roofline and the rendered tables,
on numbers that a reader redoes on paper.
"""

import json
import sys

import pytest

from bench import claims, record, render, roofline, timing

CEILINGS = {"copy": {"gb_s": 1000.0}, "bf16": {"tflop_s": 100.0}}
README = "Before.\n<!-- kernels:compiler:begin -->\nold\n<!-- kernels:compiler:end -->\nBetween.\n<!-- kernels:gpu:begin -->\n<!-- kernels:gpu:end -->\nAfter.\n"


def row(kernel, case, direction, contender, median_ms, **more):
    place = {
        "kernel": kernel,
        "case": case,
        "dtype": "bf16",
        "direction": direction,
        "contender": contender,
        "ceiling": "bf16",
        "bytes": 10**6,
        "flop": 10**9,
    }
    times = {"median_ms": median_ms, "low_ms": median_ms, "high_ms": median_ms, "samples": 5}
    return place | times | {"peak_bytes": 2**20, "errors": {"loss": 1e-4}, "correct": True} | more


def made_up() -> dict:
    """A device that copies 1 TB/s and multiplies at 100 TFLOP/s."""
    training, large, average = "10 clients x 64 x 10", "65536 x 65536", "10 x 4.9 M"
    rows = [
        row(
            "info_nce",
            training,
            "forward and backward",
            "ours",
            0.1,
            launches={"info_nce_small": 1, "elementwise": 1},
            repeatable=True,
        ),
        row("info_nce", training, "forward and backward", "eager, client by client", 0.8),
        row(
            "info_nce", large, "forward", "ours", 10.0, flop=600 * 10**9, repeatable=True
        ),  # 60 of 100 TFLOP/s
        row(
            "info_nce",
            large,
            "forward and backward",
            "ours",
            40.0,
            peak_bytes=200 * 2**20,
            repeatable=True,
        ),
        row("info_nce", large, "forward and backward", "torch, chunked and checkpointed", 60.0),
        {
            "kernel": "info_nce",
            "case": large,
            "dtype": "bf16",
            "direction": "forward and backward",
            "contender": "Inf-CL",
            "skipped": "not installed",
        },
        row(
            "weighted_average",
            average,
            "forward",
            "ours",
            2.0,
            ceiling="copy",
            bytes=18 * 10**8,
            flop=0,
            repeatable=False,
        ),  # 0.9 TB/s
        row(
            "weighted_average",
            average,
            "forward",
            "plain copy of the rows",
            2.0,
            ceiling="copy",
            bytes=2 * 10**9,
            flop=0,
        ),
        row(
            "weighted_average",
            average,
            "forward",
            "NumPy, Flower's arithmetic, on the host",
            20.0,
            ceiling=None,
            correct=False,
        ),
    ]
    made_with = {
        "date": "2026-01-02",
        "torch": "2.11",
        "triton": "3.6",
        "cuda": "13.0",
        "driver": "1",
        "command": "python -m bench.gpu",
        "timer": "A clock",
    }
    went = {"stages": {"tests": {"status": "done"}}, "tests": {"last": "== 7 passed in 1s =="}}
    return (
        {
            "kind": "gpu",
            "device": "Made Up 1",
            "kernels": record.kernels_digest(),
            "ceilings": CEILINGS,
            "rows": rows,
        }
        | made_with
        | went
    )


def report() -> dict:
    common = {
        "threads": 128,
        "stages": 3,
        "stack_bytes": 0,
        "spill_instructions": 0,
        "tensor_memory_columns": 0,
        "problems": [],
    }
    rows = [
        common
        | {
            "variant": "forward",
            "arch": arch,
            "registers": 100 + arch,
            "shared_bytes": 64 << 10,
            "tensor_instructions": {kind: 4},
            "load_bits": {"128": 8},
        }
        for arch, kind in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"))
    ]
    return {
        "kind": "compile_report",
        "triton": "3.9",
        "kernels": record.kernels_digest(),
        "rows": rows,
    }


@pytest.fixture
def place(tmp_path):
    """A README with markers, and a results folder, both ours to write in; `run` renders and gives
    the exit status.
    """
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)

    def run(monkeypatch, *flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "render",
                "--readme",
                str(tmp_path / "README.md"),
                "--results",
                str(tmp_path / "results"),
                *flags,
            ],
        )
        try:
            render.main()
        except SystemExit as end:
            return end.code
        return 0

    return tmp_path, run


def test_claims_are_ratios_of_the_rows():
    table = {
        tuple(line.split(" | ")[:2]): line.split(" | ")[-1].removesuffix(" |")
        for line in claims.claims(made_up())
    }
    said = {
        name.removeprefix("| "): measured
        for (name, claim), measured in table.items()
        if name != "| K5"
    }
    assert said == {
        "K1": "8.00x",
        "K2": "info_nce_small x1, elementwise x1",
        "K3": "not measured",
        "K4": "60%",
        "K6": "200 MiB",
        "K8": "3 of 4 cases",
        "A1": "90%",
        # its result was wrong, and a wrong result has no speed
        "A3": "not measured (NumPy, Flower's arithmetic, on the host)",
    }
    assert sorted(measured for (name, _), measured in table.items() if name == "| K5") == [
        "1.50x",
        "not measured: Inf-CL not installed",
    ]


def test_share_of_the_roofline_on_paper():
    bound_by_products = row(
        "info_nce", "x", "forward", "ours", 10.0, flop=600 * 10**9
    )  # at least 6 ms
    bound_by_memory = row(
        "weighted_average", "x", "forward", "ours", 2.0, bytes=18 * 10**8, flop=0
    )  # at least 1.8 ms
    assert roofline.share_of_roofline(bound_by_products, CEILINGS) == pytest.approx(0.6)
    assert roofline.share_of_roofline(bound_by_memory, CEILINGS) == pytest.approx(0.9)
    assert (
        roofline.share_of_roofline(bound_by_products | {"ceiling": "fp32"}, CEILINGS) is None
    )  # that rate was not measured
    assert (
        roofline.share_of_roofline(bound_by_products | {"ceiling": None}, CEILINGS) is None
    )  # it ran on the host


def test_without_results_the_readme_says_so(place, monkeypatch):
    folder, run = place
    assert run(monkeypatch) == 0
    text = (folder / "README.md").read_text()
    assert (
        "No GPU has measured these kernels yet" in text
        and "No report of the compiler" in text
        and "old" not in text
    )
    assert text.startswith("Before.\n") and "\nBetween.\n" in text and text.endswith("After.\n")
    assert run(monkeypatch, "--check") == 0


def test_results_are_rendered_and_checked(place, monkeypatch, capsys):
    folder, run = place
    (folder / "results" / "made-up-1.json").write_text(json.dumps(made_up()))
    (folder / "results" / "rehearsal.json").write_text(
        json.dumps(made_up() | {"kind": "rehearsal", "device": "nothing"})
    )
    (folder / "results" / "compile_report.json").write_text(json.dumps(report()))
    assert run(monkeypatch, "--check") == 1, "the tables are not in the README yet"
    assert run(monkeypatch) == 0
    text = (folder / "README.md").read_text()
    assert (
        "| `forward` | 180 / 190 / 200 | 0 | 64 | HMMA x4 / HGMMA x4 / UTCHMMA x4 | 128 x8 |"
        in text
    )
    assert (
        "| info_nce | 65536 x 65536 | bf16 | forward | ours | 10 (10 ... 10) | 0 | 60 | 60% | 1 | loss 1.0e-04 |"
        in text
    )
    assert "| 20 (20 ... 20) | 0 | 0.05 |  | 1 | **wrong** loss 1.0e-04 |" in text
    assert "| Inf-CL | not installed | | | | | |" in text and "Tests on it: 7 passed in 1s." in text
    assert "nothing" not in text, "a rehearsal's numbers are not results"
    assert run(monkeypatch, "--check") == 0
    changed = made_up()
    changed["rows"][0]["median_ms"] = 0.05
    (folder / "results" / "made-up-1.json").write_text(json.dumps(changed))
    assert run(monkeypatch, "--check") == 1
    (folder / "results" / "made-up-1.json").write_text(json.dumps(made_up()))
    (folder / "results" / "compile_report.json").write_text(
        json.dumps(report() | {"kernels": "of another day"})
    )
    assert run(monkeypatch, "--check") == 1 and "other kernels" in capsys.readouterr().out


def test_the_figure(place, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, run = place
    (folder / "results" / "made-up-1.json").write_text(json.dumps(made_up()))
    assert run(monkeypatch) == 0
    assert (folder / "results" / "made-up-1.png").read_bytes().startswith(b"\x89PNG")
    assert "![Roofline of Made Up 1](results/made-up-1.png)" in (folder / "README.md").read_text()


def test_a_result_without_its_rates_has_no_figure(tmp_path):
    assert "no figure" in roofline.draw(made_up() | {"ceilings": {}}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_broken_rule_is_in_the_table():
    broken = report()
    broken["rows"][1] |= {
        "spill_instructions": 7,
        "problems": ["spills: 7 instructions, 32 bytes a thread"],
    }
    assert "rules broken: forward, sm_90: spills: 7" in render.compiler_section(broken)
    assert "| 0 / 7 / 0 |" in render.compiler_section(broken)


def test_results_of_older_kernels_say_so():
    assert "The kernels have changed since" in render.gpu_section(
        {record.RESULTS / "x.json": made_up() | {"kernels": "of another day"}}, record.ROOT
    )
    assert "The kernels have changed since" not in render.gpu_section(
        {record.RESULTS / "x.json": made_up()}, record.ROOT
    )


def test_the_diffusion_table_is_taken_over():
    table = {"lines": ["D1: up.1", "| | images/s |", "| --- | --- |", "| ours | 3 |"]}
    assert "\n\nD1: up.1\n\n| | images/s |\n| --- | --- |\n| ours | 3 |\n" in render.gpu_section(
        {record.RESULTS / "x.json": made_up() | {"diffusion": table}}, record.ROOT
    )
    assert "D1" not in render.gpu_section(
        {record.RESULTS / "x.json": made_up() | {"diffusion": {"skipped": "no diffusers"}}},
        record.ROOT,
    )


def test_markers_that_are_missing_are_named(place, monkeypatch):
    folder, run = place
    (folder / "README.md").write_text("No markers.\n")
    assert "<!-- kernels:compiler:begin -->" in run(monkeypatch)
    assert (folder / "README.md").read_text() == "No markers.\n"


def test_the_digest_is_of_code_alone(tmp_path):
    (tmp_path / "k.py").write_text(
        '"""What."""\n\n\ndef f(x):\n    """Twice."""\n    return 2 * x  # why\n'
    )
    before = record.kernels_digest(tmp_path)
    (tmp_path / "k.py").write_text(
        '"""Another."""\n# More.\ndef f(x):\n    """Two times."""\n    return 2 * x\n'
    )
    assert record.kernels_digest(tmp_path) == before
    (tmp_path / "k.py").write_text("def f(x):\n    return 3 * x\n")
    assert record.kernels_digest(tmp_path) != before


def test_a_record_is_whole_after_every_change(tmp_path):
    first = record.Record(tmp_path / "r.json")
    first.add("rows", {"a": 1})
    assert json.loads((tmp_path / "r.json").read_text()) == {"schema": 1, "rows": [{"a": 1}]}
    record.Record(tmp_path / "r.json").stage("one", status="done")  # another process, later
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "schema": 1,
        "rows": [{"a": 1}],
        "stages": {"one": {"status": "done"}},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_median_and_spread():
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == {
        "median_ms": 3.5,
        "low_ms": 2.0,
        "high_ms": 5.0,
        "samples": 6,
    }


def test_contenders_take_turns():
    import torch

    order = []
    times = timing.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        torch.device("cpu"),
        seconds=0.0,
        least=3,
    )
    assert order == ["a", "b"] * 4  # once to warm up
    assert times["a"]["samples"] == times["b"]["samples"] == 3
