"""Kernels whose compilation is known beforehand: one that is in order, and one for each rule that
it breaks.
"""

import triton
import triton.language as tl

from semanticfl_ref.kernels.dispatch import Variant

TILE = {
    "a": "*fp16",
    "b": "*fp16",
    "c": "*fp32",
    "D": "i32",
    "ROWS": "constexpr",
    "CHUNK": "constexpr",
}


@triton.jit
def scale(x, y, P, BLOCK: tl.constexpr):
    """y = 2 x."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + p, 2 * tl.load(x + p, mask=p < P), mask=p < P)


@triton.jit
def product(a, b, c, D, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One tile of a b^T: its accumulator is ROWS x ROWS, in the registers of the program's threads."""
    m, d = tl.arange(0, ROWS)[:, None], tl.arange(0, CHUNK)[None, :]
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for start in range(0, D, CHUNK):
        total = tl.dot(tl.load(a + m * D + start + d), tl.load(b + m * D + start + d).T, total)
    tl.store(c + m * ROWS + tl.arange(0, ROWS)[None, :], total)


def variants() -> list[Variant]:
    """ "scale" and "product" keep the rules; each of the others breaks the one that it is named
    after.
    """
    whole, copy = (
        ("a", "b", "c", "D"),
        {"x": "*fp32", "y": "*fp32", "P": "i32", "BLOCK": "constexpr"},
    )
    tile = {"kernel": product, "signature": TILE, "divisible_by_16": whole, "tensor_cores": True}
    return [
        Variant(
            name="scale",
            kernel=scale,
            signature=copy,
            constants={"BLOCK": 1024},
            divisible_by_16=("x", "y", "P"),
        ),
        Variant(name="scale-unaligned", kernel=scale, signature=copy, constants={"BLOCK": 1024}),
        Variant(
            name="product", constants={"ROWS": 64, "CHUNK": 32}, num_warps=4, num_stages=2, **tile
        ),
        Variant(
            name="spills", constants={"ROWS": 128, "CHUNK": 16}, num_warps=1, num_stages=2, **tile
        ),
        Variant(
            name="shared-memory",
            constants={"ROWS": 128, "CHUNK": 128},
            num_warps=8,
            num_stages=6,
            **tile,
        ),
        Variant(
            name="no-tensor-cores",
            kernel=scale,
            signature=copy,
            constants={"BLOCK": 1024},
            divisible_by_16=("x", "y", "P"),
            tensor_cores=True,
        ),
    ]
