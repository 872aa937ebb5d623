"""The compilations of kernels that `bench.compile_report` examines.

Letters: B queries, N keys, D feature width.
"""

from dataclasses import dataclass


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
        options: num_warps and num_stages.
        tensor_cores: whether the compiled code has to use them.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict
    divisible_by_16: tuple[str, ...]
    options: dict[str, int]
    tensor_cores: bool = False


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
        blocks: constants by their names, and the launch options num_warps and num_stages.
        ragged: arguments that are not known to be multiples of 16.
        tensor_cores: whether the compiled code has to use them.
    """
    constants = {key: value for key, value in blocks.items() if key in kernel.arg_names}
    options = {key: value for key, value in blocks.items() if key not in constants}
    assert set(options) == {"num_warps", "num_stages"}, f"{name}: no such arguments: {options}"
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
