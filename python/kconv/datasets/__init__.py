"""Image data sets as NumPy arrays: an embedded one, known ones, and any folder of images.

``fashion_mnist_mini`` ships with the package: 6,000 training and 1,000 test images of
Fashion-MNIST, the same number of each class. ``fashion_mnist``, ``mnist``, ``cifar10`` and
``cifar100`` come from their original files or from Keras's downloader. The papers' photographs come
from what their authors publish: ``oxford_iiit_pet`` and ``cropped_plantdoc`` with the authors'
split, ``colorectal_histology`` (Kather 2016, 5,000 tiles) and ``malaria`` (NIH, 27,558 cells) with
a fifth of each class for testing.

A folder, or a ``.zip`` or ``.tar`` (``.gz``, ``.xz``, ``.bz2``) of one, holds its images as
``train/<class>/*`` and ``test/<class>/*``, or as ``<class>/*``, of which every class then gives a
fifth to the test set; files other than images, and hidden ones, are ignored.

Example:
    >>> data = load("fashion_mnist_mini")
    >>> data.x_train.shape, data.x_test.shape
    ((6000, 28, 28, 1), (1000, 28, 28, 1))
    >>> data.class_names[int(data.y_train[0])]
    'Ankle boot'
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kconv.datasets.classic import CLASSIC, read_idx
from kconv.datasets.images import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    INTERPOLATIONS,
    Images,
    Labels,
    Limits,
    Listing,
    balanced_subset,
    list_folders,
    open_files,
    read_images,
    resize,
)
from kconv.datasets.papers import IMAGE_SIZE, PAPERS, find_images

__all__ = [
    "IMAGE_SUFFIXES",
    "INTERPOLATIONS",
    "PHOTOGRAPHS",
    "Dataset",
    "Images",
    "Labels",
    "balanced_subset",
    "load",
    "names",
    "read_idx",
]


PHOTOGRAPHS = tuple(PAPERS)
"""Names of the known data sets of large images, which the papers resize to 224."""


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
    interpolation: str = "bilinear",
    train_images: int | None = None,
    test_images: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load a data set by name, or from a folder or archive of images.

    Args:
        source: One of :func:`names`, or a path.
        image_size: Resize every image to this height and width, whatever its proportions. By
            default the papers' photographs are resized to 224, and others are not.
        interpolation: One of ``INTERPOLATIONS``; "nearest" repeats the pixels of small images, as
            the papers do with those of CIFAR at 224.
        train_images: Take only so many training images, the first of each class in turn.
        test_images: Take only so many test images, likewise.
        data_dir: Folder with the known data set's original files or archives. Without it, Keras
            downloads ``fashion_mnist``, ``mnist``, ``cifar10`` and ``cifar100``.

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
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}: known are {', '.join(INTERPOLATIONS)}"
        )
    limits = (train_images, test_images)
    folder = None if data_dir is None else Path(data_dir)
    path = Path(source)
    list_files: Callable[[Path, list[str]], Listing] = list_folders
    if isinstance(source, str) and source in CLASSIC:
        class_names, read_arrays = CLASSIC[source]
        data = Dataset(source, tuple(class_names), *read_arrays(source, folder))
        return _resized(_limited(data, limits), image_size, interpolation)
    if isinstance(source, str) and source in PAPERS:
        path, list_files = find_images(source, folder), PAPERS[source].listing
        image_size = image_size or IMAGE_SIZE
    elif not path.is_dir() and not (path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES)):
        raise ValueError(
            f"unknown data set {str(source)!r}: known are {', '.join(names())}, or a folder, .tar "
            "or .zip file of images (none is at that path)"
        )
    with open_files(path) as files:
        listing = list_files(path, files.names)
        arrays = read_images(
            path, files, listing, size=image_size, interpolation=interpolation, limits=limits
        )
    return Dataset(str(source), listing.class_names, *arrays)


def names() -> tuple[str, ...]:
    """Names of the known data sets.

    Example:
        >>> names()[:5]
        ('fashion_mnist_mini', 'fashion_mnist', 'mnist', 'cifar10', 'cifar100')
        >>> names()[5:]
        ('oxford_iiit_pet', 'cropped_plantdoc', 'colorectal_histology', 'malaria')
    """
    return *CLASSIC, *PAPERS


def _limited(data: Dataset, limits: Limits) -> Dataset:
    if limits[0] is not None:
        train = balanced_subset(data.y_train, limits[0])
        data = replace(data, x_train=data.x_train[train], y_train=data.y_train[train])
    if limits[1] is not None:
        test = balanced_subset(data.y_test, limits[1])
        data = replace(data, x_test=data.x_test[test], y_test=data.y_test[test])
    return data


def _resized(data: Dataset, size: int | None, interpolation: str) -> Dataset:
    if size is None or data.image_shape[:2] == (size, size):
        return data
    from PIL import Image

    def resized(images: Images) -> Images:
        out = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
        for image, target in zip(images, out, strict=True):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            target[:] = np.asarray(resize(picture, size, interpolation)).reshape(target.shape)
        return out

    return replace(data, x_train=resized(data.x_train), x_test=resized(data.x_test))
