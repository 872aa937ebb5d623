"""What Triton's compiler makes of every kernel, for GPUs that need not be present.

    python -m bench.compile_report

K9: for sm_80, sm_90 and sm_100 no variant spills, shared memory fits the chip, and tensor cores are
used in the variants that promise them. Everything is read from the compiled binary (cuobjdump,
nvdisasm): registers and stack, spilling instructions, matrix instructions by kind, and the width of
each load from global memory. The exit status is 1 if a variant breaks a rule.
"""

import argparse
import collections
import fnmatch
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.record import Record, kernels_digest

COMMAND = "python -m bench.compile_report --json bench/results/compile_report.json"
ARCHITECTURES = (80, 90, 100)
# Shared memory that one block can have: CUDA C++ Programming Guide, technical specifications per
# compute capability.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS_PER_MULTIPROCESSOR = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        type=int,
        default=ARCHITECTURES,
        choices=ARCHITECTURES,
        help="compute capabilities (default: all)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names of variants; * matches anything (default: all)",
    )
    parser.add_argument("--json", type=Path, help="file for the report (default: none)")
    parser.add_argument(
        "--modules",
        nargs="+",
        default=["bench.variants"],
        help="modules with a function variants() (default: bench.variants)",
    )
    options = parser.parse_args()
    # Triton reads this when a kernel is decorated; an interpreted kernel cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    chosen = [
        variant
        for variant in variants(options.modules)
        if any(fnmatch.fnmatch(variant.name, pattern) for pattern in options.only)
    ]
    if not chosen:
        sys.exit(f"no variant is called {' or '.join(options.only)}")
    rows = []
    for variant in chosen:
        for architecture in options.arch:
            rows.append(examine(variant, architecture))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        write(rows, options.json)
    broken = broken_rules(rows)
    verdict = f"{len(broken)} rules broken" if broken else "no rule broken"
    print(f"\n{len(rows)} compilations of {len(chosen)} variants; {verdict}", *broken, sep="\n")
    sys.exit(bool(broken))


def variants(modules: list[str]) -> list:
    """Every `Variant` of these modules; their names must differ."""
    found = [
        variant for module in modules for variant in importlib.import_module(module).variants()
    ]
    names = collections.Counter(variant.name for variant in found)
    doubled = [name for name, count in names.items() if count > 1]
    assert not doubled, f"several variants of one name: {doubled}"
    return found


def examine(variant, architecture: int) -> dict:
    """Compile a variant and read its binary; what the compiler refuses is a problem of the
    variant."""
    row = {"variant": variant.name, "arch": architecture}
    try:
        compiled = compile_variant(variant, architecture)
    except Exception as error:
        last_line = str(error).strip().splitlines()[-1:]
        problem = f"does not compile: {type(error).__name__}: {''.join(last_line)}"
        return row | {"problems": [problem]}
    usage, code = disassemble(compiled.asm["cubin"])
    row |= {"shared_bytes": compiled.metadata.shared} | read_usage(usage) | read_code(code)
    # More than the variant's warps under warp specialisation.
    threads = 32 * compiled.metadata.num_warps
    return row | {"problems": problems(row, threads, variant.tensor_cores)}


def compile_variant(variant, architecture: int):
    """Triton's compiled kernel, for a GPU that need not be present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, hints)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=variant.options)


def disassemble(binary: bytes) -> tuple[str, str]:
    """A binary's resource usage as cuobjdump prints it, and its code as nvdisasm does."""
    from triton import knobs

    def output_of(*command) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = output_of(knobs.nvidia.cuobjdump.path, "-res-usage", path)
        return usage, output_of(knobs.nvidia.nvdisasm.path, "-c", path)


def read_usage(text: str) -> dict:
    """Registers per thread, and bytes of stack and local memory per thread: 0 without spills."""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"] + found["LOCAL"]}


def read_code(text: str) -> dict:
    """Spilling instructions, matrix instructions by kind, and loads from global memory by their
    bits; counted where they stand, not how often they run."""
    opcodes = re.findall(
        r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)",
        text,
        re.MULTILINE,
    )
    spills, tensor, loads = 0, collections.Counter(), collections.Counter()
    for opcode in opcodes:
        kind, *modifiers = opcode.split(".")
        if kind in ("STL", "LDL"):
            spills += 1
        elif kind.endswith("MMA"):
            # HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100), and their kin for other types.
            tensor[kind] += 1
        elif kind in ("LDG", "LDGSTS"):
            loads[str(load_bits(modifiers))] += 1
        elif kind == "UTMALDG":
            loads["TMA"] += 1
    return {
        "spill_instructions": spills,
        "tensor_instructions": dict(sorted(tensor.items())),
        "load_bits": dict(sorted(loads.items())),
    }


def load_bits(modifiers: list[str]) -> int:
    """Bits per thread of a load by its modifiers; 32 where none says otherwise."""
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits[modifier] for modifier in modifiers if modifier in bits), 32)


def problems(row: dict, threads: int, tensor_cores: bool) -> list[str]:
    """The rules of K9 that a compiled variant breaks."""
    limit, registers, found = SHARED_LIMIT[row["arch"]], row["registers"], []
    if row["spill_instructions"] or row["stack_bytes"]:
        found.append(
            f"spills: {row['spill_instructions']} instructions, {row['stack_bytes']} bytes a thread"
        )
    if row["shared_bytes"] > limit:
        found.append(f"shared memory of {row['shared_bytes']} bytes: the chip has {limit}")
    if registers * threads > REGISTERS_PER_MULTIPROCESSOR:
        found.append(
            f"{registers} registers for each of {threads} threads: the chip has "
            f"{REGISTERS_PER_MULTIPROCESSOR}"
        )
    if tensor_cores and not row["tensor_instructions"]:
        found.append("no tensor-core instruction, though the variant promises some")
    return found


def broken_rules(rows: list[dict]) -> list[str]:
    """A line per broken rule."""
    return [f"{r['variant']}, sm_{r['arch']}: {problem}" for r in rows for problem in r["problems"]]


def write(rows: list[dict], path: Path) -> None:
    """The report as JSON; without times, so that the same kernels give the same file."""
    import triton

    path.unlink(missing_ok=True)
    record = Record(path)
    record.content |= {
        "kind": "compile_report",
        "triton": triton.__version__,
        "kernels": kernels_digest(),
    }
    record.set("rows", rows)


if __name__ == "__main__":
    main()
