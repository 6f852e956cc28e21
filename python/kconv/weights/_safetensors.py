"""Safetensors and ``.npz``: a header or a directory of arrays, checked before any is read.

Reading and writing take NumPy and nothing else, so that a served model needs no other package.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kconv.weights._entries import Array, Entry, decode, nbytes

__all__ = ["npz_entries", "safetensors_entries", "safetensors_header", "write_safetensors"]

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


def write_safetensors(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays; the caller sees to it that the file appears whole or not at all.

    Args:
        path: the file.
        arrays: of NumPy's own types, of any shape and strides.
        metadata: further texts for the header.

    Raises:
        ValueError: if the format has no such type.
        OSError: if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    # The widest types first, so that each array lies at a multiple of its items' size.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, array in ordered:
        if array.dtype.name not in _CODES:
            raise ValueError(f"{name!r} is of type {array.dtype}, which the format does not have")
        end = begin + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("its header has an entry twice")
    return result


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """The header of a file that has the format's structure, or None.

    Raises:
        ValueError: if only what follows the length, which looks like a header, is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        if len(head) < 9 or head[8:] != b"{":
            return None
        (length,) = struct.unpack("<Q", head[:8])
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        text = head[8:] + file.read(length - 1)
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def safetensors_entries(
    path: Path, header: dict[str, Any]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The arrays of a safetensors file and its metadata.

    Raises:
        ValueError: if the header is not consistent with itself or the file's size.
    """
    with path.open("rb") as file:
        start = 8 + int(struct.unpack("<Q", file.read(8))[0])
    available = path.stat().st_size - start
    metadata = header.get("__metadata__", {})
    entries, spans = {}, []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape = value["dtype"], tuple(value["shape"])
            begin, end = value["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"its header does not describe {name!r}") from None
        if code not in _DTYPES:
            raise ValueError(f"{name!r} has the unknown type {code!r}")
        dtype = _DTYPES[code]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name!r} has sizes that are no numbers")
        if end - begin != nbytes(shape, dtype) or end > available:
            raise ValueError(f"{name!r} of shape {shape} and {dtype} is not where its header says")
        spans.append((begin, end))
        entries[name] = Entry(shape, dtype, _reader(path, start + begin, shape, dtype))
    spans.sort()
    starts = [begin for begin, _ in spans] + [available]
    if [0, *(end for _, end in spans)] != starts:
        raise ValueError("its arrays overlap or have gaps between them")
    return entries, metadata if isinstance(metadata, dict) else {}


def _reader(path: Path, begin: int, shape: tuple[int, ...], dtype: str) -> Any:
    def read() -> Array:
        with path.open("rb") as file:
            file.seek(begin)
            return decode(file.read(nbytes(shape, dtype)), shape, dtype)

    return read


def npz_entries(archive: zipfile.ZipFile) -> dict[str, Entry]:
    """The arrays of a ``.npz`` file, none of them of Python objects.

    Raises:
        ValueError: if a member is no array of numbers, or is not as long as it says.
    """
    entries = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:
                raise ValueError(f"{name!r} is of the unknown version {version}")
            shape, fortran, dtype = read(file)
            header = file.tell()
        if dtype.hasobject or dtype.fields is not None:
            raise ValueError(f"{name!r} holds {dtype}, no numbers")
        if math.prod(shape) * dtype.itemsize != info.file_size - header:
            raise ValueError(f"{name!r} of shape {shape} has {info.file_size - header} bytes")
        if name in entries:
            raise ValueError(f"it has {name!r} twice")
        entries[name] = Entry(
            shape, dtype.name, _npz_reader(archive, info, header, shape, fortran, dtype)
        )
    return entries


def _npz_reader(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    header: int,
    shape: tuple[int, ...],
    fortran: bool,
    dtype: np.dtype[Any],
) -> Any:
    def read() -> Array:
        with archive.open(info) as file:
            file.seek(header)
            array = np.frombuffer(file.read(), dtype)
        array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
        return array.astype(dtype.newbyteorder("="), copy=False)

    return read
