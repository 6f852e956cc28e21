"""Images that stay where they are until they are wanted: in folders, tar files, Python's objects.

They stand for arrays of images, (N, H, W, C) of bytes, that would not fit into memory. What is kept
of each is where it lies: some 50 bytes.
"""

from __future__ import annotations

import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv.datasets.decode import decode, eight_bits, pillow, resize
from kconv.datasets.files import MAX_FILE_BYTES, Files, damage, open_files
from kconv.datasets.images import Images, Labels, is_image

__all__ = ["ObjectImages", "StreamedFiles", "StreamedImages", "open_shards", "shard_paths"]


class StreamedImages(ABC):
    """Images by number, decoded when they are read; workers of any kind may share it.

    Attributes:
        shape: (N, H, W, C), as an array's.
    """

    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """What they would take in memory."""
        return int(np.prod(self.shape, dtype=np.int64))

    @abstractmethod
    def pixels(self, number: int) -> Images:
        """One image, (H, W, C).

        Raises:
            ValueError: it cannot be read.
        """

    def read(self, index: NDArray[np.intp]) -> tuple[Images, dict[int, str]]:
        """Some images, and what is wrong with those that cannot be read.

        Args:
            index: (N,) which.

        Returns:
            (N, H, W, C), zeros for those that cannot be read; and their errors by their place.
        """
        images = np.zeros((len(index), *self.shape[1:]), np.uint8)
        failed: dict[int, str] = {}
        for place, number in enumerate(index):
            try:
                images[place] = self.pixels(int(number))
            except ValueError as error:
                failed[place] = str(error)
        return images, failed

    def __getitem__(self, index: Any) -> Images:
        """Some images; as an array, of one number it gives one image.

        Raises:
            ValueError: one cannot be read.
        """
        wanted = np.atleast_1d(np.arange(len(self))[index])
        images, failed = self.read(wanted)
        if failed:
            raise ValueError(next(iter(failed.values())))
        return images[0] if np.ndim(index) == 0 and not isinstance(index, slice) else images


class StreamedFiles(StreamedImages):
    """Image files of a folder or of tar files that are not compressed.

    Args:
        paths: the folder, or the tar files.
        names: (N,) of the files, as bytes: what the folder calls them, or errors.
        where: of tar files, (N, 3) which of them, and the first byte and the size in it.
        size: height and width to resize to.
        interpolation: how.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        names: NDArray[np.bytes_],
        where: NDArray[np.int64] | None,
        size: int,
        interpolation: str,
    ) -> None:
        self.paths, self.names, self.where = list(paths), names, where
        self.shape = (len(names), size, size, 3)
        self.interpolation = interpolation
        self._open: dict[int, int] = {}

    def pixels(self, number: int) -> Images:
        """One image, (H, W, C).

        Raises:
            ValueError: it cannot be read.
        """
        name = os.fsdecode(bytes(self.names[number]))
        path = self.paths[0 if self.where is None else int(self.where[number, 0])]
        with damage(f"{path}: {name} is not a readable image"):
            picture = decode(self._content(number, path, name))
            return np.asarray(resize(picture, self.shape[1], self.interpolation))

    def _content(self, number: int, path: Path, name: str) -> bytes:
        if self.where is None:
            file = path / name
            if file.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"it has {file.stat().st_size:,} bytes")
            return file.read_bytes()
        shard, start, size = map(int, self.where[number])
        if shard not in self._open:  # closed with the process
            self._open[shard] = os.open(path, os.O_RDONLY)
        # At its place without seeking, so that threads and forked processes may share the file.
        data = os.pread(self._open[shard], size, start)
        if len(data) != size:
            raise ValueError("the archive is cut short")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def stream_files(
    path: Path, files: Files, names: Sequence[str], size: int, interpolation: str
) -> StreamedFiles:
    """The images of some files of a folder or archive.

    Raises:
        ValueError: the archive cannot be read from any place.
    """
    where = None
    if not path.is_dir():
        where = np.empty((len(names), 3), np.int64)
        where[:, 0] = 0
        where[:, 1:] = np.array(files.extents(names), np.int64).reshape(-1, 2)
    return StreamedFiles([path], _as_bytes(names), where, size, interpolation)


def _as_bytes(names: Sequence[str]) -> NDArray[np.bytes_]:
    return np.array([os.fsencode(name) for name in names], np.bytes_)


# WebDataset's shards: tar files in which the files of a sample follow each other, of one name.


def shard_paths(pattern: str | os.PathLike[str]) -> list[Path]:
    """The paths that a pattern such as ``train-{000..012}.tar`` stands for.

    Example:
        >>> [str(path) for path in shard_paths("train-{08..10}.tar")]
        ['train-08.tar', 'train-09.tar', 'train-10.tar']

    Args:
        pattern: A path, with or without one range of numbers.

    Returns:
        The paths.
    """
    text = os.fspath(pattern)
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        return [Path(text)]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    start, end = text[: match.start()], text[match.end() :]
    return [Path(f"{start}{number:0{len(first)}}{end}") for number in numbers]


def open_shards(
    pattern: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    size: int,
    interpolation: str = "bilinear",
) -> tuple[StreamedFiles, Labels]:
    """The images and labels of WebDataset's shards: ``<key>.jpg`` or the like by ``<key>.cls``.

    Args:
        pattern: A path with or without a range, as for :func:`shard_paths`, or several.
        size: Height and width to resize images to.
        interpolation: How.

    Returns:
        The images, and their labels, (N,) int64.

    Raises:
        ValueError: A shard is missing, cannot be read, or has an image without a label, or two of
            one sample.
    """
    patterns = [pattern] if isinstance(pattern, str | os.PathLike) else list(pattern)
    paths = [path for one in patterns for path in shard_paths(one)]
    names: list[str] = []
    labels: list[int] = []
    where: list[NDArray[np.int64]] = []
    for number, path in enumerate(paths):
        if not path.is_file():
            raise ValueError(f"the shard {path} is missing, of {len(paths)} from {paths[0]} on")
        with open_files(path) as files:
            images = [name for name in files.names if is_image(name)]
            keys = {_key(name): name for name in files.names if name.lower().endswith(".cls")}
            samples: dict[str, str] = {}
            for name in images:
                if (other := samples.setdefault(_key(name), name)) != name:
                    raise ValueError(
                        f"{path}: {other} and {name} are of one sample, as they are named alike up "
                        "to the first dot; expected one image of each"
                    )
                if _key(name) not in keys:
                    raise ValueError(f"{path}: {name} has no .cls file beside it")
            extents = np.empty((len(images), 3), np.int64)
            extents[:, 0] = number
            extents[:, 1:] = np.array(files.extents(images), np.int64).reshape(-1, 2)
            found = dict(files.read(set(keys.values())))
            with damage(f"{path} has .cls files that are no numbers"):
                labels += [int(found[keys[_key(name)]]) for name in images]
        names += images
        where.append(extents)
    if not names:
        raise ValueError(f"{pattern} has no images")
    streamed = StreamedFiles(paths, _as_bytes(names), np.concatenate(where), size, interpolation)
    return streamed, np.array(labels, np.int64)


def _key(name: str) -> str:
    """A sample's name: up to the first dot of the file's."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


# Objects of other libraries


class ObjectImages(StreamedImages):
    """Images of an object with a length and items, as torchvision and Hugging Face have them.

    An item is an (image, label) or a dictionary with "image" (or "img", "jpg", "png") and "label"
    (or "labels", "fine_label", "cls"); an image is a picture of Pillow's, or an array (H, W) or
    (H, W, C) of bytes.

    Args:
        items: the object.
        size: height and width to resize to; None keeps that of the first image.
        interpolation: how.
        like: images whose size and channels these are to have.

    Raises:
        TypeError: it has no length or no items, or an item is none of these.
        ValueError: there are no items.
    """

    def __init__(
        self, items: Any, size: int | None, interpolation: str, like: ObjectImages | None = None
    ) -> None:
        if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
            raise TypeError(
                f"the data are a {type(items).__name__}, which has no items by number; expected "
                "a map-style data set of (image, label), or WebDataset's shards by their paths"
            )
        if not len(items):
            raise ValueError(f"the data, a {type(items).__name__}, have no items")
        self.items, self.interpolation = items, interpolation
        self.image_key, self.label_key, first = _first_readable(items)
        height, width = (size, size) if size else (first.height, first.width)
        channels = 1 if first.mode in ("L", "1") else 3
        if like is not None:
            height, width, channels = like.shape[1:]
        self.mode = "L" if channels == 1 else "RGB"
        self.shape = (len(items), height, width, channels)

    def pixels(self, number: int) -> Images:
        """One image, (H, W, C).

        Raises:
            ValueError: it cannot be read.
        """
        with damage(f"image {number:,} cannot be read"):
            picture = _picture(self.items[number][self.image_key])
            if self.mode == "L" and picture.mode not in ("L", "1", "LA", "La"):
                raise ValueError(
                    f"it has the mode {picture.mode!r}, where the first one is grey: convert all "
                    'to "RGB" or to "L"'
                )
            picture = picture.convert(self.mode)
            _, height, width, channels = self.shape
            if picture.size != (width, height):
                if height != width:
                    raise ValueError(
                        f"it is {picture.height}x{picture.width}, others {height}x{width}"
                    )
                picture = resize(picture, height, self.interpolation)
            return np.asarray(picture).reshape(height, width, channels)

    def labels(self) -> Labels:
        """(N,) int64: of a list that the object has, else of every item."""
        # As torchvision's have them: a transform of labels, or of images and labels together.
        own = {name: getattr(self.items, name, None) for name in _TRANSFORMS}
        changed = own["target_transform"] or (own["transforms"] and not own["transform"])
        for name in () if changed else ("targets", "labels", "_labels"):
            found = getattr(self.items, name, None)
            if found is not None and len(found) == len(self.items) and self._gives(found):
                return _whole_numbers(found)
        if isinstance(self.label_key, str):
            column = self.items[self.label_key] if hasattr(self.items, "features") else None
            if column is not None:
                return _whole_numbers(column)
        labels = np.empty(len(self.items), np.int64)
        for number in range(len(labels)):
            with damage(f"image {number:,} cannot be read, nor its label"):
                labels[number] = operator.index(self.items[number][self.label_key])
        return labels

    def _gives(self, own: Any) -> bool:
        """Whether the items' labels are those of a list, by some of them.

        They are others in a class that changes its parent's items, or where the list is of
        something else.
        """
        values = np.asarray(own)
        for number in np.unique(np.linspace(0, len(values) - 1, _COMPARED, dtype=np.intp)):
            try:
                label = self.items[int(number)][self.label_key]
            except OSError:  # of a damaged file
                continue
            if not np.array_equal(label, values[number]):
                return False
        return True

    def class_names(self) -> tuple[str, ...] | None:
        """Where the object knows them, or what it is a part of, as PyTorch's ``Subset``."""
        whole = self.items
        while not hasattr(whole, "classes") and hasattr(whole, "dataset"):
            whole = whole.dataset
        features = getattr(whole, "features", None)
        names = getattr(whole, "classes", None)
        if names is None and isinstance(features, Mapping):
            names = getattr(features.get(self.label_key), "names", None)
        return None if names is None else tuple(map(str, names))


_TRANSFORMS = ("target_transform", "transforms", "transform")
_COMPARED = 64
"""Labels in a list that are compared with their items', which takes a second of large images."""


def _whole_numbers(values: Any) -> Labels:
    """(N,) int64 of a column of labels."""
    labels = np.asarray(values)
    if labels.shape == (len(labels), 1):
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"the labels are {labels.dtype} of shape {labels.shape}, expected a whole number each"
        )
    return labels.astype(np.int64)


def _first_readable(items: Any) -> tuple[Any, Any, Any]:
    """The keys of images and labels, and the first image; damaged ones are told when read."""
    wrong: OSError | None = None
    for number in range(len(items)):
        try:
            item = items[number]
            image, label = _keys(item)
            return image, label, _picture(item[image])
        except OSError as error:  # of a damaged file, or none
            wrong = wrong or error
    raise ValueError(f"none of {len(items):,} images can be read, the first as {wrong}")


def _keys(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image = next((key for key in ("image", "img", "jpg", "png") if key in item), None)
        known = ("label", "labels", "fine_label", "cls")
        label = next((key for key in known if key in item), None)
        if image is not None and label is not None:
            return image, label
    elif isinstance(item, Sequence) and len(item) == 2:
        return 0, 1
    raise TypeError(
        f"an item of the data is a {type(item).__name__}, expected (image, label) or a dictionary "
        "with 'image' and 'label'"
    )


_CHANNELS = ((1,), (3,), (4,))


def _picture(image: Any) -> Any:
    library = pillow()
    if isinstance(image, library.Image):
        return eight_bits(image)
    pixels = np.asarray(image)
    if pixels.dtype == object:
        raise ValueError(
            f"an image is a {type(image).__name__}, expected a picture of Pillow's or bytes"
        )
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[2:] in _CHANNELS):
        raise ValueError(
            f"an image is {pixels.dtype} of shape {pixels.shape}, expected a picture of Pillow's "
            "or bytes (H, W) or (H, W, C)"
        )
    return library.fromarray(pixels.squeeze(-1) if pixels.shape[2:] == (1,) else pixels)
