"""The classic data sets: their original files, or Keras's downloader."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from kconv.datasets.formats import (
    IDX_FILES,
    idx_path,
    read_cifar_binary,
    read_cifar_pickles,
    read_idx_files,
    read_keras_npz,
    read_parquet,
)
from kconv.datasets.images import Arrays, Part

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


class _Published(NamedTuple):
    """A form in which a data set is published."""

    places: tuple[str, ...]
    """Where to look for it below the folder of data, a file or a folder."""
    read: Callable[[Path], Arrays]


def _keras_places(name: str, archive: str) -> tuple[str, ...]:
    """The archive, and what Keras makes of it in its cache."""
    return (
        f"{archive}.tar.gz",
        name,
        f"{name}-target/{name}",
        f"{name}.tar.gz",
        f"{name}-target_archive",
    )


_CIFAR10_PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_FORMS = {
    "mnist": (
        _Published((".", "mnist", "MNIST/raw"), read_idx_files),
        _Published(("mnist.npz",), read_keras_npz),
    ),
    "fashion_mnist": (
        _Published((".", "fashion-mnist", "FashionMNIST/raw"), read_idx_files),
        _Published(("fashion_mnist.npz",), read_keras_npz),
    ),
    "cifar10": (
        _Published(
            _keras_places("cifar-10-batches-py", "cifar-10-python"),
            partial(read_cifar_pickles, parts=_CIFAR10_PARTS, label_key=b"labels"),
        ),
        _Published(
            ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
            partial(read_cifar_binary, parts=[f"{p}.bin" for p in _CIFAR10_PARTS], label_bytes=1),
        ),
    ),
    "cifar100": (
        _Published(
            _keras_places("cifar-100-python", "cifar-100-python"),
            partial(read_cifar_pickles, parts=("train", "test"), label_key=b"fine_labels"),
        ),
        _Published(
            ("cifar-100-binary.tar.gz", "cifar-100-binary"),
            partial(read_cifar_binary, parts=("train.bin", "test.bin"), label_bytes=2),
        ),
    ),
}
"""The forms of each, in the order to look for them; Hugging Face's Parquet files come after."""


def _find(
    name: str, folder: Path, enough: Callable[[Iterable[bool]], bool]
) -> Callable[[], Arrays] | None:
    """What reads a data set from a folder, which may also be one of the forms itself.

    ``enough`` is ``any`` or ``all``: of the four IDX files.
    """
    for form in _FORMS[name]:
        for place in form.places:
            path = folder / place
            if form.read is read_idx_files:
                if enough(idx_path(path, file).is_file() for file in IDX_FILES):
                    return partial(form.read, path)
            elif _is_there(path):
                return partial(form.read, path)
            elif folder.name == PurePosixPath(place).name and _is_there(folder):
                return partial(form.read, folder)
    # Hugging Face's folder is called plain_text, or like the data set.
    for parent in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
        train, test = (
            sorted(path for path in parent.glob(f"{part}*.parquet") if path.is_file())
            for part in ("train", "test")
        )
        if train and test:
            return partial(read_parquet, train, test, 3 if name.startswith("cifar") else 1)
    return None


def _is_there(path: Path) -> bool:
    """Whether it is a file or a folder; to open a FIFO would wait for its other end."""
    return path.is_file() or path.is_dir()


def _read(name: str, data_dir: Path | None) -> Arrays:
    if data_dir is not None:
        read = _find(name, data_dir, any)
        if read is None:
            known = [*IDX_FILES[:1]] if name.endswith("mnist") else []
            known += [place for form in _FORMS[name] for place in form.places if "/" not in place]
            listed = " nor ".join(place for place in known if place not in (".", "mnist"))
            raise ValueError(
                f"{data_dir} has neither {listed} nor Parquet files of {name} (train*.parquet and "
                "test*.parquet)"
            )
        return read()
    # Keras would find these, too; but they are read without it, and without running a pickle.
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"
    read = _find(name, cache, all) if cache.is_dir() else None
    return _downloaded(name) if read is None else read()


def _downloaded(name: str) -> Arrays:
    """What Keras's own downloader of this data set returns."""
    try:
        import keras
    except ImportError:
        raise ValueError(
            f"{name} is downloaded by Keras, which is not installed: install it, "
            "or give data_dir, a folder with the original files"
        ) from None
    try:
        with redirect_stdout(sys.stderr):  # of which it says something on the other stream
            parts = getattr(keras.datasets, name).load_data()
    except Exception as error:  # a failed download is a bare Exception
        raise ValueError(f"Keras could not download {name}: {error}") from error
    channels_first = keras.config.image_data_format() == "channels_first"
    found = []
    for images, labels in parts:
        if images.ndim == 3:
            images = images[..., None]
        elif channels_first:
            images = images.transpose(0, 2, 3, 1)
        found.append(Part(images, labels.reshape(-1).astype(np.int64)))
    return Arrays(*found)


def _embedded(name: str, data_dir: Path | None) -> Arrays:
    return read_idx_files(_EMBEDDED / name)


CLASSIC: dict[str, tuple[Sequence[str], Callable[[str, Path | None], Arrays]]] = {
    "fashion_mnist_mini": (_FASHION, _embedded),
    "fashion_mnist": (_FASHION, _read),
    "mnist": (_DIGITS, _read),
    "cifar10": (_CIFAR10, _read),
    "cifar100": (_CIFAR100, _read),
}
"""The class names of each, and what reads it: its name and the files' folder to arrays."""
