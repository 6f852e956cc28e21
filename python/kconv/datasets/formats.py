"""The formats in which the classic data sets are published: IDX, CIFAR's two, .npz, Parquet."""

from __future__ import annotations

import gzip
import math
import pickletools
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kconv._npz import read_npz
from kconv._require import require
from kconv.datasets.files import DEFLATE_RATIO, MAX_FILES, damage, open_files
from kconv.datasets.images import Arrays, Images, Part, decode_all

# MNIST's


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes (the format of MNIST), gzipped or not.

    Args:
        path: The file; a name that ends in ``.gz`` says that it is gzipped.

    Returns:
        The array, with the shape that the file states.

    Raises:
        ValueError: The file is not such a file, or is cut short.
    """
    zipped = path.suffix == ".gz"
    most = path.stat().st_size * (DEFLATE_RATIO if zipped else 1)
    with (
        damage(f"{path} is not a readable {'gzip' if zipped else 'IDX'} file"),
        gzip.open(path) if zipped else path.open("rb") as file,
    ):
        data = _idx_data(file, most)
    if data is None:
        raise ValueError(f"{path} is not an IDX file of bytes, or is cut short")
    return data


def _idx_data(file: Any, most: int) -> NDArray[np.uint8] | None:
    magic = file.read(4)
    if magic[:3] != b"\0\0\x08" or len(magic) < 4 or not 1 <= magic[3] <= 32:
        return None
    dimensions = file.read(4 * magic[3])
    if len(dimensions) < 4 * magic[3]:
        return None
    shape = np.frombuffer(dimensions, ">u4").tolist()
    count = math.prod(shape)
    if count > most:  # nor is the memory taken
        return None
    data = file.read(count)
    if len(data) != count or file.read(1):
        return None
    return np.frombuffer(data, np.uint8).reshape(shape)


IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def idx_path(folder: Path, name: str) -> Path:
    """The file of this name, or the gzipped one."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), folder / name)


def read_idx_files(folder: Path) -> Arrays:
    """MNIST's four files, or those of a data set like it."""
    arrays: list[NDArray[np.uint8]] = []
    for name in IDX_FILES:
        path = idx_path(folder, name)
        if not path.is_file():
            raise ValueError(f"{folder} has neither {name} nor {name}.gz")
        arrays.append(read_idx(path))
    x_train, y_train, x_test, y_test = arrays
    return Arrays(
        _part(f"{folder}: the train images", x_train, y_train),
        _part(f"{folder}: the t10k images", x_test, y_test),
    )


def _part(what: str, images: NDArray[Any], labels: NDArray[Any]) -> Part:
    """Images (N, H, W) or (N, H, W, C) and labels (N,) or (N, 1), if they are that."""
    if images.ndim == 3:
        images = images[..., None]
    if labels.shape == (len(labels), 1):
        labels = labels[:, 0]
    if images.ndim != 4 or labels.shape != images.shape[:1] or not images.size:
        raise ValueError(f"{what} {images.shape} and labels {labels.shape} do not match")
    if images.dtype != np.uint8 or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{what} are {images.dtype} and their labels {labels.dtype}; "
            "expected uint8 and integers"
        )
    return Part(images, labels.astype(np.int64))


def read_keras_npz(path: Path) -> Arrays:
    """``mnist.npz``: ``x_train``, ``y_train``, ``x_test`` and ``y_test``."""
    arrays = read_npz(path)
    if missing := {"x_train", "y_train", "x_test", "y_test"} - arrays.keys():
        raise ValueError(f"{path} has no {min(missing)}")
    return Arrays(
        *(
            _part(f"{path}: the {part} images", arrays[f"x_{part}"], arrays[f"y_{part}"])
            for part in ("train", "test")
        )
    )


# CIFAR's


def read_cifar_pickles(path: Path, parts: Sequence[str], label_key: bytes) -> Arrays:
    """CIFAR's version for Python.

    Args:
        path: The unpacked folder, or the archive.
        parts: The names of the files with training images, and last of that with test images.
        label_key: Under which key their labels are.

    Returns:
        The :class:`Arrays`.

    Raises:
        ValueError: A file is missing, damaged, or holds anything but arrays of bytes, integers
            and text.
    """

    def read(data: bytes) -> Part:
        batch = _unpickled(data)
        if missing := {b"data", label_key} - batch.keys():
            raise ValueError(f"it has no {min(missing).decode()}")
        labels = batch[label_key]
        if isinstance(labels, list) and all(type(label) is int for label in labels):
            labels = np.array(labels, np.int64)
        if not isinstance(labels, np.ndarray):
            raise ValueError("its labels are not all integers")
        return _part("its images", _channels_last(batch[b"data"], len(labels)), labels)

    return _cifar_arrays(path, parts, read)


def read_cifar_binary(path: Path, parts: Sequence[str], label_bytes: int) -> Arrays:
    """CIFAR's binary version.

    Args:
        path: The unpacked folder, or the archive.
        parts: As in :func:`read_cifar_pickles`.
        label_bytes: How many bytes of labels each image has; the last is taken.

    Returns:
        The :class:`Arrays`.

    Raises:
        ValueError: A file is missing or cut short.
    """

    def read(data: bytes) -> Part:
        record = label_bytes + 3 * 32 * 32
        if not data or len(data) % record:
            raise ValueError(f"its {len(data):,} bytes are not images of {record:,} each")
        rows = np.frombuffer(data, np.uint8).reshape(-1, record)
        pixels = _channels_last(rows[:, label_bytes:], len(rows))
        return _part("its images", pixels, rows[:, label_bytes - 1])

    return _cifar_arrays(path, parts, read)


def _channels_last(rows: Any, count: int) -> Images:
    if not isinstance(rows, np.ndarray):
        raise ValueError("its images are no array")
    return rows.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)


def _cifar_arrays(path: Path, parts: Sequence[str], read: Any) -> Arrays:
    batches: dict[str, Part] = {}
    with open_files(path) as files:
        # Those next to the root, where there are several of a name.
        found = {PurePosixPath(n).name: n for n in sorted(files.names, key=_depth, reverse=True)}
        wanted = {found[part]: part for part in parts if part in found}
        if missing := [part for part in parts if part not in found]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        for name, data in files.read(set(wanted)):
            with damage(f"{path}/{name} is not a CIFAR batch"):
                batches[wanted[name]] = read(data)
    train = [batches[part] for part in parts[:-1]]
    test = batches[parts[-1]]
    return Arrays(
        Part(
            np.concatenate([part.images for part in train]),
            np.concatenate([part.labels for part in train]),
        ),
        Part(np.ascontiguousarray(test.images), test.labels),
    )


def _depth(name: str) -> tuple[int, str]:
    return name.count("/"), name


# A pickle is a program; this runs the part of its language that makes CIFAR's batches, on values of
# its own: nothing is imported, and NumPy sees bytes and checked shapes.


class _Array:
    """An array of bytes; its value comes after it."""

    value: NDArray[np.uint8] | None = None


_DTYPE = object()
_DTYPE_CODES = ("u1", b"u1", "|u1", b"|u1")
_DTYPE_STATES = tuple((3, order, None, None, None, -1, -1, 0) for order in ("|", b"|"))
"""Of version 3, no byte order and no fields."""
_GLOBALS = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # how Python 3 writes bytes in protocol 2
    # numpy.core is numpy._core since NumPy 2, whose protocol 5 has the latter.
    **{f"numpy.{core}.multiarray _reconstruct": "array" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "frombuffer" for core in ("core", "_core")},
}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Global(NamedTuple):
    meaning: str


class _Batch:
    """Reads one pickle."""

    def __init__(self, data: bytes) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.may_encode = 2 * len(data)  # as one text may be encoded many times over
        for opcode, argument, _ in pickletools.genops(data):
            self._step(opcode.name, argument)
        self.value = self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _STRINGS:
            stack.append(argument.encode("latin1"))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(self._since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else self._since_mark()
            self._top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            values = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._since_mark()
            if name == "DICT":
                stack.append({})
            keys = values[::2]
            if not all(isinstance(key, str | bytes) for key in keys):
                raise ValueError("it has a key that is no text")
            self._top(dict).update(zip(keys, values[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                argument = " ".join(str(part) for part in _texts([stack.pop(), stack.pop()][::-1]))
            if argument not in _GLOBALS:
                raise ValueError(f"it names {argument[:80].replace(' ', '.')}, not only arrays")
            stack.append(_Global(_GLOBALS[argument]))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, _Global) or not isinstance(arguments, tuple):
                raise ValueError("it calls what is no function")
            stack.append(self._call(function.meaning, *arguments))
        elif name == "BUILD":
            self._set_state(stack.pop())
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the opcode {name}")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"it fills a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def _call(self, meaning: str, *arguments: Any) -> Any:
        if meaning == "array":
            return _Array()
        if meaning == "frombuffer":
            array = _Array()
            array.value = _byte_array(*arguments)
            return array
        if meaning == "dtype":
            if not arguments or arguments[0] not in _DTYPE_CODES:
                raise ValueError("it has an array that is not of bytes")
            return _DTYPE
        if meaning == "encode":
            text, encoding = _texts(arguments)
            self.may_encode -= len(text)
            if self.may_encode < 0 or encoding != "latin1":
                raise ValueError("it encodes what it should not")
            return text.encode("latin1")
        raise ValueError(f"it calls numpy.{meaning}")

    def _set_state(self, state: Any) -> None:
        top = self.stack[-1]
        if top is _DTYPE:
            if state not in _DTYPE_STATES:
                raise ValueError("it has a dtype of another state than that of bytes")
        elif isinstance(top, _Array) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            top.value = _byte_array(data, dtype, shape, "F" if fortran else "C")
        else:
            raise ValueError("it sets the state of what has none")


def _texts(values: Sequence[Any]) -> list[str]:
    if len(values) != 2 or not all(isinstance(value, str) for value in values):
        raise ValueError("it has something else where text should be")
    return list(values)


def _byte_array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> NDArray[np.uint8]:
    if dtype is not _DTYPE or not isinstance(data, bytes | bytearray):
        raise ValueError("it has an array that is not of bytes")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("it has an array whose shape is none")
    if order not in ("C", "F") or len(shape) > 4 or math.prod(shape) != len(data):
        raise ValueError(f"it has an array of {len(data):,} bytes and {len(shape)} dimensions")
    return np.frombuffer(data, np.uint8).reshape(shape, order=order)


def _unpickled(data: bytes) -> dict[bytes, Any]:
    """The pickled dict: arrays of bytes, numbers, text and lists of those, or ValueError."""
    batch = _Batch(data).value
    if not isinstance(batch, dict):
        raise ValueError(f"it holds a {type(batch).__name__}, not a dict")
    return {  # Python 3 may write keys as text
        key.encode() if isinstance(key, str) else key: (
            value.value if isinstance(value, _Array) else value
        )
        for key, value in batch.items()
    }


# Hugging Face's


def read_parquet(train: Sequence[Path], test: Sequence[Path], channels: int) -> Arrays:
    """The data sets as Hugging Face publishes them.

    Args:
        train: The files with training images.
        test: Those with test images.
        channels: How many of the images' channels to keep: 1 of grey images, else 3.

    Returns:
        The :class:`Arrays`.

    Raises:
        ValueError: A file is damaged, or has other columns.
        ImportError: pyarrow is not installed.
    """
    parts = []
    for paths in (train, test):
        found = [_parquet_part(path) for path in paths]
        if len({part.images.shape[1:] for part in found}) > 1:
            raise ValueError(f"{paths[0].parent}: the images differ in size")
        images = np.concatenate([part.images[..., :channels] for part in found])
        parts.append(Part(images, np.concatenate([part.labels for part in found])))
    return Arrays(*parts)


def _parquet_part(path: Path) -> Part:
    parquet = require("pyarrow.parquet", "pyarrow", f"reading {path.name}")
    broken = f"{path} is not a readable Parquet file"
    with damage(broken):
        table = parquet.ParquetFile(path)
    with table:
        with damage(broken):
            columns = table.schema_arrow.names
            count = table.metadata.num_rows
        image = next((name for name in ("img", "image") if name in columns), None)
        label = next((name for name in ("label", "fine_label") if name in columns), None)
        if image is None or label is None or not 0 < count <= MAX_FILES:
            raise ValueError(
                f"{path} has {count:,} rows of {', '.join(columns)}; expected images in img or "
                "image, and their classes in label or fine_label"
            )
        labels: list[int] = []

        def contents() -> Iterator[tuple[str, bytes]]:
            with damage(broken):
                for batch in table.iter_batches(batch_size=256, columns=[image, label]):
                    for picture, number in zip(batch[image], batch[label], strict=True):
                        name = f"row {len(labels)}"
                        labels.append(number.as_py())
                        yield name, picture["bytes"].as_py()

        images = decode_all(path, contents(), [f"row {i}" for i in range(count)])
    with damage(broken):
        return _part("its images", images, np.array(labels))
