"""The classic data sets: their original files, or Keras's downloader."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv.datasets.images import Arrays, open_files

_EMBEDDED = Path(__file__).parents[1] / "data"
_DIGITS = tuple("0123456789")
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
_CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
    bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
    porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes (the format of MNIST), gzipped or not.

    Args:
        path: The file; a name that ends in ``.gz`` says that it is gzipped.

    Returns:
        The array, with the shape that the file states.

    Raises:
        ValueError: The file is not such a file, or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a readable gzip file: {error}") from None
    rank = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * rank], ">u4").tolist())
    if not rank or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(f"{path} is not an IDX file of bytes, or is cut short")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _idx_arrays(folder: Path) -> Arrays:
    def read(name: str) -> NDArray[np.uint8]:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return read_idx(path)
        raise ValueError(f"{folder} has neither {name} nor {name}.gz")

    arrays: list[Any] = []
    for part in ("train", "t10k"):
        images, labels = (read(f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder}: the {part} images {images.shape} and labels {labels.shape} do not match"
            )
        arrays += [images[..., None], labels.astype(np.int64)]
    return tuple(arrays)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays, text and lists; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.endswith("multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it names {module}.{name}, not only arrays")


def _cifar_arrays(folder: Path, stem: str, parts: Sequence[str], label_key: bytes) -> Arrays:
    archive = folder / f"{stem}-python.tar.gz"
    unpacked = {"cifar-10": "cifar-10-batches-py", "cifar-100": "cifar-100-python"}[stem]
    if not archive.is_file() and not (folder / unpacked).is_dir():
        raise ValueError(f"{folder} has neither {archive.name} nor {unpacked}/")
    batches: dict[str, dict[bytes, Any]] = {}
    with open_files(archive if archive.is_file() else folder) as files:
        for name, data in files.read({f"{unpacked}/{part}" for part in parts}):
            try:
                batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
                shape = (len(batch[label_key]), 3, 32, 32)
                batch[b"data"] = batch[b"data"].reshape(shape).transpose(0, 2, 3, 1)
            except Exception as error:  # a broken pickle may raise anything
                raise ValueError(f"{name} is not a CIFAR batch: {error!r}") from None
            batches[PurePosixPath(name).name] = batch
    if missing := [part for part in parts if part not in batches]:
        raise ValueError(f"{folder}: {unpacked} lacks {', '.join(missing)}")
    train = [batches[part] for part in parts[:-1]]
    test = batches[parts[-1]]
    return (
        np.concatenate([batch[b"data"] for batch in train]),
        np.concatenate([np.asarray(batch[label_key], np.int64) for batch in train]),
        np.ascontiguousarray(test[b"data"]),
        np.asarray(test[label_key], np.int64),
    )


def _keras_arrays(name: str) -> Arrays:
    """What Keras's own downloader of this data set returns."""
    try:
        import keras
    except ImportError:
        raise ValueError(
            f"{name} is downloaded by Keras, which is not installed: install it, "
            "or give data_dir, a folder with the original files"
        ) from None
    try:
        train, test = getattr(keras.datasets, name).load_data()
    except Exception as error:  # a failed download is a bare Exception
        raise ValueError(f"Keras could not download {name}: {error}") from error
    arrays: list[Any] = []
    for images, labels in (train, test):
        images = images if images.ndim == 4 else images[..., None]
        arrays += [images, labels.reshape(-1).astype(np.int64)]
    return tuple(arrays)


def _embedded(name: str, data_dir: Path | None) -> Arrays:
    return _idx_arrays(_EMBEDDED / name)


def _mnist_like(name: str, data_dir: Path | None) -> Arrays:
    return _keras_arrays(name) if data_dir is None else _idx_arrays(data_dir)


def _cifar10(name: str, data_dir: Path | None) -> Arrays:
    if data_dir is None:
        return _keras_arrays(name)
    parts = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return _cifar_arrays(data_dir, "cifar-10", parts, b"labels")


def _cifar100(name: str, data_dir: Path | None) -> Arrays:
    if data_dir is None:
        return _keras_arrays(name)
    return _cifar_arrays(data_dir, "cifar-100", ["train", "test"], b"fine_labels")


CLASSIC: dict[str, tuple[Sequence[str], Callable[[str, Path | None], Arrays]]] = {
    "fashion_mnist_mini": (_FASHION, _embedded),
    "fashion_mnist": (_FASHION, _mnist_like),
    "mnist": (_DIGITS, _mnist_like),
    "cifar10": (_CIFAR10, _cifar10),
    "cifar100": (_CIFAR100, _cifar100),
}
"""The class names of each, and what reads it: its name and the files' folder to arrays."""
