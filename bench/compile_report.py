"""What Triton's compiler makes of every kernel, for GPUs that need not be here.  `python -m
bench.compile_report`

K9: for sm_80, sm_90 and sm_100 no variant spills, each one's shared memory is within the chip's,
    and tensor cores are used where a variant says so.
Everything is read off the compiled binary (cuobjdump, nvdisasm): registers and stack, spilling
instructions, matrix instructions by kind, and how many bits each load from global memory takes.
Ends with 1 if a variant breaks a rule."""

import argparse
import collections
import fnmatch
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import KERNELS, Record, kernels_digest

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
        help="compute capabilities",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="variants by name; * stands for anything",
    )
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument(
        "--modules",
        nargs="+",
        help="modules with a function variants() (default: those of kernels/)",
    )
    options = parser.parse_args()
    # Triton reads this when a kernel is decorated; an interpreted kernel cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    chosen = [
        v
        for v in variants(options.modules or kernel_modules())
        if any(fnmatch.fnmatch(v.name, pattern) for pattern in options.only)
    ]
    if not chosen:
        sys.exit(f"no variant is called {' or '.join(options.only)}")
    rows = []
    print(HEADER)
    for variant in chosen:
        for architecture in options.arch:
            rows.append(examine(variant, architecture))
            print(line(rows[-1]), flush=True)
    if options.json:
        write(rows, options.json)
    broken = [
        f"{row['variant']}, sm_{row['arch']}: {problem}"
        for row in rows
        for problem in row["problems"]
    ]
    print(
        f"\n{len(rows)} compilations of {len(chosen)} variants; "
        + (f"{len(broken)} rules broken" if broken else "no rule broken"),
        *broken,
        sep="\n",
    )
    sys.exit(bool(broken))


def kernel_modules() -> list[str]:
    """The files of kernels/ that describe variants."""
    return [
        f"semanticfl_ref.kernels.{path.stem}"
        for path in sorted(KERNELS.glob("*.py"))
        if "\ndef variants(" in path.read_text(encoding="utf-8")
    ]


def variants(modules: list[str]) -> list:
    """Every `Variant` of these modules; two of one name are an error."""
    found = [
        variant for module in modules for variant in importlib.import_module(module).variants()
    ]
    names = collections.Counter(variant.name for variant in found)
    assert max(names.values(), default=1) == 1, (
        f"variants of one name: {[name for name, count in names.items() if count > 1]}"
    )
    return found


def examine(variant, architecture: int) -> dict:
    """Compile a variant and read its binary. What the compiler refuses is a problem of that
    variant, not of the report.
    """
    began = time.perf_counter()
    row = {
        "variant": variant.name,
        "arch": architecture,
        "threads": 32 * variant.num_warps,
        "stages": variant.num_stages,
    }
    try:
        compiled = compile_variant(variant, architecture)
    except Exception as error:
        text = str(error).strip().splitlines()
        return row | {
            "problems": [f"does not compile: {type(error).__name__}: {text[-1] if text else ''}"],
            "seconds": round(time.perf_counter() - began, 1),
        }
    row |= {
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
    }
    usage, code = disassemble(compiled.asm["cubin"])
    row |= read_usage(usage) | read_code(code)
    row["threads"] = 32 * compiled.metadata.num_warps  # warp specialisation adds some
    return row | {
        "problems": problems(row, variant.tensor_cores),
        "seconds": round(time.perf_counter() - began, 1),
    }


def compile_variant(variant, architecture: int):
    """Triton's compiled kernel, for a GPU that need not be in the machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    strangers = [
        name
        for name in (*variant.signature, *variant.constants, *variant.divisible_by_16)
        if name not in names
    ]
    assert not strangers, (
        f"{variant.name}: {strangers} are not arguments of {variant.kernel.__name__}"
    )
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in names
    }
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    source = ASTSource(variant.kernel, signature, dict(variant.constants), hints)
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )


def disassemble(binary: bytes) -> tuple[str, str]:
    """What cuobjdump says of a binary's resources, and nvdisasm of its instructions."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", path],
            capture_output=True,
            text=True,
            check=True,
        )
        code = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True
        )
    return usage.stdout, code.stdout


def read_usage(text: str) -> dict:
    """Registers per thread, and bytes of stack and local memory per thread: both stay 0 in a kernel
    that does not spill.
    """
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"] + found["LOCAL"]}


def read_code(text: str) -> dict:
    """Spilling instructions, matrix instructions by kind, loads from global memory by their bits;
    each counted where it stands, not how often it runs.
    """
    opcodes = re.findall(
        r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)",
        text,
        re.M,
    )
    spills, tensor, loads = 0, collections.Counter(), collections.Counter()
    for opcode in opcodes:
        kind, *modifiers = opcode.split(".")
        if kind in ("STL", "LDL"):
            spills += 1
        elif kind.endswith(
            "MMA"
            # HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100: the fifth generation, in tensor memory), and
            # their kin of other types
        ):
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
    """Bits per thread of a load by its modifiers; 32 where none tells."""
    narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
    return next(
        (narrow.get(m) or int(m) for m in modifiers if m in narrow or m in ("64", "128", "256")), 32
    )


def problems(row: dict, tensor_cores: bool) -> list[str]:
    """The rules of K9 that a compiled variant breaks."""
    limit, found = SHARED_LIMIT[row["arch"]], []
    if row["spill_instructions"] or row["stack_bytes"]:
        found.append(
            f"spills: {row['spill_instructions']} instructions, {row['stack_bytes']} bytes a thread"
        )
    if row["shared_bytes"] > limit:
        found.append(f"shared memory of {row['shared_bytes']} bytes: the chip has {limit}")
    if row["registers"] * row["threads"] > REGISTERS_PER_MULTIPROCESSOR:
        found.append(
            f"{row['registers']} registers for each of {row['threads']} threads: the chip has {REGISTERS_PER_MULTIPROCESSOR}"
        )
    if tensor_cores and not row["tensor_instructions"]:
        found.append("no tensor-core instruction, and the variant promises some")
    return found


HEADER = "| variant | sm | registers | spills | shared KiB | tensor cores | loads, bits x count |\n| --- | --- | --- | --- | --- | --- | --- |"


def line(row: dict) -> str:
    """One row of the printed table."""
    if "registers" not in row:
        return f"| {row['variant']} | {row['arch']} | {row['problems'][0]} | | | | |"
    tensor = ", ".join(f"{kind} x{count}" for kind, count in row["tensor_instructions"].items())
    loads = ", ".join(
        f"{bits} x{count}"
        for bits, count in sorted(
            row["load_bits"].items(), key=lambda item: (len(item[0]), item[0])
        )
    )
    return f"| {row['variant']} | {row['arch']} | {row['registers']} | {row['spill_instructions']} | {row['shared_bytes'] / 1024:.0f} | {tensor} | {loads} |"


def write(rows: list[dict], path: Path) -> None:
    """The report as JSON. No times: compiled again, the same kernels give the same file."""
    import triton

    path.unlink(missing_ok=True)
    record = Record(path)
    record.content |= {
        "kind": "compile_report",
        "triton": triton.__version__,
        "kernels": kernels_digest(),
    }
    record.set(
        "rows", [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    )


if __name__ == "__main__":
    main()
