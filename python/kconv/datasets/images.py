"""Image files, in a folder or in an archive of one, and which of them make a data set."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Images = NDArray[np.uint8]
"""(N, H, W, C) uint8."""
Labels = NDArray[np.int64]
"""(N,) int64, indices into the class names."""
Arrays = tuple[Images, Labels, Images, Labels]
"""Training images and labels, test images and labels."""
Limits = tuple[int | None, int | None]
"""How many training and test images to take at most; None takes all."""

TEST_SHARE = 0.2
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
INTERPOLATIONS = ("bilinear", "nearest")


class Files(Protocol):
    """Files by their paths below a root ("train/cat/1.png")."""

    names: list[str]

    def read(self, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the wanted files, in the order that is quickest to read."""

    def __enter__(self) -> Files: ...

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
            _check_inside(path, name)
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


class _Zip:
    """Likewise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} is not a readable zip file: {error}") from None
        self.names = [name for name in self.zip.namelist() if not name.endswith("/")]
        for name in self.names:
            _check_inside(path, name)

    def read(self, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
        for name in self.names:
            if name in wanted:
                try:
                    yield name, self.zip.read(name)
                # The second is for encrypted files, and for unknown compression.
                except (zipfile.BadZipFile, RuntimeError, zlib.error) as error:
                    raise ValueError(f"{self.path}: {name} cannot be read: {error}") from None

    def __enter__(self) -> _Zip:
        return self

    def __exit__(self, *error: object) -> None:
        self.zip.close()


def _check_inside(archive: Path, name: str) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{archive} is refused: {name!r} points outside of it")


def open_files(path: Path) -> Files:
    """The files of a folder or an archive.

    Args:
        path: A folder, or a file whose name ends in one of ``ARCHIVE_SUFFIXES``.

    Returns:
        The :class:`Files`, to be used in a ``with`` statement.

    Raises:
        ValueError: The archive cannot be read, or has files that point outside of it.
    """
    if path.is_dir():
        return _Folder(path)
    return _Zip(path) if path.suffix == ".zip" else _Tar(path)


def is_image(name: str) -> bool:
    """Whether a path is that of an image file, and nothing in it is hidden.

    Example:
        >>> is_image("cat/1.JPG"), is_image("cat/._1.jpg"), is_image("cat/Thumbs.db")
        (True, False, False)
    """
    return name.lower().endswith(IMAGE_SUFFIXES) and "/." not in f"/{name}"


# Which files make a data set


@dataclass(frozen=True)
class Listing:
    """The image files of a data set, before they are read.

    Attributes:
        class_names: One name for each label.
        train: The label of each training image, by its file's path.
        test: Likewise for the test images.
    """

    class_names: tuple[str, ...]
    train: Mapping[str, int]
    test: Mapping[str, int]


FilesByClass = Mapping[str, Sequence[str]]


def listing_of(train: FilesByClass, test: FilesByClass, class_names: Sequence[str]) -> Listing:
    """The listing that follows from the files of each class."""
    parts = (
        {name: label for label, c in enumerate(class_names) for name in part.get(c, ())}
        for part in (train, test)
    )
    return Listing(tuple(class_names), *parts)


def list_folders(path: Path, names: Sequence[str]) -> Listing:
    """The data set in ``train/<class>/`` and ``test/<class>/``, or in ``<class>/``.

    Args:
        path: The folder or archive, for errors.
        names: Its files' paths.

    Returns:
        The :class:`Listing`, its classes in alphabetical order.

    Raises:
        ValueError: The files are in other folders than these.
    """
    layouts = "train/<class>/ and test/<class>/, or <class>/"
    folders = {name: name.split("/")[:-1] for name in sorted(filter(is_image, names))}
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
    train, test = by_class["train"], by_class["test"]
    if depth == 1:
        train, test = hold_out(path, train)
    if unmatched := sorted(train.keys() ^ test.keys()):
        raise ValueError(
            f"{path}: class {unmatched[0]!r} has images in only one of train/ and test/"
        )
    if len(train) < 2:
        raise ValueError(f"{path} has the one class {next(iter(train))!r}; expected two or more")
    return listing_of(train, test, sorted(train))


def hold_out(
    path: Path, classes: FilesByClass
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Take a fifth of every class's images for testing: the same ones every time.

    Args:
        path: The folder or archive, for errors.
        classes: Each class's files.

    Returns:
        The files to train with and those to test with, both by class.

    Raises:
        ValueError: A class has but one image.
    """
    train, test = {}, {}
    for label, images in classes.items():
        if len(images) < 2:
            count = "one image" if images else "no images"
            raise ValueError(f"{path}: class {label!r} has {count}; a split needs two or more")
        held = max(1, round(TEST_SHARE * len(images)))
        order = np.random.default_rng(len(images)).permutation(len(images))
        test[label] = [images[i] for i in np.sort(order[:held])]
        train[label] = [images[i] for i in np.sort(order[held:])]
    return train, test


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


# Reading them


def read_images(
    path: Path,
    files: Files,
    listing: Listing,
    *,
    size: int | None,
    interpolation: str,
    limits: Limits,
) -> Arrays:
    """Read a data set's images, in the order of the listing.

    Args:
        path: The folder or archive, for errors.
        files: What is in it.
        listing: Which of them to read, and their labels.
        size: Height and width to resize to; None keeps theirs, which must be all the same.
        interpolation: One of ``INTERPOLATIONS``.
        limits: How many to take, as many of each class.

    Returns:
        Images (N, H, W, 3) and labels to train with, and to test with.

    Raises:
        ValueError: A file is not an image, or the images differ in size.
    """
    chosen: list[str] = []
    labels: list[Labels] = []
    for part, limit in zip((listing.train, listing.test), limits, strict=True):
        part_labels = np.fromiter(part.values(), np.int64, len(part))
        take = balanced_subset(part_labels, len(part) if limit is None else limit)
        part_names = list(part)
        chosen += [part_names[i] for i in take]
        labels.append(part_labels[take])
    images = _decode(path, files, chosen, size, interpolation)
    cut = len(labels[0])
    return images[:cut], labels[0], images[cut:], labels[1]


def resize(picture: Image.Image, size: int, interpolation: str) -> Image.Image:
    """A picture of this height and width, whatever its proportions were."""
    from PIL import Image

    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling[interpolation.upper()])


def _decode(
    path: Path, files: Files, chosen: Sequence[str], size: int | None, interpolation: str
) -> Images:
    """The chosen images in their order, (N, H, W, 3)."""
    from PIL import Image

    def decode(name: str, data: bytes) -> NDArray[np.uint8]:
        try:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"{path}: {name} is not a readable image: {error}") from None
        return np.asarray(picture if size is None else resize(picture, size, interpolation))

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
    assert images is not None  # a listing has some
    return images
