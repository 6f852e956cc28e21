"""The classic data sets' files: all their forms give the same arrays, and none is believed."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kconv import datasets
from kconv._npz import read_npz

RNG = np.random.default_rng(0)
CIFAR10_PARTS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES = RNG.integers(0, 256, (6, 4, 32, 32, 3), np.uint8)
LABELS = RNG.integers(0, 10, (6, 4))
DIGITS = RNG.integers(0, 256, (7, 6, 6), np.uint8)


def rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def cifar10_pickles(protocol: int = 2) -> dict[str, bytes]:
    return {
        f"cifar-10-batches-py/{part}": pickle.dumps(
            {b"data": rows(x), b"labels": y.tolist(), b"batch_label": b"of the test"}, protocol
        )
        for part, x, y in zip(CIFAR10_PARTS, IMAGES, LABELS, strict=True)
    }


def cifar10_binary() -> dict[str, bytes]:
    return {
        f"cifar-10-batches-bin/{part}.bin": np.hstack(
            [y[:, None].astype(np.uint8), rows(x)]
        ).tobytes()
        for part, x, y in zip(CIFAR10_PARTS, IMAGES, LABELS, strict=True)
    }


def assert_is_cifar10(data: datasets.Dataset) -> None:
    np.testing.assert_array_equal(data.x_train, IMAGES[:5].reshape(-1, 32, 32, 3))
    np.testing.assert_array_equal(data.y_train, LABELS[:5].reshape(-1))
    np.testing.assert_array_equal(data.x_test, IMAGES[5])
    np.testing.assert_array_equal(data.y_test, LABELS[5])
    assert data.y_train.dtype == np.int64


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    """Those of NumPy 2, which writes these, and with the names of NumPy 1."""
    files = cifar10_pickles(protocol)
    assert_is_cifar10(datasets.load("cifar10", data_dir=write(tmp_path / "2", files)))
    if protocol < 4:  # the names' lengths stand before them from there on
        files = {n: d.replace(b"numpy._core.", b"numpy.core.") for n, d in files.items()}
        assert_is_cifar10(datasets.load("cifar10", data_dir=write(tmp_path / "1", files)))


def test_cifar10_pickle_of_python_2(tmp_path: Path) -> None:
    """As the published ones are: byte strings everywhere, written here by hand."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    files = {}
    for part, x, y in zip(CIFAR10_PARTS, IMAGES, LABELS, strict=True):
        data = rows(x).tobytes()
        files[f"cifar-10-batches-py/{part}"] = (
            b"\x80\x02}("
            + text(b"data")
            + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
            + text(b"b")
            + b"\x87R(K\x01M\x04\x00M\x00\x0c\x86cnumpy\ndtype\n"
            + text(b"u1")
            + b"K\x00K\x01\x87R(K\x03"
            + text(b"|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + struct.pack("<I", len(data))
            + data
            + b"tb"
            + text(b"labels")
            + b"]("
            + b"".join(b"K" + bytes([label]) for label in y)
            + b"eu."
        )
    assert_is_cifar10(datasets.load("cifar10", data_dir=write(tmp_path, files)))


def test_cifar10_binary(tmp_path: Path) -> None:
    root = write(tmp_path, cifar10_binary())
    assert_is_cifar10(datasets.load("cifar10", data_dir=root))
    assert_is_cifar10(datasets.load("cifar10", data_dir=root / "cifar-10-batches-bin"))
    path = root / "cifar-10-batches-bin/test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch\.bin is not a CIFAR batch: its 12,291 bytes"):
        datasets.load("cifar10", data_dir=root)
    path.unlink()
    with pytest.raises(ValueError, match=r"cifar-10-batches-bin lacks test_batch\.bin"):
        datasets.load("cifar10", data_dir=root)


def test_cifar100_binary(tmp_path: Path) -> None:
    fine, coarse = RNG.integers(0, 100, (2, 4), np.uint8), np.full((4, 1), 19, np.uint8)
    files = {
        f"cifar-100-binary/{part}.bin": np.hstack([coarse, y[:, None], rows(x)]).tobytes()
        for part, x, y in zip(("train", "test"), IMAGES, fine, strict=False)
    }
    data = datasets.load("cifar100", data_dir=write(tmp_path, files))
    np.testing.assert_array_equal(data.x_train, IMAGES[0])
    np.testing.assert_array_equal([data.y_train, data.y_test], fine)


@pytest.mark.parametrize("place", ["cifar-10-batches-py-target", ""])
@pytest.mark.parametrize("from_cache", [True, False])
def test_cifar10_in_the_cache_of_keras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, from_cache: bool
) -> None:
    write(tmp_path / "datasets" / place, cifar10_pickles(4))
    if from_cache:
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        assert_is_cifar10(datasets.load("cifar10"))
    else:
        assert_is_cifar10(datasets.load("cifar10", data_dir=tmp_path / "datasets"))


def test_mnist_in_its_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(7, dtype=np.uint8)
    images = {"x_train": DIGITS[:5], "x_test": DIGITS[5:]}
    numbers = {"y_train": labels[:5], "y_test": labels[5:].astype(np.int32)}
    places = [tmp_path / "npz", tmp_path / "npz/mnist.npz", tmp_path / "torchvision", None]
    places[0].mkdir()
    np.savez_compressed(tmp_path / "npz/mnist.npz", **images, **numbers)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    write(tmp_path / "home/datasets", {"mnist.npz": (tmp_path / "npz/mnist.npz").read_bytes()})
    for part, name in (("train", "train"), ("test", "t10k")):
        for array, kind in (
            (images[f"x_{part}"], "images-idx3"),
            (numbers[f"y_{part}"], "labels-idx1"),
        ):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = gzip.compress(content + array.astype(np.uint8).tobytes())
            write(places[2] / "MNIST/raw", {f"{name}-{kind}-ubyte.gz": content})
    for place in places:
        data = datasets.load("mnist", data_dir=place)
        np.testing.assert_array_equal(data.x_train[..., 0], images["x_train"])
        np.testing.assert_array_equal(data.x_test[..., 0], images["x_test"])
        assert [*data.y_train, *data.y_test] == list(range(7))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_parquet(tmp_path: Path, name: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image, label = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}.get(
        name, ("image", "label")
    )
    pixels = IMAGES[..., 0] if name == "mnist" else IMAGES
    folder = tmp_path / "plain_text"
    folder.mkdir()
    for part, x, y in zip(("train", "train", "test"), pixels, LABELS, strict=False):
        pictures = []
        for values in x:
            buffer = io.BytesIO()
            Image.fromarray(values).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        number = len(list(folder.glob(f"{part}*")))
        table = {image: pictures, label: y.tolist(), "coarse_label": [19] * 4}
        parquet.write_table(pyarrow.table(table), folder / f"{part}-{number}.parquet")
    data = datasets.load(name, data_dir=tmp_path)
    expected = pixels.reshape(*pixels.shape[:4], -1)
    np.testing.assert_array_equal(data.x_train, expected[:2].reshape(8, *expected.shape[2:]))
    np.testing.assert_array_equal(data.x_test, expected[2])
    np.testing.assert_array_equal(data.y_train, LABELS[:2].reshape(-1))

    whole = (folder / "test-0.parquet").read_bytes()
    (folder / "test-0.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"test-0\.parquet is not a readable Parquet file"):
        datasets.load(name, data_dir=tmp_path)
    parquet.write_table(pyarrow.table({"image": [1]}), folder / "test-0.parquet")
    with pytest.raises(ValueError, match=r"test-0\.parquet has 1 rows of image; expected"):
        datasets.load(name, data_dir=tmp_path)


def test_fifos_are_not_opened(tmp_path: Path) -> None:
    for name in ("cifar-10-python.tar.gz", "mnist.npz", "train-0.parquet", "test-0.parquet"):
        os.mkfifo(tmp_path / name)
    for name in ("cifar10", "mnist"):
        with pytest.raises(ValueError, match=f"{tmp_path.name} has neither .* Parquet files of"):
            datasets.load(name, data_dir=tmp_path)


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"train-0.parquet": b"", "test-0.parquet": b""})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.delitem(__import__("sys").modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ImportError, match=r"needs pyarrow, which .*: pip install pyarrow"):
        datasets.load("cifar10", data_dir=tmp_path)


# What is not believed


class Call:
    """Pickles as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def batch(**changes: Any) -> dict[bytes, Any]:
    x, y = rows(IMAGES[0]), LABELS[0].tolist()
    return {b"data": x, b"labels": y} | {k.encode(): v for k, v in changes.items()}


RECORDS = np.zeros(4, [("a", "u1", 3072)])
BAD_BATCHES: list[tuple[Any, str]] = [
    (batch(data=Call(os.system, ("exit 1",))), r"it names (posix|os)\.system, not only arrays"),
    (batch(data=np.array([[None] * 3072] * 4)), "an array that is not of bytes"),
    (batch(data=RECORDS), "an array that is not of bytes"),
    (batch(data=rows(IMAGES[0]).astype(np.int64)), "an array that is not of bytes"),
    (batch(data=RNG.random((4, 3072))), "an array that is not of bytes"),
    (batch(data=np.dtype("u1")), "its images are no array"),
    (batch(data=[1, 2]), "its images are no array"),
    (batch(data=rows(IMAGES[0])[:3]), "cannot reshape"),
    (batch(labels=[0.5] * 4), "its labels are not all integers"),
    (batch(labels=[True] * 4), "its labels are not all integers"),
    (batch(labels="four"), "its labels are not all integers"),
    (batch(labels={1: 2}), "it has a key that is no text"),
    ({b"labels": []}, "it has no data"),
    ([1], "it holds a list, not a dict"),
    (batch(labels=Call(np.empty, (4,))), "it names numpy.*empty"),
    (batch(labels=Call(np.ndarray, ((4,),))), r"it calls numpy\.ndarray"),
    (batch(labels=Call(np.dtype, ("u1",), (3, "|", None, ("a",), None, -1, -1, 0))), "another st"),
    (batch(labels=Call(np.dtype, ("u1",), {"a": 1})), "a dtype of another state"),
    (batch(extra={1, 2}), "it has the opcode EMPTY_SET|it names"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD_BATCHES)
@pytest.mark.parametrize("protocol", [2, 5])
def test_other_pickles_are_refused(tmp_path: Path, value: Any, message: str, protocol: int) -> None:
    if protocol == 5 and isinstance(value, dict) and isinstance(value.get(b"data"), np.ndarray):
        message += "|it has the opcode|it names numpy"  # arrays of objects and records differ
    files = cifar10_pickles() | {
        "cifar-10-batches-py/data_batch_3": pickle.dumps(value, protocol=protocol)
    }
    with pytest.raises(ValueError, match=f"data_batch_3 is not a CIFAR batch: .*({message})"):
        datasets.load("cifar10", data_dir=write(tmp_path, files))


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    for value in (10, -1):
        files = {n: pickle.dumps(batch(labels=[0, 1, 2, value])) for n in cifar10_pickles()}
        with pytest.raises(ValueError, match=rf"the labels go from .*{value}.*; expected 0 to 9"):
            datasets.load("cifar10", data_dir=write(tmp_path, files))


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**31,), (2**16,) * 4])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_declared_sizes_in_idx_files_are_not_believed(
    tmp_path: Path, shape: tuple[int, ...], suffix: str
) -> None:
    content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(100)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match="is not an IDX file of bytes, or is cut short"):
        datasets.read_idx(path)


def npy(dtype: Any, shape: Any, data: bytes) -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("|u1", (2**40,), b"1"), "declares"),
        (npy("|u1", (-1,), b""), "declares"),
        (npy("|u1", (2,), b"1"), "declares"),
        (npy("|O", (1,), bytes(8)), "not numbers"),
        (npy([("a", "|u1")], (1,), b"1"), "not numbers"),
        (npy("|u1", "two", b"12"), "shape"),
        (b"", "EOF"),
        (b"\x93NUMPY\x03\x00", "version"),
    ],
)
def test_declared_sizes_in_npz_files_are_not_believed(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as archive:
        archive.writestr("x_train.npy", content)
    with pytest.raises(ValueError, match=rf"mnist\.npz is not an \.npz file.*{message}"):
        datasets.load("mnist", data_dir=tmp_path)


def test_npz_files_are_read_as_numpy_does(tmp_path: Path) -> None:
    arrays = {
        "a": RNG.random((3, 4)).T,
        "b/c": np.array("text"),
        "d": np.zeros((0, 2), np.int8),
        "e": np.float32(3),
        "f": RNG.random(5).astype(">f4"),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            assert found[name].flags.writeable


def idx_file(path: Path) -> Callable[[], Any]:
    path.write_bytes(gzip.compress(struct.pack(">HBBII", 0, 8, 2, 9, 9) + bytes(range(81))))
    return lambda: datasets.read_idx(path)


def npz_file(path: Path) -> Callable[[], Any]:
    np.savez_compressed(path, a=DIGITS, b=np.arange(5))
    return lambda: read_npz(path)


def pickle_file(path: Path) -> Callable[[], Any]:
    write(path.parent, cifar10_pickles())
    source = path.parent / "cifar-10-batches-py/data_batch_2"
    source.write_bytes(source.read_bytes().replace(bytes(rows(IMAGES[1])), bytes(4 * 3072)))
    path.symlink_to(source)
    return lambda: datasets.load("cifar10", data_dir=path.parent)


@pytest.mark.parametrize(
    ("name", "make"), [("x.gz", idx_file), ("x.npz", npz_file), ("batch", pickle_file)]
)
def test_random_damage(
    tmp_path: Path, name: str, make: Callable[[Path], Callable[[], Any]]
) -> None:
    path = tmp_path / name
    read = make(path)
    read()
    whole = path.read_bytes()
    # Of a pickle, what is not pixels.
    places = np.array([i for i in range(len(whole)) if whole[i : i + 4] != bytes(4)])
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        if rng.random() < 0.2:
            del content[rng.choice(places) :]
        else:
            for position in rng.choice(places, rng.integers(1, 4)):
                content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            read()
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > 30
