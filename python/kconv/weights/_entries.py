"""Arrays in files: what a header says of them, and their values once they are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Entry", "cast", "decode", "item_size", "kind", "nbytes"]

Array = NDArray[Any]

# Types that NumPy lacks, by their names in the files' own terms, and the integers that hold them.
_ENCODED = {"bfloat16": "<u2", "float8_e4m3fn": "u1", "float8_e5m2": "u1"}
_KINDS = {"f": "floating point", "i": "integer", "u": "integer", "b": "boolean", "c": "complex"}


@dataclass(frozen=True)
class Entry:
    """One array of a file, of which only the header has been read.

    Attributes:
        shape: as the header says.
        dtype: NumPy's name of the type, or "bfloat16", "float8_e4m3fn" or "float8_e5m2".
        read: gives the values; those that NumPy has no type for as float32.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]


def kind(dtype: str) -> str:
    """Whether a type is "floating point", "integer", "boolean" or "complex".

    Raises:
        ValueError: if it is none of these.
    """
    if dtype in _ENCODED:
        return "floating point"
    try:
        return _KINDS[np.dtype(dtype).kind]
    except (KeyError, TypeError):
        raise ValueError(f"values of type {dtype} are no numbers that weights may be") from None


def item_size(dtype: str) -> int:
    """Bytes of one value in a file."""
    return np.dtype(_ENCODED.get(dtype, dtype)).itemsize


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of an array in a file; exact for whatever sizes a header names."""
    return math.prod(shape) * item_size(dtype)


def decode(raw: bytes | bytearray | Array, shape: tuple[int, ...], dtype: str) -> Array:
    """The array that little-endian bytes stand for; float32 for types that NumPy lacks."""
    stored = np.dtype(_ENCODED.get(dtype, dtype)).newbyteorder("<")
    array = np.frombuffer(raw, stored)
    if dtype == "bfloat16":  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "float8_e4m3fn":
        array = _float8(4, bias=7, infinities=False)[array]
    elif dtype == "float8_e5m2":
        array = _float8(5, bias=15, infinities=True)[array]
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(shape)


def _float8(exponent_bits: int, *, bias: int, infinities: bool) -> Array:
    """The values of all 256 codes.

    Without infinities, only the codes whose bits are all set are NaN, as the types called "fn".
    """
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    subnormal = exponent == 0
    values = np.ldexp(
        np.where(subnormal, mantissa, 1 + mantissa), np.where(subnormal, 1, exponent) - bias
    )
    if infinities:
        last = exponent == (1 << exponent_bits) - 1
        values[last] = np.where(mantissa[last] == 0, np.inf, np.nan)
    else:
        values[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def cast(array: Array, dtype: str) -> Array:
    """An array in the type of the model's, or in float32 for one that NumPy lacks.

    Raises:
        ValueError: if the types are of different kinds, or values do not fit.
    """
    found, wanted = kind(array.dtype.name), kind(dtype)
    if found != wanted or wanted == "complex":
        raise ValueError(f"its values are {found} ({array.dtype}), the model's are {dtype}")
    numpy_dtype = np.dtype(np.float32 if dtype in _ENCODED else dtype)
    if wanted == "integer" and array.size:
        limits = np.iinfo(numpy_dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ValueError(f"its values do not fit into the model's {dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(numpy_dtype, copy=False)
    narrower = wanted == "floating point" and result.itemsize < array.itemsize
    if narrower and not np.array_equal(np.isinf(array), np.isinf(result)):
        raise ValueError(f"its values do not fit into the model's {dtype}")
    return result
