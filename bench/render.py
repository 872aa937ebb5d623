"""Write the tables of the kernels' results into docs/kernels.md.

    python -m bench.render [--check]

Reads bench/results/*.json (`bench/gpu.sh`) and bench/results/compile_report.json (`python -m
bench.compile_report`), and writes between the markers `<!-- kernels:compiler:begin -->` ...
`<!-- kernels:compiler:end -->` and the same with `kernels:gpu`. With --check nothing is written:
the exit status is 1 if the document is stale, or the compiler's report is of other kernels.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.claims import EARLIER, claims, is_earlier
from bench.compile_report import COMMAND, broken_rules
from bench.harness import OURS
from bench.record import RESULTS, ROOT, kernels_digest

NO_GPU = (
    "No results from a GPU yet, so nothing is claimed about speed on one; run `bench/gpu.sh` on a "
    "machine with a CUDA device."
)
VARIANT_COLUMNS = ("variant", "registers", "spills", "shared KiB", "loads")
COLUMNS = (
    "kernel",
    "case",
    "dtype",
    "direction",
    "contender",
    "ms (20 ... 80 %)",
    "GB/s",
    "of the 4 GiB copy's rate",
    "extra MiB",
    "error",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the document is stale"
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=ROOT / "docs" / "kernels.md",
        help="file with the markers (default: docs/kernels.md)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder with the JSON files (default: bench/results)",
    )
    options = parser.parse_args()
    results, report = read(options.results)
    before = options.document.read_text(encoding="utf-8")
    sections = {
        "kernels:compiler": compiler_section(report),
        "kernels:gpu": gpu_section(results),
    }
    after = fill(before, sections)
    if not options.check:
        options.document.write_text(after, encoding="utf-8")
        print(f"{options.document}: {'unchanged' if after == before else 'written'}")
        return
    stale = []
    if after != before:
        stale.append(
            f"{options.document.name} differs from {options.results}: run `python -m bench.render`"
        )
    if report is not None and report["kernels"] != kernels_digest():
        stale.append(
            f"the compiler's report is of other kernels: run `{COMMAND}`, then `python -m "
            f"bench.render`"
        )
    print("\n".join(stale) or f"{options.document.name} is up to date")
    sys.exit(bool(stale))


def read(folder: Path) -> tuple[list[dict], dict | None]:
    """Results from GPUs, and the compiler's report if there is one."""
    by_kind = {"gpu": [], "compile_report": []}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        by_kind.setdefault(content["kind"], []).append(content)
    return by_kind["gpu"], next(iter(by_kind["compile_report"]), None)


def fill(text: str, sections: dict[str, str]) -> str:
    """The text with each section between its markers; exits if a pair is missing or doubled."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            sys.exit(f"the document needs the two lines\n{begin}\n{end}\nonce each, in this order")
        head, tail = text.split(begin)[0], text.split(end)[1]
        text = f"{head}{begin}\n{section}\n{end}{tail}"
    return text


def compiler_section(report: dict | None) -> str:
    """What the compiler makes of the kernels: a summary, and a line per variant."""
    if report is None:
        return f"No report of the compiler yet; run `{COMMAND}`."
    rows, variants = report["rows"], {}
    for row in rows:
        variants.setdefault(row["variant"], {})[row["arch"]] = row
    architectures = sorted({row["arch"] for row in rows})
    names = [f"sm_{architecture}" for architecture in architectures]
    broken = broken_rules(rows)
    verdict = "no variant spills, and shared memory fits the chip"
    if broken:
        verdict = f"rules broken: {'; '.join(broken)}"
    lines = [
        f"{len(variants)} variants compiled for {', '.join(names)} with Triton "
        f"{report['triton']}, without a GPU: {verdict}.",
        "",
        "<details><summary>Every variant</summary>",
        "",
        f"Cells are {' / '.join(names)}; loads from global memory are bits per thread x "
        f"instructions, on {names[-1]}.",
        "",
        *table_head(VARIANT_COLUMNS),
    ]
    for name, by_architecture in variants.items():
        lines.append(variant_line(name, [by_architecture.get(arch, {}) for arch in architectures]))
    return "\n".join([*lines, "", "</details>"])


def variant_line(name: str, rows: list[dict]) -> str:
    """A variant's row of the table, from its compilation for each architecture."""
    cells = [
        f"`{name}`",
        joined([str(row.get("registers", "?")) for row in rows]),
        joined([str(row.get("spill_instructions", "?")) for row in rows]),
        joined(
            [f"{row['shared_bytes'] / 1024:.0f}" if "shared_bytes" in row else "?" for row in rows]
        ),
        ", ".join(f"{bits} x{count}" for bits, count in rows[-1].get("load_bits", {}).items()),
    ]
    return f"| {' | '.join(cells)} |"


def gpu_section(results: list[dict]) -> str:
    """For each GPU its claims, then every measurement."""
    return "\n\n".join(map(device_section, results)) or NO_GPU


def device_section(result: dict) -> str:
    """A device's tables."""
    copy_rate, lines = result.get("copy", {}).get("gb_s"), [heading(result)]
    unfinished = [
        f"{name}: {status['status']}, {status.get('why', '')}"
        for name, status in result["stages"].items()
        if status["status"] != "done"
    ]
    if unfinished:
        lines.append(f"Not complete: {'; '.join(unfinished)}.")
    if copy_rate is not None:
        lines.append(f"In the same run the device copies {copy_rate:.0f} GB/s.")
    if "tests" in result:
        lines.append(f"Tests on it: {result['tests']['last'].strip('= ')}.")
    lines += ["", *table_head(("", "claim", "target", "measured", "met")), *claims(result)]
    diffusion = result.get("diffusion", {}).get("lines")
    if diffusion:
        # A heading, which is not of a table, begins each.
        lines += [line if line.startswith("|") else f"\n{line}\n" for line in diffusion]
    lines += ["", "<details><summary>Every measurement</summary>", "", *table_head(COLUMNS)]
    rows = result.get("rows", [])
    lines += [measurement(row, copy_rate, is_earlier(result)) for row in rows]
    return "\n".join([*lines, "", "</details>"])


def heading(result: dict) -> str:
    """What made the results, and whether the kernels are still the same."""
    text = (
        f"**{result['device']}**, {result['date']}: measured with the kernels of commit "
        f"{result.get('commit') or 'unknown'}; torch {result['torch']}, Triton "
        f"{result['triton']}, CUDA {result['cuda']}, driver {result['driver']}; "
        f"`{result['command']}`. {result['timer']}."
    )
    if is_earlier(result):
        text += (
            f" **The kernels have changed since:** what is marked as of an {EARLIER} has to be "
            f"measured again; the rows of the other contenders hold."
        )
    return text


def measurement(row: dict, copy_rate: float | None, earlier: bool = False) -> str:
    """A row of the table of measurements; `earlier`: ours was an earlier kernel."""
    mark = f" ({EARLIER})" if earlier and row["contender"].startswith(OURS) else ""
    head = f"| {' | '.join(row[name] for name in COLUMNS[:5])}{mark} |"
    if "median_ms" not in row:
        return f"{head} {row['failed']} | | | | |"
    rate, extra = row["bytes"] / row["median_ms"] / 1e6, row.get("peak_bytes")
    errors = ", ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())
    cells = [
        f"{row['median_ms']:.4g} ({row['low_ms']:.4g} ... {row['high_ms']:.4g})",
        f"{rate:.0f}" if rate else "",
        f"{rate / copy_rate:.0%}" if rate and copy_rate else "",
        "" if extra is None else f"{extra / 2**20:.0f}",
        errors if row["correct"] else f"**wrong** {errors}",
    ]
    return f"{head} {' | '.join(cells)} |"


def table_head(columns: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def joined(cells: list[str]) -> str:
    """The cells of several architectures, or the one value that all have."""
    if len(set(cells)) == 1:
        return cells[0]
    return " / ".join(cells)


if __name__ == "__main__":
    main()
