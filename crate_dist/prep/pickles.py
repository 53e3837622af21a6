"""Pickled dictionaries of plain values and arrays of bytes, read without running anything in them.

A pickle is a program. This reader knows the four names that numpy's arrays need and puts stand-ins in their place,
which only keep what they are given; every other name ends the reading. So neither numpy nor anything else is called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PickleError(ValueError):
    """A pickle that is damaged, or holds what does not belong there."""


def load_dict(data: bytes) -> dict[str, Any]:
    """Reads a pickled dictionary of Python 2 or 3; arrays of uint8 come as numpy arrays, text of Python 2 as bytes.

    Raises PickleError when the pickle is damaged, is no dictionary, or names anything but arrays.
    """
    try:
        found = _Reader(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(found, dict):
            raise PickleError(f"it holds a {type(found).__name__}, no dictionary")
        return {
            key.decode("ascii") if isinstance(key, bytes) else str(key): value.array()
            if isinstance(value, _Array)
            else value
            for key, value in found.items()
        }
    except PickleError:
        raise
    except Exception as error:  # what damaged bytes make the unpickler trip over is anyone's guess
        raise PickleError(f"it is damaged: {type(error).__name__}: {error}") from error


class _Dtype:
    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment, which bytes do not have


class _Array:
    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        _, shape, dtype, by_columns, raw = self.state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "B") or not isinstance(raw, bytes):
            raise PickleError("it has an array of something else than bytes")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")


def _begin_array(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1"}[encoding])  # how Python 3 writes bytes for Python 2


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _begin_array,
    ("numpy._core.multiarray", "_reconstruct"): _begin_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (known := _KNOWN.get((module, name))) is None:
            raise PickleError(f"it asks for {module}.{name}, which has no place in it and is not opened: it could run")
        return known
