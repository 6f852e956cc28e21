"""Which image files of a folder or archive make a data set, and their pixels."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kconv._kconv import available_cpus
from kconv.datasets.decode import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    decode,
    pillow,
    resize,
)
from kconv.datasets.files import Files, damage

Images = NDArray[np.uint8]
"""(N, H, W, C) uint8."""
Labels = NDArray[np.int64]
"""(N,) int64, indices into the class names."""
Progress = Callable[[int], Any]
"""From how many images there are to a context whose value has ``update(count)``."""
Limits = tuple[int | None, int | None]
"""How many training and test images to take at most; None takes all."""

TEST_SHARE = 0.2
PARTS = {
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
"""The folders of a data set that is split already, and what they are for."""
_FILES_AT_ONCE, _BYTES_AT_ONCE = 1024, 2**26


class Part(NamedTuple):
    """Images and their labels."""

    images: Images
    labels: Labels


class Arrays(NamedTuple):
    """A data set's parts; without images of its own for validation, the last is None."""

    train: Part
    test: Part
    val: Part | None = None


def is_image(name: str) -> bool:
    """Whether a path is that of an image file, and nothing in it is hidden.

    Example:
        >>> is_image("cat/1.JPG"), is_image("cat/._1.jpg"), is_image("cat/Thumbs.db")
        (True, False, False)
    """
    return name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """Also what macOS adds to zip files."""
    return "/." in f"/{name}" or name.startswith("__MACOSX/")


# Which files make a data set


@dataclass(frozen=True)
class Listing:
    """The image files of a data set, before they are read.

    Attributes:
        class_names: One name for each label.
        train: The label of each training image, by its file's path.
        test: Likewise for the test images.
        val: Likewise for the validation images; None leaves it to the training to hold some out.
    """

    class_names: tuple[str, ...]
    train: Mapping[str, int]
    test: Mapping[str, int]
    val: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        """See that the names can be written into reports.

        Raises:
            ValueError: One cannot.
        """
        for name in self.class_names:
            # Surrogates, which stand for bytes that are no text, and all that moves the cursor.
            if any(unicodedata.category(letter) in ("Cs", "Cc", "Zl", "Zp") for letter in name):
                raise ValueError(f"the class name {name!r} cannot be printed: rename its folder")


FilesByClass = Mapping[str, Sequence[str]]


def listing_of(
    train: FilesByClass,
    test: FilesByClass,
    class_names: Sequence[str],
    val: FilesByClass | None = None,
) -> Listing:
    """The listing that follows from the files of each class."""

    def labelled(part: FilesByClass) -> dict[str, int]:
        return {name: label for label, c in enumerate(class_names) for name in part.get(c, ())}

    tested = labelled(test)
    validated = tested if val is test else None if val is None else labelled(val)
    return Listing(tuple(class_names), labelled(train), tested, validated)


def list_folders(path: Path, names: Sequence[str], folders: Sequence[str] = ()) -> Listing:
    """The data set in ``train/<class>/`` and other parts, or in ``<class>/``.

    Args:
        path: The folder or archive, for errors.
        names: Its files' paths.
        folders: Its folders' paths, so that those of classes without any file are seen.

    Returns:
        The :class:`Listing`, its classes in alphabetical order. Images may lie in folders below
        that of their class. Where there is no ``test/``, the validation images are for testing
        too.

    Raises:
        ValueError: The files are in other folders than these, or a class has no images, or has
            images of kinds that are not read.
    """
    layouts = "train/<class>/ with test/<class>/ or val/<class>/ or both, or <class>/"
    images = sorted(filter(is_image, names))
    if not images:
        raise ValueError(
            f"{path} has no images; expected {layouts} with {', '.join(IMAGE_SUFFIXES)} files"
        )
    # An archive of the folder "pets" has "pets/" before everything: look below it.
    start = ""
    while True:
        below = [name.removeprefix(start).split("/") for name in images]
        top = below[0][0]
        if top in PARTS or any(len(found) < 3 or found[0] != top for found in below):
            break
        start += f"{top}/"

    tops = {found[0] for found in below if len(found) > 1}
    parts = tops & PARTS.keys()
    # By itself "train" may also be a class, beside "bus" and "tram".
    split = ("train" in parts and len(parts) > 1) or parts == tops
    files: dict[str, dict[str, list[str]]] = {}
    for name, found in zip(images, below, strict=True):
        part, *rest = found if split else ["", *found]
        if len(rest) < 2 or (split and part not in parts):
            raise ValueError(f"{path} is mixed up at {name}; expected {layouts}")
        files.setdefault(part, {}).setdefault(rest[0], []).append(name)
    _check_all_read(path, start, files, names, folders)
    if not split:
        train, test = hold_out(path, files[""])
        return listing_of(train, test, _two_or_more(path, train))

    by_use: dict[str, dict[str, list[str]]] = {}
    for part, classes in files.items():
        if PARTS[part] in by_use:
            raise ValueError(f"{path} has several folders for validation, {part}/ among them")
        by_use[PARTS[part]] = classes
    train = by_use.get("train", {})
    for part in sorted(files.keys() - {"train"}) or ["test"]:
        if unmatched := sorted(train.keys() ^ files.get(part, {}).keys()):
            raise ValueError(
                f"{path}: class {unmatched[0]!r} has images in only one of train/ and {part}/"
            )
    val = by_use.get("val")
    return listing_of(train, by_use.get("test", val or {}), _two_or_more(path, train), val)


def _two_or_more(path: Path, classes: FilesByClass) -> list[str]:
    names = sorted(classes)
    if len(names) < 2:
        raise ValueError(f"{path} has the one class {names[0]!r}; expected two or more")
    return names


def _check_all_read(
    path: Path,
    start: str,
    files: Mapping[str, FilesByClass],
    names: Sequence[str],
    folders: Sequence[str],
) -> None:
    """See that no class is left out, or a part of one, as its files are of other kinds."""
    depth = 1 if "" in files else 2
    left_out: dict[tuple[str, str], Counter[str]] = {}
    for name in chain(names, (f"{folder}/" for folder in folders)):
        if not name.startswith(start) or _is_hidden(name) or is_image(name):
            continue
        found = name.removeprefix(start).split("/")
        part = found[0] if depth == 2 else ""
        if len(found) > depth and part in (files if depth == 1 else PARTS):
            kinds = left_out.setdefault((part, found[depth - 1]), Counter())
            if found[-1]:
                kinds[PurePosixPath(name).suffix.lower() or "no suffix"] += 1
    for (part, label), kinds in sorted(left_out.items()):
        where = f" in {part}/" if part else ""
        if label not in files.get(part, {}):
            what = f"no images{where}, but {kinds.total()} other files"
        elif others := Counter({k: n for k, n in kinds.items() if k in OTHER_IMAGE_SUFFIXES}):
            what = f"images of unread kinds{where}, {others.total()} files"
            kinds = others
        else:
            continue
        listed = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise ValueError(
            f"{path}: class {label!r} has {what}{listed}; expected {', '.join(IMAGE_SUFFIXES)}"
        )


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
    unread: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Arrays:
    """Read a data set's images, in the order of the listing.

    Args:
        path: The folder or archive, for errors.
        files: What is in it.
        listing: Which of them to read, and their labels.
        size: Height and width to resize to; None keeps theirs, which must be all the same.
        interpolation: One of ``INTERPOLATIONS``.
        limits: How many to take, as many of each class.
        unread: Takes what is wrong with files that are no images, which are then left out; without
            it the first one is an error.
        progress: Makes a progress bar of that many images, as tqdm does.

    Returns:
        The :class:`Arrays`, of images (N, H, W, 3).

    Raises:
        ValueError: A file is not an image, the images differ in size, or take too much memory.
    """
    parts = chosen_files(listing, limits)
    names = [name for part, _ in parts for name in part]
    images = decode_all(
        path,
        files.read(set(names), unread),
        names,
        size=size,
        interpolation=interpolation,
        unread=unread,
        progress=progress,
    )
    ends = np.cumsum([len(part) for part, _ in parts])
    labels = [labels for _, labels in parts]
    cut = np.split(images, ends[:-1])
    if unread:
        good = [np.array([name not in unread for name in part], bool) for part, _ in parts]
        cut = [pixels[keep] for pixels, keep in zip(cut, good, strict=True)]
        labels = [part[keep] for part, keep in zip(labels, good, strict=True)]
    train, test, validation = map(Part, cut, labels)
    if listing.val is not None and listing.val is listing.test:
        validation = test
    return Arrays(train, test, None if listing.val is None else validation)


def chosen_files(listing: Listing, limits: Limits) -> list[tuple[list[str], Labels]]:
    """Files and labels of training, test and validation, as many as wanted.

    Args:
        listing: All of them.
        limits: How many to take, as many of each class.

    Returns:
        The three parts; the last is empty where it is none, or is that for testing.
    """
    found = []
    val = None if listing.val is listing.test else listing.val
    for part, limit in ((listing.train, limits[0]), (listing.test, limits[1]), (val, limits[1])):
        names = list(part or ())
        labels = np.fromiter((part or {}).values(), np.int64, len(names))
        take = balanced_subset(labels, len(names) if limit is None else limit)
        found.append(([names[i] for i in take], labels[take]))
    return found


def decode_all(
    path: Path,
    contents: Iterator[tuple[str, bytes]],
    names: Sequence[str],
    *,
    size: int | None = None,
    interpolation: str = "bilinear",
    unread: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Images:
    """Decode image files on all cores.

    Args:
        path: Where they are, for errors.
        contents: Names and contents, in any order.
        names: The order in which they are wanted; one or more.
        size: Height and width to resize to; None keeps theirs, which must be all the same.
        interpolation: One of ``INTERPOLATIONS``.
        unread: Takes what is wrong with files that are no images, whose pixels are then anything,
            and has what is wrong with those that are not among ``contents``; without it the first
            one is an error.
        progress: Makes a progress bar of that many images, as tqdm does.

    Returns:
        The images, (N, H, W, 3).

    Raises:
        ValueError: A file is not an image, the images differ in size, or take too much memory.
    """
    library = pillow()
    if size is not None:
        check_memory(path, len(names), (size, size, 3))

    def decoded(name: str, data: bytes) -> NDArray[np.uint8]:
        with damage(f"{path}: {name} is not a readable image"):
            picture = decode(data)
        return np.asarray(picture if size is None else resize(picture, size, interpolation))

    def first_shape(items: list[tuple[str, bytes]]) -> tuple[int, ...]:
        if size is not None:
            return size, size, 3
        for name, data in items[:-1]:
            try:
                return decoded(name, data).shape
            except ValueError:
                if unread is None:
                    raise
        return decoded(*items[-1]).shape

    def fill(images: Images, items: list[tuple[str, bytes]]) -> None:
        for name, data in items:
            try:
                pixels = decoded(name, data)
            except ValueError as error:
                if unread is None:
                    raise
                unread[name] = str(error)
                continue
            if pixels.shape != images.shape[1:]:
                raise ValueError(
                    f"{path}: the images differ in size ({name} is {pixels.shape[:2]}, others "
                    f"{images.shape[1:3]}): give an image size to resize them to"
                )
            images[position[name]] = pixels

    position = {name: i for i, name in enumerate(names)}
    missing = set(names)
    images: Images | None = None
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(available_cpus()) as pool,
        nullcontext() if progress is None else progress(len(names)) as bar,
    ):
        warnings.simplefilter("ignore", library.DecompressionBombWarning)  # as that is an error
        for some in _gathered(contents):
            if images is None:  # the first alone tells whether all fit
                shape = first_shape(some)
                check_memory(path, len(names), shape)
                images = np.empty((len(names), *shape), np.uint8)
            found = [name for name, _ in some]
            if not missing.issuperset(found):
                raise ValueError(f"{path} has more images than it declares")
            missing.difference_update(found)
            # 32 to a task, as small pictures take less time than handing one to a thread does.
            tasks = [some[i : i + 32] for i in range(0, len(some), 32)]
            for task, _ in zip(tasks, pool.map(partial(fill, images), tasks), strict=True):
                if bar is not None:
                    bar.update(len(task))
    missing.difference_update(unread or ())
    if images is None and unread:
        first = next(iter(unread.values()))
        raise ValueError(f"none of {len(names):,} images can be read, the first as {first}")
    if images is None or missing:
        raise ValueError(f"{path} has fewer images than it declares")
    return images


def _gathered(contents: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """As many files as may be in memory at a time."""
    some: list[tuple[str, bytes]] = []
    held = 0
    for name, data in contents:
        some.append((name, data))
        held += len(data)
        if len(some) == _FILES_AT_ONCE or held >= _BYTES_AT_ONCE:
            yield some
            some, held = [], 0
    if some:
        yield some


def check_memory(source: object, count: int, shape: tuple[int, ...]) -> None:
    """See that images fit into this machine before their memory is taken.

    Args:
        source: Where they come from, for errors.
        count: How many images.
        shape: (H, W, C) of each, of bytes.

    Raises:
        ValueError: They do not fit.
    """
    height, width, channels = shape
    wanted = count * height * width * channels
    if wanted > (there := memory()):
        raise ValueError(
            f"{source}: {count:,} images of {height}x{width} take {wanted / 1e9:,.1f} GB; "
            f"there are {there / 1e9:,.1f} GB of memory"
        )


def memory() -> int:
    """Bytes of memory that this machine has, or this container may use."""
    there: int = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return there
