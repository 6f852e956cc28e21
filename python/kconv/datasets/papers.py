"""The papers' data sets of photographs, from the folders or archives that their authors publish.

What the archives hold beside the images, such as outlines of the pets, is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kconv.datasets.files import damage, is_archive, open_files
from kconv.datasets.images import FilesByClass, Listing, hold_out, is_image, listing_of

IMAGE_SIZE = 224
"""Height and width that the papers resize these images to, whatever their proportions."""


@dataclass(frozen=True)
class Publication:
    """How a data set is published.

    Attributes:
        homepage: Where.
        layout: What is published, for errors.
        images: The folder or archive with the images, in the order to look for them; "" is the
            data folder itself.
        listing: From the path of the images and their names to the data set's :class:`Listing`.
    """

    homepage: str
    layout: str
    images: tuple[str, ...]
    listing: Callable[[Path, Sequence[str]], Listing]


def find_images(name: str, data_dir: Path | None) -> Path:
    """The folder or archive with a data set's images.

    Args:
        name: One of ``PAPERS``.
        data_dir: The folder in which it is, or that folder or archive itself.

    Returns:
        Its path.

    Raises:
        ValueError: There is none.
    """
    published = PAPERS[name]
    if data_dir is None:
        raise ValueError(
            f"{name} is not downloaded: give data_dir, a folder with {published.layout}, "
            f"from {published.homepage}"
        )
    if data_dir.is_file() and is_archive(data_dir.name):
        return data_dir
    found = _first(data_dir, published.images) if data_dir.is_dir() else None
    if found is None:
        raise ValueError(f"{name} is not at {data_dir}: expected {published.layout}")
    return found


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    paths = [folder / name for name in names]
    return next((path for path in paths if path.is_file() or path.is_dir()), None)


def _oxford_iiit_pet(path: Path, names: Sequence[str]) -> Listing:
    """The authors' split; a class's name is what those of its images' files say before a number."""
    source = _first(path.parent, ("annotations", "annotations.tar.gz"))
    if source is None:
        raise ValueError(f"{path.parent} has neither annotations/ nor annotations.tar.gz")
    lists = ("trainval.txt", "test.txt")
    with open_files(source) as files:
        wanted = {name for name in files.names if PurePosixPath(name).name in lists}
        with damage(f"{source} has lists that cannot be read"):
            texts = {PurePosixPath(name).name: data.decode() for name, data in files.read(wanted)}
    images = {PurePosixPath(name).stem: name for name in names if is_image(name)}
    numbers: dict[str, int] = {}
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for part, by_class in zip(lists, (train, test), strict=True):
        if part not in texts:
            raise ValueError(f"{source} has no {part}")
        for line in texts[part].splitlines():
            if not line or line.startswith("#"):
                continue
            match = re.fullmatch(r"((\S+)_\d+) (\d+) \d \d+", line.strip())
            if match is None:
                raise ValueError(
                    f"{source}: {part} has the line {line!r}; expected an image's name, class, "
                    "species and breed, such as 'Abyssinian_100 1 1 1'"
                )
            stem, breed, number = match.groups()
            if stem not in images:
                raise ValueError(f"{path} has no {stem}.jpg, which {part} lists")
            numbers[breed] = int(number)
            by_class.setdefault(breed, []).append(images[stem])
    return _checked(source, listing_of(train, test, sorted(numbers, key=numbers.__getitem__)))


def _cropped_plantdoc(path: Path, names: Sequence[str]) -> Listing:
    """The authors' split, in which a class may have images in one part only."""
    parts: list[FilesByClass] = []
    for part in ("train", "test"):
        by_class: dict[str, list[str]] = {}
        start = _start(path, names, part, PAPERS["cropped_plantdoc"])
        for name in sorted(filter(is_image, names)):
            folder, _, file = name.removeprefix(start).partition("/")
            if name.startswith(start) and file and "/" not in file:
                by_class.setdefault(folder, []).append(name)
        parts.append(by_class)
    train, test = parts
    return _checked(path, listing_of(train, test, sorted({*train, *test})))


def _class_folders(name: str, folders: dict[str, str]) -> Callable[[Path, Sequence[str]], Listing]:
    """A folder for each class, with no split: a fifth of each is for testing."""

    def listing(path: Path, names: Sequence[str]) -> Listing:
        by_class: dict[str, list[str]] = {}
        for folder, label in folders.items():
            start = _start(path, names, folder, PAPERS[name])
            images = (name for name in sorted(names) if name.startswith(start) and is_image(name))
            by_class[label] = [image for image in images if "/" not in image.removeprefix(start)]
        return listing_of(*hold_out(path, by_class), list(by_class))

    return listing


def _start(path: Path, names: Sequence[str], folder: str, published: Publication) -> str:
    """What the paths in a folder start with; if there are several of its name, the uppermost."""
    parts = (f"/{name}".partition(f"/{folder}/") for name in names)
    above = [start for start, found, _ in parts if found]
    if not above:
        raise ValueError(f"{path} has no folder {folder}/; expected {published.layout}")
    return f"{min(above, key=len)}/{folder}/".removeprefix("/")


def _checked(path: Path, listing: Listing) -> Listing:
    """The listing, if there is something to train with and to test with."""
    for part, images in (("train", listing.train), ("test", listing.test)):
        if not images:
            raise ValueError(f"{path} has no images to {part} with")
    return listing


_TISSUES = "tumor stroma complex lympho debris mucosa adipose empty".split()

PAPERS = {
    "oxford_iiit_pet": Publication(
        "https://www.robots.ox.ac.uk/~vgg/data/pets",
        "images/ and annotations/, or images.tar.gz and annotations.tar.gz",
        ("images", "images.tar.gz"),
        _oxford_iiit_pet,
    ),
    "cropped_plantdoc": Publication(
        "https://github.com/pratikkayal/PlantDoc-Dataset",
        "train/<class>/ and test/<class>/, or PlantDoc-Dataset-master.zip",
        ("PlantDoc-Dataset", "PlantDoc-Dataset-master", "PlantDoc-Dataset-master.zip", ""),
        _cropped_plantdoc,
    ),
    "colorectal_histology": Publication(
        "https://zenodo.org/records/53169",
        "01_TUMOR/ to 08_EMPTY/, or Kather_texture_2016_image_tiles_5000.zip",
        ("Kather_texture_2016_image_tiles_5000", "Kather_texture_2016_image_tiles_5000.zip", ""),
        _class_folders(
            "colorectal_histology",
            {f"{i:02}_{tissue.upper()}": tissue for i, tissue in enumerate(_TISSUES, start=1)},
        ),
    ),
    "malaria": Publication(
        "https://lhncbc.nlm.nih.gov/LHC-research/LHC-projects/image-processing/malaria-datasheet.html",
        "Parasitized/ and Uninfected/, or cell_images.zip",
        ("cell_images", "cell_images.zip", ""),
        _class_folders("malaria", {"Parasitized": "parasitized", "Uninfected": "uninfected"}),
    ),
}
