"""Plain values and NumPy arrays from pickles, without running anything that a pickle names.

The unpickler knows a handful of names; NumPy's own constructors never run, stand-ins collect the
bytes. Read are the pickles of Python 2 and 3 (protocols 0 to 5) and of NumPy 1 and 2.
"""

import io
import pickle

import numpy as np

from semanticfl_ref.errors import DataError

MADE_BYTES = 512 << 20  # that strings converted to bytes may take in all


def load_plain(content: bytes, where: str) -> dict[str, object]:
    """The dict that a pickle holds; keys as str.

    Values are dicts, lists, tuples, numbers, strings, bytes, and NumPy arrays of uint8 or integers.

    Args:
        where: names the content in messages.

    Raises:
        DataError: any other name or opcode, a value that is no dict, or damaged bytes.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(value, dict):
            raise DataError(f"expected a dict, not a {type(value).__name__}")
        return {_text(key): _finished(item) for key, item in value.items()}
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # damaged pickles raise anything: IndexError, UnicodeDecodeError ...
        raise DataError(
            f"{where} is a damaged pickle ({type(error).__name__}): download the archive again"
        ) from None


class _Dtype:
    """Stands in for numpy.dtype: one of a few codes."""

    def __init__(self, code, *_):
        self.code = _text(code)
        if self.code not in ("u1", "i4", "i8"):
            raise DataError("an array of something other than bytes or integers: refused")

    def set_state(self, state):
        if _text(state[1]) not in ("|", "<", "="):
            raise DataError("an array of big-endian numbers: refused")

    def read(self, content) -> np.ndarray:
        return np.frombuffer(content, dtype="<" + self.code)


class _Array:
    """Stands in for numpy.ndarray; `values` is the real array, made from the bytes alone."""

    values = None

    def set_state(self, state):
        _, shape, dtype, columns_first, content = state
        self.fill(content, dtype, shape, "F" if columns_first else "C")

    def fill(self, content, dtype, shape, order):
        if not isinstance(dtype, _Dtype) or _text(order) not in ("C", "F"):
            raise DataError("an array of an unknown layout: refused")
        self.values = dtype.read(content).reshape(shape, order=_text(order))


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: the one in C allocates memory for any memo index that is named."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.bytes_left = MADE_BYTES
        self.callables = {
            ("_codecs", "encode"): self.encode,
            ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
            ("numpy", "dtype"): lambda *arguments: _Dtype(*arguments),
            ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes empty bytes
        }
        for core in ("numpy.core", "numpy._core"):
            self.callables[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
            self.callables[f"{core}.multiarray", "scalar"] = _scalar
            self.callables[f"{core}.numeric", "_frombuffer"] = _from_buffer

    def find_class(self, module, name):
        if (module, name) not in self.callables:
            raise DataError(f"a pickle that names {module}.{name}: refused, it may be hostile")
        return self.callables[module, name]

    def encode(self, text, encoding):
        """Protocol 2 of Python 3 writes bytes as codecs.encode(text, "latin1")."""
        if _text(encoding) != "latin1":
            raise DataError("a string in an encoding other than latin1: refused")
        self.bytes_left -= len(text)
        if self.bytes_left < 0:
            raise DataError(f"a pickle that makes more than {MADE_BYTES >> 20} MiB: refused")
        return text.encode("latin1")

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise DataError("a pickle that sets the state of an object: refused, it may be hostile")
        self.stack[-1].set_state(state)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_item(key, value)

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.set_item(key, value)

    def set_item(self, key, value):
        # Hashing a deeply nested tuple may take for ever.
        if not isinstance(key, str | bytes) or not isinstance(self.stack[-1], dict):
            raise DataError("a dict whose keys are not strings: refused")
        self.stack[-1][key] = value

    # Opcodes that make objects by other means, call registries or allocate at will are left out.
    refused = (
        *("PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
        *("DICT", "EMPTY_SET", "ADDITEMS", "FROZENSET", "NEXT_BUFFER", "READONLY_BUFFER"),
    )
    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        # As immutable bytes: the original allocates whatever length is claimed.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
    }
    for _name in refused:
        del dispatch[getattr(pickle, _name)[0]]


def _scalar(dtype, content) -> int:
    """A NumPy integer, as lists of labels may hold them."""
    if not isinstance(dtype, _Dtype):
        raise DataError("a number of an unknown type: refused")
    return int(dtype.read(content)[0])


def _from_buffer(content, dtype, shape, order) -> _Array:
    """How protocol 5 writes an array."""
    array = _Array()
    array.fill(content, dtype, shape, order)
    return array


def _finished(value):
    return value.values if isinstance(value, _Array) else value


def _text(value) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)
