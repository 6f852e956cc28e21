"""Image data sets as NumPy arrays: an embedded one, known ones, and any folder of images.

``fashion_mnist_mini`` ships with the package: 6,000 training and 1,000 test images of
Fashion-MNIST, the same number of each class. ``fashion_mnist``, ``mnist``, ``cifar10`` and
``cifar100`` come from their original files or from Keras's downloader. The papers' photographs come
from what their authors publish: ``oxford_iiit_pet`` and ``cropped_plantdoc`` with the authors'
split, ``colorectal_histology`` (Kather 2016, 5,000 tiles) and ``malaria`` (NIH, 27,558 cells) with
a fifth of each class for testing.

A folder, or a ``.zip`` or ``.tar`` (``.gz``, ``.xz``, ``.bz2``, ``.zst``) of one, holds its images
as ``train/<class>/*`` beside ``test/<class>/*`` or ``val/<class>/*`` (or ``valid/``, or
``validation/``) or both, or as ``<class>/*``, of which every class then gives a fifth to the test
set. Images may lie in folders below that of their class. Hidden files and files of other kinds are
ignored, but a class that has nothing else is an error, and so are kinds of images that are not
read. How images become pixels is told in :mod:`kconv.datasets.decode`.

Example:
    >>> data = load("fashion_mnist_mini")
    >>> data.x_train.shape, data.x_test.shape
    ((6000, 28, 28, 1), (1000, 28, 28, 1))
    >>> data.class_names[int(data.y_train[0])]
    'Ankle boot'
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kconv._names import did_you_mean
from kconv.datasets.classic import CLASSIC
from kconv.datasets.decode import IMAGE_SUFFIXES, INTERPOLATIONS, pillow, resize
from kconv.datasets.files import Files, is_archive, open_files
from kconv.datasets.formats import read_idx
from kconv.datasets.images import (
    PARTS,
    Arrays,
    Images,
    Labels,
    Limits,
    Listing,
    Part,
    Progress,
    balanced_subset,
    check_memory,
    chosen_files,
    list_folders,
    memory,
    read_images,
)
from kconv.datasets.papers import IMAGE_SIZE, PAPERS, find_images
from kconv.datasets.streams import ObjectImages, StreamedImages, open_shards, stream_files

__all__ = [
    "IMAGE_SUFFIXES",
    "INTERPOLATIONS",
    "PHOTOGRAPHS",
    "Dataset",
    "Images",
    "Labels",
    "StreamedImages",
    "balanced_subset",
    "from_objects",
    "load",
    "load_shards",
    "memory",
    "names",
    "read_idx",
]


PHOTOGRAPHS = tuple(PAPERS)
"""Names of the known data sets of large images, which the papers resize to 224."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images, ready to train on.

    Images are arrays in memory, or streamed: of the same shape and read by the same indices, but
    decoded each time.

    Attributes:
        name: What it was loaded from.
        class_names: One name for each label.
        x_train: Training images, (N, H, W, C) uint8.
        y_train: Their labels, (N,) int64.
        x_test: Test images, (M, H, W, C) uint8.
        y_test: Their labels, (M,) int64.
        x_val: Images for validation, (V, H, W, C) uint8; None if the data set has none of its own.
            Where it has none for testing, ``x_test`` is this array.
        y_val: Their labels, (V,) int64, or None.
    """

    name: str
    class_names: tuple[str, ...]
    x_train: Images | StreamedImages
    y_train: Labels
    x_test: Images | StreamedImages
    y_test: Labels
    x_val: Images | StreamedImages | None = None
    y_val: Labels | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        _, height, width, channels = self.x_train.shape
        return height, width, channels


def load(
    source: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    interpolation: str = "bilinear",
    train_images: int | None = None,
    test_images: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    stream: bool | None = False,
    unread: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set by name, or from a folder or archive of images.

    Args:
        source: One of :func:`names`, or a path.
        image_size: Resize every image to this height and width, whatever its proportions. By
            default the papers' photographs are resized to 224, and others are not.
        interpolation: One of ``INTERPOLATIONS``; "nearest" repeats the pixels of small images, as
            the papers do with those of CIFAR at 224.
        train_images: How many training images to take, the first of each class in turn.
        test_images: How many test images to take, likewise, and for validation.
        data_dir: Folder with the known data set's original files or archives, or one of these
            itself. Without it, ``fashion_mnist``, ``mnist``, ``cifar10`` and ``cifar100`` are taken
            from Keras's cache, or Keras downloads them.
        stream: Whether images stay in their files until they are read; None if all of them would
            take more than a quarter of the memory, and the files allow it.
        unread: Takes what is wrong with files that cannot be decoded, by their names, which are
            then left out; without it the first one is an error.
        progress: Makes a progress bar of that many images, as tqdm does.

    Returns:
        The :class:`Dataset`; images from files have three channels.

    Raises:
        ValueError: The source is unknown, its files are not as they should be, or the images would
            not fit into memory.
        ImportError: A package that the files need is not installed.

    Example:
        >>> load("fashion_mnist_mini", image_size=32, train_images=50).x_train.shape
        (50, 32, 32, 1)
    """
    for option, value in (("train_images", train_images), ("test_images", test_images)):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    _check_resizing(image_size, interpolation)
    limits = (train_images, test_images)
    folder = None if data_dir is None else Path(data_dir)
    path = Path(source)
    known = isinstance(source, str) and source in names()
    if data_dir is not None and (not known or source == "fashion_mnist_mini"):
        whose = "comes with the package" if known else "is not a known data set's name"
        raise ValueError(f"data_dir={os.fspath(data_dir)!r} has no use, as {str(source)!r} {whose}")
    if isinstance(source, str) and source in CLASSIC:
        if stream:
            raise ValueError(f"stream=True: {source} comes as arrays, not as image files")
        class_names, read_arrays = CLASSIC[source]
        arrays = read_arrays(source, folder)
        _check_classic(source, arrays, len(class_names))
        arrays = _resized(source, _limited(arrays, limits), image_size, interpolation)
        return _dataset(source, class_names, arrays)
    paper = PAPERS.get(source) if isinstance(source, str) else None
    if paper is not None:
        path = find_images(str(source), folder)
        image_size = image_size or IMAGE_SIZE
    elif not (os.fspath(source) and path.is_dir()) and not (
        path.is_file() and is_archive(path.name)
    ):
        there = "what is at that path is neither" if path.exists() else "none is at that path"
        raise ValueError(
            f"unknown data set {str(source)!r}{did_you_mean(source, names())}: known are "
            f"{', '.join(names())}, or a folder, .tar "
            f"or .zip file of images ({there})"
        )
    with open_files(path) as files:
        if paper is not None:
            listing = paper.listing(path, files.names)
        else:
            listing = list_folders(path, files.names, files.folders)
        if stream is not False:
            streamed = _streamed(
                str(source), path, files, listing, image_size, interpolation, limits
            )
            if isinstance(streamed, Dataset) and (stream or _is_large(streamed)):
                return streamed
            if isinstance(streamed, ValueError) and stream:
                raise streamed
        arrays = read_images(
            path,
            files,
            listing,
            size=image_size,
            interpolation=interpolation,
            limits=limits,
            unread=unread,
            progress=progress,
        )
    return _dataset(str(source), listing.class_names, arrays)


def _check_resizing(image_size: int | None, interpolation: str) -> None:
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}: known are {', '.join(INTERPOLATIONS)}"
        )


def _streamed(
    name: str,
    path: Path,
    files: Files,
    listing: Listing,
    size: int | None,
    interpolation: str,
    limits: Limits,
) -> Dataset | ValueError:
    """The data set with its images where they are, or why that cannot be."""
    if size is None:
        return ValueError("stream=True needs an image_size, as nothing is read before it is wanted")
    try:
        train, test, val = (
            (stream_files(path, files, part, size, interpolation), labels)
            for part, labels in chosen_files(listing, limits)
        )
    except ValueError as error:
        return error
    if listing.val is None:
        return Dataset(name, listing.class_names, *train, *test)
    return Dataset(
        name, listing.class_names, *train, *test, *(test if listing.val is listing.test else val)
    )


def _is_large(data: Dataset) -> bool:
    val = 0 if data.x_val is None or data.x_val is data.x_test else data.x_val.nbytes
    return 4 * (data.x_train.nbytes + data.x_test.nbytes + val) > memory()


def load_shards(
    train: Shards,
    test: Shards,
    val: Shards | None = None,
    *,
    image_size: int,
    interpolation: str = "bilinear",
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Stream WebDataset's shards: tar files of ``<key>.jpg`` (or another image) and ``<key>.cls``.

    Example:
        >>> data = load_shards(
        ...     "train-{000..146}.tar", "val-{00..06}.tar", image_size=224
        ... )  # doctest: +SKIP

    Args:
        train: The training images' files: a path, with or without a range of numbers as above, or a
            list of paths.
        test: Likewise those for testing.
        val: Likewise those for validation; None leaves it to the training to hold some out.
        image_size: Resize every image to this height and width.
        interpolation: One of ``INTERPOLATIONS``.
        class_names: One name for each label; by default the labels themselves.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: A file is missing or damaged, or a label has no name.
    """
    _check_resizing(image_size, interpolation)
    parts = [open_shards(part, image_size, interpolation) for part in (train, test)]
    parts += [open_shards(val, image_size, interpolation)] if val is not None else []
    return _named("shards", class_names, parts)


Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def from_objects(
    parts: Mapping[str, Any],
    *,
    image_size: int | None = None,
    interpolation: str = "bilinear",
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Stream other libraries' data sets, such as torchvision's and Hugging Face's.

    Example:
        >>> pairs = [(np.full((8, 8), n, np.uint8), n % 2) for n in range(6)]
        >>> data = from_objects({"train": pairs, "test": pairs[:2]})
        >>> data.x_train.shape, data.y_train[:3], data.class_names
        ((6, 8, 8, 1), array([0, 1, 0]), ('0', '1'))

    Args:
        parts: "train" with "test" or "validation" or both, each with a length and items, which are
            (image, label) or dictionaries with "image" and "label". ``datasets.load_dataset(...)``
            is such a mapping.
        image_size: Resize every image to this height and width; None keeps those of the first one
            for training, whose being grey or not decides it for all, too.
        interpolation: One of ``INTERPOLATIONS``.
        class_names: One name for each label; by default the object's own, or the labels.

    Returns:
        The :class:`Dataset`.

    Raises:
        TypeError: The parts are no mapping, or one is no such object.
        ValueError: A part is missing or empty, or a label has no name.
    """
    _check_resizing(image_size, interpolation)
    if not isinstance(parts, Mapping):
        raise TypeError(
            f"the data are a {type(parts).__name__}, expected a mapping with 'train' and 'test'"
        )
    found: dict[str, tuple[ObjectImages, Labels]] = {}
    known: tuple[str, ...] | None = None
    like = None
    for name, items in sorted(parts.items(), key=lambda part: part[0] != "train"):
        if name not in PARTS:
            raise ValueError(f"the data have a part {name!r}; known are {', '.join(PARTS)}")
        if PARTS[name] in found:
            raise ValueError(f"the data have the parts {', '.join(parts)}, of which two are one")
        images = ObjectImages(items, image_size, interpolation, like)
        like = like or images
        found[PARTS[name]] = images, images.labels()
        if class_names is None and (theirs := images.class_names()) is not None:
            known = known or theirs
            if theirs != known:
                odd = sorted({*theirs} ^ {*known}) or theirs
                raise ValueError(
                    f"the part {name!r} has other classes than those before, or in another order: "
                    f"{', '.join(odd[:5])} ..."
                )
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"the data have the parts {', '.join(parts) or 'none'}; expected 'train' with 'test' "
            "or 'validation'"
        )
    val = found.get("val")
    test = found.get("test", val)
    return _named(
        "objects", class_names or known, [part for part in (found["train"], test, val) if part]
    )


def _named(
    name: str, class_names: Sequence[str] | None, parts: Sequence[tuple[StreamedImages, Labels]]
) -> Dataset:
    """A data set of parts whose labels are numbers."""
    most = max(int(labels.max()) for _, labels in parts)
    if class_names is None:
        class_names = [str(label) for label in range(most + 1)]
    least = min(int(labels.min()) for _, labels in parts)
    if most >= len(class_names) or least < 0:
        raise ValueError(
            f"the labels go from {least} to {most}, and there are {len(class_names)} class names"
        )
    arrays = [value for part in parts for value in part]
    return Dataset(name, tuple(class_names), *arrays)  # type: ignore[arg-type]


def names() -> tuple[str, ...]:
    """Names of the known data sets.

    Example:
        >>> names()[:5]
        ('fashion_mnist_mini', 'fashion_mnist', 'mnist', 'cifar10', 'cifar100')
        >>> names()[5:]
        ('oxford_iiit_pet', 'cropped_plantdoc', 'colorectal_histology', 'malaria')
    """
    return *CLASSIC, *PAPERS


def _dataset(name: str, class_names: Sequence[str], arrays: Arrays) -> Dataset:
    val = arrays.val or (None, None)
    return Dataset(name, tuple(class_names), *arrays.train, *arrays.test, *val)


def _check_classic(name: str, arrays: Arrays, classes: int) -> None:
    train, test = arrays.train, arrays.test
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{name}: the training images are {train.images.shape[1:]}, those for testing "
            f"{test.images.shape[1:]}"
        )
    for _, labels in (train, test):
        if not (labels.min() >= 0 and labels.max() < classes):
            raise ValueError(
                f"{name}: the labels go from {labels.min()} to {labels.max()}; "
                f"expected 0 to {classes - 1}"
            )


def _limited(arrays: Arrays, limits: Limits) -> Arrays:
    parts = []
    for part, limit in zip((arrays.train, arrays.test), limits, strict=True):
        if limit is not None:
            take = balanced_subset(part.labels, limit)
            part = Part(part.images[take], part.labels[take])
        parts.append(part)
    return Arrays(*parts)


def _resized(name: str, arrays: Arrays, size: int | None, interpolation: str) -> Arrays:
    if size is None or arrays.train.images.shape[1:3] == (size, size):
        return arrays
    library = pillow()
    count = len(arrays.train.images) + len(arrays.test.images)
    check_memory(name, count, (size, size, arrays.train.images.shape[-1]))

    def resized(images: Images) -> Images:
        out = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
        for image, target in zip(images, out, strict=True):
            picture = library.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            target[:] = np.asarray(resize(picture, size, interpolation)).reshape(target.shape)
        return out

    train, test = (Part(resized(part.images), part.labels) for part in arrays[:2] if part)
    return Arrays(train, test)
