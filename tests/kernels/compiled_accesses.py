"""Prints as JSON what becomes of the average's kernel, compiled for an H100 that need not be here.

accesses: "dtype form alignment" -> its kinds of load and store instructions. orders: dtype -> how a
comparison's entries lie in threads, which is the order in which they are added: one for each way,
over all forms and alignments.
"""

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from semanticfl_ref.kernels.weighted_average import block_sizes, weighted_average_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compiled(
    name: str, compared: bool, alignment: int, final: bool = True, start: str | None = None
) -> dict[str, str]:
    """The stages of a compilation.

    Args:
        name: the parameters' dtype.
        compared: whether with a comparison.
        alignment: of the rows, in bytes.
        final: whether the result is the average.
        start: dtype of the vector that is compared with, if it is another one.
    """
    kernel, sizes = weighted_average_kernel, block_sizes(DTYPES[name], compared)
    constants = {"sums": None, "weight": None, "FINAL": final, "ALIGNMENT": alignment}
    constants["BLOCK"] = sizes["BLOCK"]
    if not compared:
        constants["start"] = None
    types = dict.fromkeys(kernel.arg_names, "*fp64") | {"non_finite": "*i32", "rows": f"*{name}"}
    types |= {"start": f"*{start or name}"} | ({"values": f"*{name}"} if final else {})
    types |= dict.fromkeys(("P", "S", "row_stride"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [argument for argument, kind in types.items() if kind.startswith("*")]
    if alignment < 16:
        aligned.remove("rows")
    hints = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    return triton.compile(
        ASTSource(kernel, types, constants, hints),
        target=GPUTarget("cuda", 90, 32),
        options={name: value for name, value in sizes.items() if name != "BLOCK"},
    ).asm


def accesses(name: str, form: str, alignment: int) -> str:
    ptx = compiled(name, form == "compared", alignment)["ptx"]
    return " ".join(sorted(set(re.findall(r"(?:ld|st)\.global[\w.:]*", ptx))))


def orders(name: str, start: str | None = None) -> list[str]:
    found = set()
    for alignment in (16, 4):
        for final in (True, False):
            code = compiled(name, True, alignment, final, start)["ttgir"]
            layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*)$", code, re.MULTILINE))
            updates = re.findall(r"arith\.subf .*?: tensor<\d+xf64, (#\w+)>", code)
            found |= {layouts[layout] for layout in updates}
    return sorted(found)


if __name__ == "__main__":
    cases = [(name, form, n) for name in DTYPES for form in ("plain", "compared") for n in (16, 8)]
    by_dtype = {name: orders(name) for name in DTYPES}
    by_dtype["bf16, start in fp32"] = orders("bf16", "fp32")
    print(
        json.dumps(
            {
                "accesses": {" ".join(map(str, case)): accesses(*case) for case in cases},
                "orders": by_dtype,
            }
        )
    )
