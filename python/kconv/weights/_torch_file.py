"""Files of ``torch.save``, read without running what is pickled in them.

A pickle may name any function, to be called when it is read. Here the few that make tensors are
known, by what they are described to do, and all others become inert objects: so a checkpoint with
the trainer's own classes beside its weights is read, none of these classes is imported, and PyTorch
need not be installed.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from kconv.weights._entries import Array, Entry, decode, item_size

__all__ = ["Tensor", "Unreadable", "entry", "read_legacy", "read_zip"]

_DTYPES = {
    "double": "float64",
    "float64": "float64",
    "float": "float32",
    "float32": "float32",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "long": "int64",
    "int64": "int64",
    "int": "int32",
    "int32": "int32",
    "short": "int16",
    "int16": "int16",
    "char": "int8",
    "int8": "int8",
    "byte": "uint8",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "bool": "bool",
    "cfloat": "complex64",
    "complexfloat": "complex64",
    "complex64": "complex64",
    "cdouble": "complex128",
    "complexdouble": "complex128",
    "complex128": "complex128",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Tensor:
    """A tensor: a view of a storage, whose bytes ``load`` gives."""

    load: Callable[[], bytes]
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unreadable:
    """What stands for an object that only running code could make."""

    described = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an element, as lists' subclasses do."""

    def extend(self, values: Any) -> None:
        """Take elements, as lists' subclasses do."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict[Any, Any]):
    """An OrderedDict, without the attributes that PyTorch gives it."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    load: Callable[[], bytes]
    dtype: str | None  # none where the tensor says


@dataclass(frozen=True)
class _Dtype:
    name: str


class _Function:
    """A function that a pickle may call; nothing can be set on it."""

    __slots__ = ("_module", "_name")
    _module: str
    _name: str

    def __init__(self, module: str, name: str) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_name", name)

    def __call__(self, *args: Any) -> Any:
        return _FUNCTIONS[self._module, self._name](*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError("it changes a function")


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("a tensor has sizes that are no numbers")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Tensor:
    name = dtype.name if isinstance(dtype, _Dtype) else getattr(storage, "dtype", None)
    if not isinstance(storage, _Storage) or name is None:
        raise ValueError("a tensor has no storage")
    shape, strides = _sizes(shape), _sizes(strides)
    if len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    return Tensor(storage.load, name, _sizes((offset,))[0], shape, strides)


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): (
        lambda storage, offset, shape, strides, *_: _tensor(storage, offset, shape, strides)
    ),
    ("torch._utils", "_rebuild_tensor_v3"): (
        lambda storage, offset, shape, strides, grad, hooks, dtype, *_: _tensor(
            storage, offset, shape, strides, dtype
        )
    ),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda make, kind, args, state: make(*args),
}


def _global(module: str, name: str) -> Any:
    """What a name in a pickle stands for."""
    if (module, name) in _FUNCTIONS:
        return _Function(module, name)
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
        base = name.removesuffix("Storage").lower()
        return _Dtype(_DTYPES.get(base, base))  # "untyped" says nothing, which _storage knows
    if module == "torch" and name in _DTYPES:
        return _Dtype(_DTYPES[name])
    return type("Unreadable", (Unreadable,), {"described": f"{module}.{name}"})


# Protocol 5's buffers reserve what a size says, and the extension registry is the process's own.
# PyTorch writes neither.
_REFUSED = (
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
)


class _Unpickler(pickle._Unpickler):
    """Python's own, as that written in C reserves memory for whatever sizes a pickle names."""

    dispatch: ClassVar = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()
        if code not in {refused[0] for refused in _REFUSED}
    }

    def __init__(self, file: BinaryIO, storage: Callable[..., _Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return _global(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise ValueError("it refers to objects outside of it")
        kind, key, _, count = pid[1:5]
        if not isinstance(kind, _Dtype) or not isinstance(key, str) or type(count) is not int:
            raise ValueError("it describes a storage in unknown terms")
        dtype = None if kind.name in ("untyped", "typed", "") else kind.name
        return self._storage(key, dtype, count, *pid[5:])


def read_zip(archive: zipfile.ZipFile, pickled: str) -> Any:
    """What ``torch.save`` was given; each tensor as a :class:`Tensor`, others as inert objects.

    Args:
        archive: the file, open for as long as the tensors are wanted.
        pickled: the archive's member that ends in ``data.pkl``.

    Raises:
        Exception: of any kind, if it is damaged.
    """
    folder = pickled.removesuffix("data.pkl")
    members = {info.filename: info for info in archive.infolist()}
    for info in members.values():  # as PyTorch does; so nothing is larger than the file
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its part {info.filename!r} is compressed, which PyTorch never does")
    order = members.get(f"{folder}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")

    @lru_cache(maxsize=1)  # tensors that share a storage mostly follow one another
    def load(key: str) -> bytes:
        return archive.read(members[f"{folder}data/{key}"])

    def storage(key: str, dtype: str | None, count: int, *_: Any) -> _Storage:
        if f"{folder}data/{key}" not in members:
            raise ValueError(f"it lacks the storage {key!r}")
        return _Storage(lambda: load(key), dtype)

    return _Unpickler(BytesIO(archive.read(pickled)), storage).load()


def read_legacy(path: Path) -> Any:
    """As :func:`read_zip`, for the format before PyTorch 1.6: pickles, then the storages."""
    places: dict[str, tuple[int, int]] = {}

    def load(key: str) -> bytes:
        begin, size = places[key]
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(size)

    sizes: dict[str, int] = {}

    def storage(key: str, dtype: str | None, count: int, view: Any = None) -> _Storage:
        if dtype is None or view is not None:
            raise ValueError(f"its storage {key!r} is of a kind that is not read")
        sizes[key] = item_size(dtype)
        return _Storage(lambda: load(key), dtype)

    def nothing(*_: Any) -> _Storage:
        raise ValueError("it has a tensor before its header's end")

    with path.open("rb") as file:
        if _Unpickler(file, nothing).load() != _LEGACY_MAGIC:
            raise ValueError("it is a pickle, but not one of torch.save")
        for _ in range(2):  # the protocol's version, and the sizes of C's types
            _Unpickler(file, nothing).load()
        result = _Unpickler(file, storage).load()
        keys = _Unpickler(file, nothing).load()
        end = path.stat().st_size
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            size = count * sizes[key]
            if not 0 <= size <= end - file.tell():
                raise ValueError(f"its storage {key!r} would have {size} bytes")
            places[key] = file.tell(), size
            file.seek(size, 1)
    return result


def entry(tensor: Tensor) -> Entry:
    """A tensor as the other formats' arrays are."""

    def read() -> Array:
        if 0 in tensor.shape:
            return decode(b"", tensor.shape, tensor.dtype)
        raw, size = tensor.load(), item_size(tensor.dtype)
        steps = zip(tensor.shape, tensor.strides, strict=True)
        count = 1 + sum((length - 1) * stride for length, stride in steps)
        used = raw[tensor.offset * size : (tensor.offset + count) * size]
        if len(used) < count * size:
            raise ValueError(f"its tensor of shape {tensor.shape} is larger than its storage")
        values = decode(used, (count,), tensor.dtype)
        strides = tuple(stride * values.itemsize for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
        return np.array(view, order="C")

    return Entry(tensor.shape, tensor.dtype, read)
