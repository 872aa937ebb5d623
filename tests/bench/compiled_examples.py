"""Kernels whose compilation is known beforehand: some keep the rules, each of the others breaks
one.
"""

import triton
import triton.language as tl

from bench.variants import Variant, variant


@triton.jit
def scale(x, y, P, BLOCK: tl.constexpr):
    """y = 2 x."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + p, 2 * tl.load(x + p, mask=p < P), mask=p < P)


@triton.jit
def product(a, b, c, D, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One tile of a b^T; its accumulator, ROWS x ROWS, is in the registers of the program's
    threads.
    """
    m, d = tl.arange(0, ROWS)[:, None], tl.arange(0, CHUNK)[None, :]
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for start in range(0, D, CHUNK):
        total = tl.dot(tl.load(a + m * D + start + d), tl.load(b + m * D + start + d).T, total)
    tl.store(c + m * ROWS + tl.arange(0, ROWS)[None, :], total)


def variants() -> list[Variant]:
    """ "scale", "scale-unaligned" and "product" keep the rules; each of the others breaks the one
    that it is named after.
    """

    def scaling(name: str, **options) -> Variant:
        blocks = {"BLOCK": 1024, "num_warps": 4, "num_stages": 3}
        return variant(name, scale, {"x": "*fp32", "y": "*fp32"}, blocks, **options)

    def multiplying(name: str, ROWS: int, CHUNK: int, num_warps: int, num_stages: int) -> Variant:
        blocks = {"ROWS": ROWS, "CHUNK": CHUNK, "num_warps": num_warps, "num_stages": num_stages}
        types = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}
        return variant(name, product, types, blocks, tensor_cores=True)

    return [
        scaling("scale"),
        scaling("scale-unaligned", ragged=("x", "y", "P")),
        multiplying("product", ROWS=64, CHUNK=32, num_warps=4, num_stages=2),
        multiplying("spills", ROWS=128, CHUNK=16, num_warps=1, num_stages=2),
        multiplying("shared-memory", ROWS=128, CHUNK=128, num_warps=8, num_stages=6),
        scaling("no-tensor-cores", tensor_cores=True),
    ]
