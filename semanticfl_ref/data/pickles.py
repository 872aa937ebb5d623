"""Plain values and NumPy arrays from pickles, without running anything that a pickle names.

The unpickler knows a handful of names. NumPy's own constructors never run: stand-ins collect the
bytes. It reads what Python 2 and 3 write in protocols 1 to 5, with NumPy 1 or 2. Memory and time
stay in proportion to the size of the pickle, up to a fixed bound.
"""

import io
import pickle
import re

import numpy as np

from semanticfl_ref.errors import DataError

OPCODES = 4_000_000  # CIFAR-100 in protocol 2, with every label a NumPy integer, has 1.8 million
MADE_BYTES = 256 << 20  # of strings converted to bytes; a file of CIFAR-100 has 154 MB
NAME_LENGTH = 100  # of keys and type codes


def load_plain(content: bytes, where: str) -> dict[str, object]:
    """The dict that a pickle holds, with its keys as str.

    Args:
        content: the pickle.
        where: names the content in messages.

    Returns:
        Key -> dict, list, tuple, number, string, bytes, or NumPy array of integers.

    Raises:
        DataError: any other name or opcode, a value that is not a dict, or damaged bytes.
    """
    try:
        value = _Unpickler(content).load()
        if not isinstance(value, dict):
            raise DataError(f"a pickle of a {type(value).__name__}, not of a dict: refused")
        return {key: v.values if isinstance(v, _Array) else v for key, v in value.items()}
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # damaged pickles raise anything: IndexError, UnicodeDecodeError ...
        raise DataError(
            f"{where} is a damaged pickle ({type(error).__name__}): download the archive again"
        ) from None


class _Opcodes(dict):
    """Opcode -> function, for so many opcodes: one byte can create an object of 60 bytes."""

    left = OPCODES

    def __getitem__(self, opcode):
        self.left -= 1
        if self.left < 0:
            raise DataError("a pickle of too many objects: refused, it may be hostile")
        return super().__getitem__(opcode)

    def __missing__(self, opcode):
        raise DataError(f"a pickle with opcode {opcode:#x}: refused, it is damaged or hostile")


class _Encode:
    """Stands in for codecs.encode, which protocols 1 and 2 of Python 3 call with "latin1"."""

    left = MADE_BYTES

    def __call__(self, text, encoding):
        if _text(encoding) != "latin1":
            raise DataError("a string in an encoding other than latin1: refused")
        self.left -= len(text)
        if self.left < 0:
            raise DataError(f"a pickle that makes more than {MADE_BYTES >> 20} MiB: refused")
        return text.encode("latin1")


class _Dict(dict):
    """A dict whose keys are short strings: a nested tuple may take forever to hash."""

    def __setitem__(self, key, value):
        super().__setitem__(_text(key), value)


class _Dtype:
    """Stands in for numpy.dtype: the code of an integer type."""

    def __init__(self, code, align, copy):
        self.code = _text(code)
        if not re.fullmatch("[iu][1248]", self.code):
            raise DataError("an array of something other than integers: refused")

    def set_state(self, state):
        if _text(state[1]) not in ("|", "<"):
            raise DataError("an array of big-endian numbers: refused")


class _Array:
    """Stands in for numpy.ndarray; `values` is the real array."""

    def __init__(self, values=None):
        self.values = values

    def set_state(self, state):
        _, shape, dtype, columns_first, content = state
        self.values = _numbers(content, dtype, shape, "F" if columns_first else "C")


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: the one in C allocates memory for any memo index that is named."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.dispatch = _Opcodes(self.dispatch)
        # Each with a fixed number of arguments: a longer tuple is refused instead of copied. None a
        # method of self: the memo, and all strings in it, would outlive this unpickler.
        self.callables = {
            "_codecs.encode": _Encode(),
            "__builtin__.bytes": lambda: b"",  # how protocol 2 writes empty bytes
            "numpy.ndarray": "ndarray",  # only ever an argument of _reconstruct
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
            "numpy.core.multiarray.scalar": _scalar,
            "numpy.core.numeric._frombuffer": _from_buffer,
        }

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        known_as = full_name.replace("numpy._core", "numpy.core", 1)  # NumPy 2, NumPy 1
        if known_as not in self.callables:
            raise DataError(
                f"a pickle that names {full_name[:NAME_LENGTH]!r}: refused, it may be hostile"
            )
        return self.callables[known_as]

    def load_reduce(self):
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple):  # a string would be taken apart into its bytes
            raise DataError("a pickle of a call without a tuple of arguments: refused")
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise DataError("a pickle that sets the state of an object: refused, it may be hostile")
        self.stack[-1].set_state(state)

    def load_empty_dict(self):
        self.append(_Dict())

    # Opcodes that make objects by other means, call registries or allocate at will; and those of
    # protocol 0, whose memo indices can be chosen to collide in a dict.
    refused = (
        *("PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
        *("DICT", "EMPTY_SET", "ADDITEMS", "FROZENSET", "NEXT_BUFFER", "READONLY_BUFFER"),
        *("PUT", "GET"),
    )
    dispatch = {  # noqa: RUF012 (no annotation: it replaces the base class's)
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.EMPTY_DICT[0]: load_empty_dict,
        # As immutable bytes: the original allocates whatever length is claimed.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
    }
    for _name in refused:
        del dispatch[getattr(pickle, _name)[0]]


def _scalar(dtype, content) -> int:
    """A NumPy integer, as lists of labels may hold them."""
    return int(_numbers(content, dtype, (), "C"))


def _from_buffer(content, dtype, shape, order) -> _Array:
    """How protocol 5 writes an array."""
    return _Array(_numbers(content, dtype, shape, _text(order)))


def _numbers(content, dtype, shape, order: str) -> np.ndarray:
    """The content read as integers, without a copy."""
    if not isinstance(dtype, _Dtype):
        raise DataError("an array of an unknown type: refused")
    return np.frombuffer(content, dtype="<" + dtype.code).reshape(shape, order=order)


def _text(value) -> str:
    if not isinstance(value, str | bytes) or len(value) > NAME_LENGTH:
        raise DataError("a name that is not a short string: refused")
    return value.decode("ascii") if isinstance(value, bytes) else value
