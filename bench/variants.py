"""The compilations of kernels that `bench.compile_report` examines.

InfoNCE at the training shapes: batch 64, 10 to 1000 class anchors, 512 and 768 features. The
weighted average in the forms that a round uses: final, running sum, and with diagnostics. GroupNorm
at Stable Diffusion's numbers of channels: of large maps in two launches, of small ones in one. Each
in every dtype.

Letters: B queries, N keys, D feature width, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.harness import name_of
from semanticfl_ref.kernels import group_norm_silu, info_nce, weighted_average

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS, WIDTHS = (10, 100, 200, 1000), (512, 768)
# Of the VAE and the U-Net; whether the maps are large.
CHANNELS = {128: True, 256: True, 512: True, 320: True, 640: False, 1280: False, 1920: False}


@dataclass(frozen=True)
class Variant:
    """One ahead-of-time compilation: what a launch of some shape and dtype hands to Triton's
    compiler.

    Attributes:
        name: of the variant.
        kernel: the function under @triton.jit.
        signature: argument -> Triton's type, such as "*bf16", "i32", "fp32", "constexpr".
        constants: values of the arguments that are "constexpr".
        divisible_by_16: arguments whose value or address is known to be a multiple of 16.
        options: of the launch, where they are not Triton's defaults.
        tensor_cores: whether the compiled code has to use them.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict
    divisible_by_16: tuple[str, ...]
    options: dict[str, int]
    tensor_cores: bool = False


def variants() -> list[Variant]:
    """Every variant of our kernels."""
    return [*info_nce_variants(), *weighted_average_variants(), *group_norm_silu_variants()]


def info_nce_variants() -> Iterator[Variant]:
    for N in KEYS:
        for D in WIDTHS:
            for dtype in DTYPES:
                pointer = f"*{name_of(dtype)}"
                types = {"queries": pointer, "keys": pointer, "labels": "*i64", "tau": "fp32"}
                types |= {"losses": "*fp32", "gradient": "*fp32"}
                constants = {"D": D, "PRECISION": info_nce.PRECISION}
                yield variant(
                    f"info_nce {name_of(dtype)} 64x{N}x{D}",
                    info_nce.info_nce_kernel,
                    types,
                    constants | info_nce.block_sizes(N, D, dtype),
                    ragged=("N",),
                )
    yield variant(
        "info_nce add_tiles",
        info_nce.add_tiles_kernel,
        {"losses": "*fp32", "total": "*fp32"},
        info_nce.ADD_TILES,
        ragged=("tiles",),
    )


def weighted_average_variants() -> Iterator[Variant]:
    kernel, counts = weighted_average.weighted_average_kernel, ("P", "S", "row_stride")
    sums = {"non_finite": "*i32", "squared_norm": "*fp64"}
    for dtype in DTYPES:
        pointer = f"*{name_of(dtype)}"
        common = {"rows": pointer, "weights": "*fp64", "total": "*fp64", **sums}
        forms = {
            "final": {"values": pointer},
            "running sum": {"values": "*fp64", "sums": "*fp64", "weight": "*fp64"},
            "with diagnostics": {"values": pointer, "start": pointer},
        }
        for form, types in forms.items():
            absent = {"start", "sums", "weight"} - set(types)
            constants = {**dict.fromkeys(absent), "FINAL": form != "running sum", "ALIGNMENT": 16}
            blocks = weighted_average.block_sizes(dtype, "start" in types)
            name = f"weighted_average {name_of(dtype)}, {form}"
            yield variant(name, kernel, common | types, constants | blocks, ragged=counts)
    yield variant(
        "weighted_average add_blocks",
        weighted_average.add_blocks_kernel,
        sums | {"non_finite_S": "*i64", "squared_norm_S": "*fp64"},
        weighted_average.ADD_BLOCKS,
        ragged=("blocks",),
    )


def group_norm_silu_variants() -> Iterator[Variant]:
    statistics = dict.fromkeys(("means", "squares"))
    for dtype in DTYPES:
        types = dict.fromkeys(statistics, "*fp32")
        types |= dict.fromkeys(("x", "shift"), f"*{name_of(dtype)}")
        others = dict.fromkeys(("weight", "bias", "y"), f"*{name_of(dtype)}") | {"eps": "fp32"}
        for C, is_large in CHANNELS.items():
            name, integers = f"group_norm {name_of(dtype)} {C}", group_norm_silu.INTEGERS
            blocks = {"C": C, "G": 32} | group_norm_silu.block_sizes(C, 32, dtype)
            if is_large:
                kernel = group_norm_silu.statistics_kernel
                yield variant(f"{name}, statistics", kernel, types, blocks, ragged=integers)
            blocks |= {"SILU": True, "BLOCK_CHUNKS": group_norm_silu.MOST_CHUNKS}
            blocks |= {} if is_large else statistics
            kernel = group_norm_silu.group_norm_kernel
            yield variant(name, kernel, types | others, blocks, ragged=integers)


def variant(
    name: str,
    kernel,
    types: dict[str, str],
    blocks: dict,
    *,
    ragged: tuple[str, ...] = (),
    tensor_cores: bool = False,
) -> Variant:
    """The variant of a launch.

    Args:
        name: of the variant.
        kernel: the function under @triton.jit.
        types: argument -> Triton's type, of tensors and floating-point numbers; the other arguments
            are integers.
        blocks: constants by their names, and the options of the launch.
        ragged: arguments that are not known to be multiples of 16.
        tensor_cores: whether the compiled code has to use them.
    """
    constants = {key: value for key, value in blocks.items() if key in kernel.arg_names}
    options = {key: value for key, value in blocks.items() if key not in constants}
    known = {"num_warps", "num_stages", "enable_fp_fusion"}
    assert set(options) <= known, f"{name}: no such arguments: {options}"
    assert set(types) <= set(kernel.arg_names), f"{name}: no such arguments: {types}"
    signature = (
        dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    )
    aligned = [k for k, kind in signature.items() if kind not in ("constexpr", "fp32", "fp64")]
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible_by_16=tuple(k for k in aligned if k not in ragged),
        options=options,
        tensor_cores=tensor_cores,
    )
