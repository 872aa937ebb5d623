"""Prints how the average's kernel, compiled for an H100 that need not be here, accesses global
memory: as JSON, "dtype form alignment" -> its kinds of load and store instructions.
"""

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from semanticfl_ref.kernels.weighted_average import block_sizes, weighted_average_kernel


def accesses(name: str, dtype: torch.dtype, compared: bool, alignment: int) -> list[str]:
    """Kinds of access for parameters of a dtype in rows of an alignment, in bytes."""
    kernel, sizes = weighted_average_kernel, block_sizes(dtype, compared)
    constants = {"sums": None, "weight": None, "FINAL": True, "ALIGNMENT": alignment}
    constants["BLOCK"] = sizes["BLOCK"]
    if not compared:
        constants["start"] = None
    types = dict.fromkeys(kernel.arg_names, "*fp64") | {"non_finite": "*i32"}
    types |= dict.fromkeys(("rows", "start", "values"), f"*{name}")
    types |= dict.fromkeys(("P", "S", "row_stride"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [argument for argument, kind in types.items() if kind.startswith("*")]
    if alignment < 16:
        aligned.remove("rows")
    hints = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    compiled = triton.compile(
        ASTSource(kernel, types, constants, hints),
        target=GPUTarget("cuda", 90, 32),
        options={name: value for name, value in sizes.items() if name != "BLOCK"},
    )
    return sorted(set(re.findall(r"(?:ld|st)\.global[\w.:]*", compiled.asm["ptx"])))


if __name__ == "__main__":
    found = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for form in ("plain", "compared"):
            for alignment in (16, 8):
                kinds = accesses(name, dtype, form == "compared", alignment)
                found[f"{name} {form} {alignment}"] = " ".join(kinds)
    print(json.dumps(found))
