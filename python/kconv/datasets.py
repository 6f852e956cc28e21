"""Image data sets as NumPy arrays: an embedded one, the classic ones, and any folder of images.

``fashion_mnist_mini`` ships with the package: 6,000 training and 1,000 test images of
Fashion-MNIST, the same number of each class. A folder, or a ``.tar`` (``.gz``, ``.xz``, ``.bz2``)
of one, holds its images as ``train/<class>/*`` and ``test/<class>/*``, or as ``<class>/*``, of
which every class then gives a fifth to the test set; files other than images, and hidden ones, are
ignored.

Example:
    >>> data = load("fashion_mnist_mini")
    >>> data.x_train.shape, data.x_test.shape
    ((6000, 28, 28, 1), (1000, 28, 28, 1))
    >>> data.class_names[int(data.y_train[0])]
    'Ankle boot'
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""(N, H, W, C) uint8."""
Labels = NDArray[np.int64]
"""(N,) int64, indices into the class names."""
Arrays = tuple[Images, Labels, Images, Labels]
"""Training images and labels, test images and labels."""

TEST_SHARE = 0.2
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")

_EMBEDDED = Path(__file__).parent / "data"
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


@dataclass(frozen=True)
class Dataset:
    """Labelled images, ready to train on.

    Attributes:
        name: What it was loaded from.
        class_names: One name for each label.
        x_train: Training images, (N, H, W, C) uint8.
        y_train: Their labels, (N,) int64.
        x_test: Test images, (M, H, W, C) uint8.
        y_test: Their labels, (M,) int64.
    """

    name: str
    class_names: tuple[str, ...]
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.x_train.shape[1:]


def load(
    source: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load a data set by name, or from a folder or tar file of images.

    Args:
        source: One of :func:`names`, or a path.
        image_size: Resize every image to this height and width (bilinear).
        train_images: Take only so many training images, the first of each class in turn.
        test_images: Take only so many test images, likewise.
        data_dir: Folder with the original files of ``fashion_mnist``, ``mnist``, ``cifar10`` or
            ``cifar100``; without it, Keras's downloader fetches them.

    Returns:
        The :class:`Dataset`; images from files have three channels.

    Raises:
        ValueError: The source is unknown, or its files are not as they should be.

    Example:
        >>> load("fashion_mnist_mini", image_size=32, train_images=50).x_train.shape
        (50, 32, 32, 1)
    """
    for option, value in (
        ("image_size", image_size),
        ("train_images", train_images),
        ("test_images", test_images),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    limits = (train_images, test_images)
    if isinstance(source, str) and source in _NAMED:
        class_names, read_arrays = _NAMED[source]
        arrays = read_arrays(source, None if data_dir is None else Path(data_dir))
        data = _limited(Dataset(source, tuple(class_names), *arrays), limits)
        return data if image_size is None else _resized(data, image_size)
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES)):
        return _load_image_files(path, image_size, limits)
    raise ValueError(
        f"unknown data set {str(source)!r}: known are {', '.join(names())}, "
        f"or a folder or {ARCHIVE_SUFFIXES[0]} file of images (none is at that path)"
    )


def names() -> tuple[str, ...]:
    """Names of the known data sets.

    Example:
        >>> names()
        ('fashion_mnist_mini', 'fashion_mnist', 'mnist', 'cifar10', 'cifar100')
    """
    return tuple(_NAMED)


def balanced_subset(labels: NDArray[np.integer[Any]], count: int) -> NDArray[np.intp]:
    """Indices of ``count`` samples, taken from the classes in turn, in their original order.

    Example:
        >>> balanced_subset(np.array([0, 0, 0, 1, 1, 2]), 5)
        array([0, 1, 3, 4, 5])

    Args:
        labels: (N,) integers.
        count: How many indices; N or more gives all.

    Returns:
        (min(count, N),) ascending indices.
    """
    by_class = np.argsort(labels, kind="stable")
    class_starts = np.searchsorted(labels[by_class], labels[by_class])
    rank_in_class = np.empty_like(by_class)
    rank_in_class[by_class] = np.arange(len(labels)) - class_starts
    return np.sort(np.lexsort((labels, rank_in_class))[:count])


def _limited(data: Dataset, limits: Sequence[int | None]) -> Dataset:
    if limits[0] is not None:
        train = balanced_subset(data.y_train, limits[0])
        data = replace(data, x_train=data.x_train[train], y_train=data.y_train[train])
    if limits[1] is not None:
        test = balanced_subset(data.y_test, limits[1])
        data = replace(data, x_test=data.x_test[test], y_test=data.y_test[test])
    return data


def _resized(data: Dataset, size: int) -> Dataset:
    if data.image_shape[:2] == (size, size):
        return data
    from PIL import Image

    def resize(images: Images) -> Images:
        out = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
        for image, target in zip(images, out, strict=True):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            resized = picture.resize((size, size), Image.Resampling.BILINEAR)
            target[:] = np.asarray(resized).reshape(target.shape)
        return out

    return replace(data, x_train=resize(data.x_train), x_test=resize(data.x_test))


# Known data sets: the original files, or Keras's downloader.


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
    with _open_files(archive if archive.is_file() else folder) as files:
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


_NAMED: dict[str, tuple[Sequence[str], Callable[[str, Path | None], Arrays]]] = {
    "fashion_mnist_mini": (_FASHION, _embedded),
    "fashion_mnist": (_FASHION, _mnist_like),
    "mnist": (_DIGITS, _mnist_like),
    "cifar10": (_CIFAR10, _cifar10),
    "cifar100": (_CIFAR100, _cifar100),
}


# Image files, in a folder or in a tar file of one.


class _Files(Protocol):
    """Files by their paths below a root ("train/cat/1.png")."""

    names: list[str]

    def read(self, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the wanted files, in the order that is quickest to read."""

    def __enter__(self) -> _Files: ...

    def __exit__(self, *error: object) -> None: ...


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = [
            (Path(folder) / name).relative_to(root).as_posix()
            for folder, _, files in os.walk(root)
            for name in files
        ]

    def read(self, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
        for name in sorted(wanted.intersection(self.names)):
            yield name, (self.root / name).read_bytes()

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Tar:
    """Reads from the archive itself: nothing is unpacked to the disk."""

    def __init__(self, path: Path) -> None:
        try:
            self.tar = tarfile.open(path)  # noqa: SIM115
            self.members = {member.name.removeprefix("./"): member for member in self.tar}
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{path} is not a readable tar file: {error}") from None
        for name, member in self.members.items():
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"{path} is refused: {name!r} points outside of it")
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{path} is refused: {name!r} is neither a file nor a folder")
        self.names = [name for name, member in self.members.items() if member.isfile()]

    def read(self, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
        for name in self.names:  # the archive's order: a compressed one cannot seek back cheaply
            if name in wanted and (file := self.tar.extractfile(self.members[name])):
                yield name, file.read()

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *error: object) -> None:
        self.tar.close()


def _open_files(path: Path) -> _Files:
    return _Folder(path) if path.is_dir() else _Tar(path)


def _load_image_files(path: Path, size: int | None, limits: Sequence[int | None]) -> Dataset:
    with _open_files(path) as files:
        train, test, class_names = _split_by_folders(path, files.names)
        index = {name: label for label, name in enumerate(class_names)}
        chosen: list[str] = []
        labels = []
        for part, limit in zip((train, test), limits, strict=True):
            part_labels = np.array([index[PurePosixPath(name).parent.name] for name in part])
            take = balanced_subset(part_labels, len(part) if limit is None else limit)
            chosen += [part[i] for i in take]
            labels.append(part_labels[take])
        images = _decode(path, files, chosen, size)
    cut = len(labels[0])
    arrays = images[:cut], labels[0], images[cut:], labels[1]
    return Dataset(str(path), tuple(class_names), *arrays)


def _split_by_folders(path: Path, files: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Training files, test files and class names, from the files' paths."""
    layouts = "train/<class>/ and test/<class>/, or <class>/"
    folders = {
        name: name.split("/")[:-1]
        for name in sorted(files)
        if name.lower().endswith(IMAGE_SUFFIXES) and "/." not in f"/{name}"
    }
    if not folders:
        raise ValueError(
            f"{path} has no images; expected {layouts} with {', '.join(IMAGE_SUFFIXES)} files"
        )
    # An archive of the folder "pets" has "pets/" before everything: look below it.
    parts = (["train"], ["test"])
    while min(map(len, folders.values())) > 1 and len({f[0] for f in folders.values()}) == 1:
        if next(iter(folders.values()))[:1] in parts:
            break
        folders = {name: folder[1:] for name, folder in folders.items()}
    # By itself "train" may also be a class, beside "bus" and "tram".
    depth = 2 if any(len(f) > 1 and f[:1] in parts for f in folders.values()) else 1
    by_class: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name, folder in folders.items():
        if len(folder) != depth or (depth == 2 and folder[:1] not in parts):
            raise ValueError(f"{path} is mixed up at {name}; expected {layouts}")
        part = folder[0] if depth == 2 else "train"
        by_class[part].setdefault(folder[-1], []).append(name)
    if depth == 1:
        by_class = _held_out(path, by_class["train"])
    train, test = by_class["train"], by_class["test"]
    if unmatched := sorted(train.keys() ^ test.keys()):
        raise ValueError(
            f"{path}: class {unmatched[0]!r} has images in only one of train/ and test/"
        )
    if len(train) < 2:
        raise ValueError(f"{path} has the one class {next(iter(train))!r}; expected two or more")
    flat = [list(itertools.chain(*part.values())) for part in (train, test)]
    return flat[0], flat[1], sorted(train)


def _held_out(path: Path, classes: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """A fifth of every class's images for testing: the same ones every time."""
    split: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, images in classes.items():
        if len(images) < 2:
            raise ValueError(f"{path}: class {label!r} has one image; a split needs two or more")
        held = max(1, round(TEST_SHARE * len(images)))
        order = np.random.default_rng(len(images)).permutation(len(images))
        split["test"][label] = [images[i] for i in np.sort(order[:held])]
        split["train"][label] = [images[i] for i in np.sort(order[held:])]
    return split


def _decode(path: Path, files: _Files, chosen: Sequence[str], size: int | None) -> Images:
    """The chosen images in their order, (N, H, W, 3)."""
    from PIL import Image

    def decode(name: str, data: bytes) -> NDArray[np.uint8]:
        try:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"{path}: {name} is not a readable image: {error}") from None
        if size is not None and picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture)

    def decode_some(items: list[tuple[str, bytes]]) -> list[tuple[str, NDArray[np.uint8]]]:
        return [(name, decode(name, data)) for name, data in items]

    position = {name: i for i, name in enumerate(chosen)}
    images: Images | None = None
    contents = files.read(set(chosen))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # 1,024 files at a time are in memory; 32 to a task, as small pictures take less time than
        # handing one to a thread does.
        while some := list(itertools.islice(contents, 1024)):
            tasks = [some[i : i + 32] for i in range(0, len(some), 32)]
            for name, pixels in itertools.chain.from_iterable(pool.map(decode_some, tasks)):
                if images is None:
                    images = np.empty((len(chosen), *pixels.shape), np.uint8)
                if pixels.shape != images.shape[1:]:
                    raise ValueError(
                        f"{path}: the images differ in size ({name} is {pixels.shape[:2]}, others "
                        f"{images.shape[1:3]}): give an image size to resize them to"
                    )
                images[position[name]] = pixels
    assert images is not None  # _split_by_folders found some
    return images
