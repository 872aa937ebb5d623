"""The kernels' results as the README's tables and a roofline figure.  `python -m bench.render
[--check]`

Reads bench/results/*.json (`python -m bench.gpu`) and bench/results/compile_report.json (`python -m
bench.compile_report --json ...`), and writes what they say between the README's markers, `<!--
kernels:compiler:begin -->` ... `<!-- kernels:compiler:end -->` and the same with `kernels:gpu`.
With `--check` nothing is written: ends with 1 if the README says something else, or the compiler's
report is not of these kernels."""

import argparse
import json
import re
import sys
from pathlib import Path

from bench.claims import claims
from bench.record import RESULTS, ROOT, kernels_digest
from bench.roofline import draw, share_of_roofline

REPORT = "compile_report.json"
REPORT_COMMAND = f"python -m bench.compile_report --json bench/results/{REPORT}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the README is stale"
    )
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", help="the file with the markers"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the folder with the JSON files"
    )
    options = parser.parse_args()
    results, report = read(options.results)
    if not options.check:
        for path, result in results.items():
            print(draw(result, path.with_suffix(".png")))
    before = options.readme.read_text(encoding="utf-8")
    after = fill(
        before,
        {
            "kernels:compiler": compiler_section(report),
            "kernels:gpu": gpu_section(results, options.readme.parent),
        },
    )
    stale = (
        [
            f"{options.readme.name} does not say what {options.results} says: run `python -m bench.render`"
        ]
        if after != before
        else []
    )
    if report is not None and report["kernels"] != kernels_digest():
        stale.append(
            f"the compiler's report is of other kernels than these: run `{REPORT_COMMAND}`, then `python -m bench.render`"
        )
    if options.check:
        print("\n".join(stale) or f"{options.readme.name} is up to date")
        sys.exit(bool(stale))
    options.readme.write_text(after, encoding="utf-8")
    print(f"{options.readme}: written" if after != before else f"{options.readme}: unchanged")


def read(folder: Path) -> tuple[dict[Path, dict], dict | None]:
    """Results of GPUs by path, and the compiler's report if there is one."""
    files = {
        path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    report = files.pop(folder / REPORT, None)
    return {
        path: content for path, content in files.items() if content.get("kind") == "gpu"
    }, report


def fill(text: str, sections: dict[str, str]) -> str:
    """The text with each section between its markers; a pair that is missing or doubled is an error
    that says what to write.
    """
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            sys.exit(f"the README needs the two lines\n{begin}\n{end}\nonce each, in this order")
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, s=section, b=begin, e=end: f"{b}\n{s}\n{e}",
            text,
            flags=re.S,
        )
    return text


def compiler_section(report: dict | None) -> str:
    """What the compiler made of the kernels: one line that sums it up, and a line per variant."""
    if report is None:
        return f"No report of the compiler is kept yet: `{REPORT_COMMAND}`."
    rows, variants = report["rows"], {}
    for row in rows:
        variants.setdefault(row["variant"], {})[row["arch"]] = row
    architectures = sorted({row["arch"] for row in rows})
    broken = [
        f"{row['variant']}, sm_{row['arch']}: {problem}"
        for row in rows
        for problem in row["problems"]
    ]
    named = ", ".join(f"sm_{architecture}" for architecture in architectures)
    sound = "no variant spills, shared memory is within the chip's, and tensor cores are used where they should be"
    verdict = f"rules broken: {'; '.join(broken)}" if broken else sound
    cells_are = f"Cells are {' / '.join(named.split(', '))}; loads from global memory are bits per thread x instructions, on sm_{architectures[-1]}."
    lines = [
        f"{len(variants)} variants compiled for {named} with Triton {report['triton']}, no GPU needed: {verdict}.",
        "",
        "<details><summary>Every variant</summary>",
        "",
        cells_are,
        "",
        "| variant | registers | spills | shared KiB | tensor cores | loads |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_architecture in variants.items():
        of = [by_architecture.get(architecture, {}) for architecture in architectures]
        cells = [
            [row.get("registers", "?") for row in of],
            [row.get("spill_instructions", "?") for row in of],
            [f"{row['shared_bytes'] / 1024:.0f}" if "shared_bytes" in row else "?" for row in of],
            [counts(row.get("tensor_instructions", {})) for row in of],
        ]
        lines.append(
            f"| `{name}` | "
            + " | ".join(joined(cell) for cell in cells)
            + f" | {counts(of[-1].get('load_bits', {}))} |"
        )
    return "\n".join([*lines, "", "</details>"])


def gpu_section(results: dict[Path, dict], root: Path) -> str:
    """For each GPU: the claims, then every measurement; where there is no GPU's result, that is
    what it says.
    """
    if not results:
        return "No GPU has measured these kernels yet, so nothing is said of their speed on one: `bench/gpu.sh` on a machine with a CUDA device."
    return "\n\n".join(one_gpu(path, result, root) for path, result in results.items())


def one_gpu(path: Path, result: dict, root: Path) -> str:
    """One device's tables."""
    lines = [
        f"**{result['device']}**, {result['date']}: torch {result['torch']}, Triton {result['triton']}, CUDA {result['cuda']}, driver {result['driver']}; "
        f"`{result['command']}`. {result['timer']}."
        + ("" if result["kernels"] == kernels_digest() else " **The kernels have changed since.**")
    ]
    unfinished = [
        f"{name}: {how['status']}, {how.get('why', '')}"
        for name, how in result["stages"].items()
        if how["status"] != "done"
    ]
    lines += [f"Not complete: {'; '.join(unfinished)}."] if unfinished else []
    rates = ", ".join(
        f"{name} {rate['gb_s']:.0f} GB/s"
        if "gb_s" in rate
        else f"{name} {rate['tflop_s']:.0f} TFLOP/s"
        for name, rate in result.get("ceilings", {}).items()
    )
    lines += [f"Rates of the device in the same run: {rates}."] if rates else []
    lines += [f"Tests on it: {result['tests']['last'].strip('= ')}."] if "tests" in result else []
    lines += ["", "| | claim | target | measured |", "| --- | --- | --- | --- |", *claims(result)]
    diffusion = result.get("diffusion", {})
    lines += (
        ["", diffusion["lines"][0], "", *diffusion["lines"][1:]] if diffusion.get("lines") else []
    )
    figure = path.with_suffix(".png")
    if figure.is_file() and figure.resolve().is_relative_to(root.resolve()):
        lines += [
            "",
            f"![Roofline of {result['device']}]({figure.resolve().relative_to(root.resolve())})",
        ]
    columns = (
        "kernel",
        "case",
        "dtype",
        "direction",
        "contender",
        "ms (20 ... 80 %)",
        "GB/s",
        "TFLOP/s",
        "of the roofline",
        "extra MiB",
        "error",
    )
    lines += [
        "",
        "<details><summary>Every measurement</summary>",
        "",
        f"| {' | '.join(columns)} |",
        "|" + " --- |" * len(columns),
    ]
    lines += [measurement(row, result.get("ceilings", {})) for row in result.get("rows", [])]
    return "\n".join([*lines, "", "</details>"])


def measurement(row: dict, ceilings: dict) -> str:
    """One row of the table of measurements."""
    head = f"| {row['kernel']} | {row['case']} | {row['dtype']} | {row['direction']} | {row['contender']} |"
    if "median_ms" not in row:
        return f"{head} {row.get('failed') or row.get('skipped')} | | | | | |"
    share = share_of_roofline(row, ceilings)
    cells = [
        f"{row['median_ms']:.4g} ({row['low_ms']:.4g} ... {row['high_ms']:.4g})",
        f"{row['bytes'] / row['median_ms'] / 1e6:.0f}" if row["bytes"] else "",
        f"{row['flop'] / row['median_ms'] / 1e9:.3g}" if row["flop"] else "",
        f"{share:.0%}" if share is not None else "",
        f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") is not None else "",
        ("" if row["correct"] else "**wrong** ")
        + ", ".join(f"{name} {value:.1e}" for name, value in row["errors"].items()),
    ]
    return f"{head} " + " | ".join(cells) + " |"


def counts(found: dict) -> str:
    """{"HMMA": 8} as words."""
    return ", ".join(f"{kind} x{count}" for kind, count in found.items())


def joined(cells: list) -> str:
    """Cells of several architectures, or the one value that all have."""
    words = [str(cell) for cell in cells]
    return words[0] if len(set(words)) == 1 else " / ".join(word or "none" for word in words)


if __name__ == "__main__":
    main()
