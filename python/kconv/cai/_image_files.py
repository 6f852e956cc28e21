"""Images from files and to files, as the original's ``datasets`` reads and writes them."""
# ruff: noqa: N803 - the original's names

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from kconv.cai._pixels import Array, Images, flipped, nearest, scaled, to_lab

StrPath = str | os.PathLike[str]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def add_padding_to_make_img_array_squared(img: ArrayLike) -> Array:
    """A square image, with black at both ends of its shorter side.

    Example:
        >>> add_padding_to_make_img_array_squared(np.ones((2, 5, 3))).shape
        (5, 5, 3)

    Args:
        img: (H, W, C).

    Returns:
        (max(H, W), max(H, W), C).

    Raises:
        ValueError: if it is not of rank 3.
    """
    image = np.asarray(img)
    if image.ndim != 3:
        raise ValueError(f"img has shape {image.shape}, expected (H, W, C)")
    height, width, _ = image.shape
    down, right = max(width - height, 0), max(height - width, 0)
    before_and_after = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    return np.pad(image, before_and_after)


def load_images_from_files(
    file_names: Iterable[StrPath],
    target_size: tuple[int, int] = (224, 224),
    dtype: DTypeLike = "float32",
    smart_resize: bool = False,
    lab: bool = False,
    rescale: bool = False,
    bipolar: bool = False,
) -> list[Array]:
    """Images in colour, resized to their nearest pixels.

    Example:
        >>> load_images_from_files([])
        []

    Args:
        file_names: the files.
        target_size: height and width.
        dtype: of the images; a floating one with ``lab`` or ``rescale``.
        smart_resize: whether black is added first until the image is square; else it is distorted.
        lab: whether to convert to CIE LAB.
        rescale: RGB / 255, or / 64 - 2 with ``bipolar``; in LAB (L / 100, a / 200 + 0.5,
            b / 200 + 0.5), or (L / 25 - 2, a / 50, b / 50) with ``bipolar``.
        bipolar: which range ``rescale`` gives; of no effect without it.

    Returns:
        One array (height, width, 3) for each file.

    Raises:
        ValueError: if an integer ``dtype`` cannot hold the values.
        OSError: if a file cannot be read, or holds no image.
    """
    if (lab or rescale) and not np.issubdtype(dtype, np.floating):
        raise ValueError(f"dtype={dtype!r} cannot hold rescaled or LAB images, expected a float")
    height, width = target_size

    def load(file_name: StrPath) -> Array:
        if smart_resize:
            image = keras.utils.img_to_array(keras.utils.load_img(file_name), "channels_last")
            image = nearest(add_padding_to_make_img_array_squared(image), height, width)
        else:
            picture = keras.utils.load_img(file_name, target_size=(height, width))
            image = keras.utils.img_to_array(picture, "channels_last")
        if rescale:
            image = scaled(image, lab, bipolar)
        elif lab:
            image = to_lab(image)
        return image.astype(dtype)

    return [load(file_name) for file_name in file_names]


def load_images_from_folders(
    seed: int | None = None,
    root_dir: StrPath | None = None,
    lab: bool = False,
    verbose: bool = True,
    bipolar: bool = False,
    base_model_name: str = "plant_leaf",
    training_size: float = 0.6,
    validation_size: float = 0.2,
    test_size: float = 0.2,
    target_size: tuple[int, int] = (224, 224),
    has_training: bool = True,
    has_validation: bool = True,
    has_testing: bool = True,
    smart_resize: bool = False,
) -> tuple[Images, Images, Images, Array, Array, Array, dict[int, float] | None, list[str]]:
    """The images of a folder for each class, in shares to train, to validate and to test with.

    Example:
        >>> *arrays, class_weight, classes = load_images_from_folders(7, "leaves")  # doctest: +SKIP

    Args:
        seed: of the order in which each class's files are shared out; None for another each time.
        root_dir: the folder with one folder for each class.
        lab: whether to convert to CIE LAB.
        verbose: whether to print what is loaded.
        bipolar: which range the values have; see :func:`load_images_from_files`.
        base_model_name: of no effect.
        training_size: the share of each class's images to train with.
        validation_size: the share to validate with.
        test_size: the share to test with; all the rest if the three reach 1.
        target_size: height and width.
        has_training: whether the images to train with are loaded.
        has_validation: whether those to validate with are.
        has_testing: whether those to test with are.
        smart_resize: whether images become square by black margins, not by distortion.

    Returns:
        ``train_x, val_x, test_x, train_y, val_y, test_y, class_weight, classes``: images
        (n, height, width, 3) float32, none in a part that is not wanted; labels (n, classes),
        one-hot; the weight of each class in the training part that makes all classes count the
        same, or None without one; the names of the classes, sorted.

    Raises:
        ValueError: if the sizes are no shares, or there are no classes, or one without images.
        OSError: if the folder or an image cannot be read.
    """
    sizes = (training_size, validation_size, test_size)
    if root_dir is None:
        raise ValueError("root_dir=None, expected the folder with a folder for each class")
    if min(sizes) < 0 or sum(sizes) > 1 + 1e-9:
        raise ValueError(
            f"training_size={training_size}, validation_size={validation_size} and "
            f"test_size={test_size} are no shares of 1"
        )
    classes, parts = _shared_out(Path(root_dir), sizes, random.Random(seed))
    images: list[Images] = []
    targets: list[Array] = []
    for part, wanted in zip(parts, (has_training, has_validation, has_testing), strict=True):
        files, labels = zip(*part, strict=True) if part and wanted else ((), ())
        loaded = load_images_from_files(
            files, target_size, "float32", smart_resize, lab, rescale=True, bipolar=bipolar
        )
        images.append(np.stack(loaded) if loaded else np.zeros((0, *target_size, 3), np.float32))
        targets.append(np.eye(len(classes), dtype=np.float32)[list(labels)])
    if verbose:
        print(f"{len(classes)} classes: {', '.join(classes)}")
        for title, part_images in zip(("training", "validation", "test"), images, strict=True):
            print(f"{title}: {part_images.shape}")
    train_x, val_x, test_x = images
    train_y, val_y, test_y = targets
    weights = _balanced(train_y.argmax(axis=1)) if has_training else None
    return train_x, val_x, test_x, train_y, val_y, test_y, weights, classes


def _shared_out(
    root: Path, sizes: tuple[float, float, float], rng: random.Random
) -> tuple[list[str], list[list[tuple[Path, int]]]]:
    """The classes in a folder, and the files with their labels in each of three parts."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"root_dir={str(root)!r} has no folders of classes")
    parts: list[list[tuple[Path, int]]] = [[], [], []]
    for label, name in enumerate(classes):
        files = sorted(
            path
            for path in (root / name).iterdir()
            if path.suffix.lower() in _SUFFIXES and path.is_file()
        )
        if not files:
            raise ValueError(f"the class {name!r} has no {', '.join(_SUFFIXES)} files")
        rng.shuffle(files)
        count = len(files)
        first, second = int(count * sizes[0]), int(count * (sizes[0] + sizes[1]))
        third = count if sum(sizes) > 1 - 1e-9 else int(count * sum(sizes) + 1e-9)
        for part, start, end in zip(parts, (0, first, second), (first, second, third), strict=True):
            part += [(file, label) for file in files[start:end]]
    return classes, parts


def _balanced(labels: NDArray[np.int64]) -> dict[int, float]:
    """The weight of each class among labels (n,) with which all classes count the same."""
    classes, counts = np.unique(labels, return_counts=True)
    weights = len(labels) / (len(classes) * counts)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


def save_dataset_in_format(
    aImages: ArrayLike,
    aClasses: ArrayLike,
    dest_folder_name: StrPath = "img",
    format: str = ".png",  # noqa: A002 - the original's name
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """Write images as ``dest_folder_name/class_<k>/img_<n>.png``.

    As in the original the first of three channels is blue, which is OpenCV's order; images in the
    usual order are ``aImages[..., ::-1]``.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save_dataset_in_format(np.zeros((2, 8, 8, 3)), np.eye(2), folder, ".jpg", True)
        >>> sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.jpg"))
        ['class_0/h_img_0.jpg', 'class_0/img_0.jpg', 'class_1/h_img_1.jpg', 'class_1/img_1.jpg']

    Args:
        aImages: (N, H, W, C) or (N, H, W), from 0 to 255, of 1, 3 or 4 channels.
        aClasses: (N, classes) one-hot labels; or (N,) or (N, 1) numbers of the classes.
        dest_folder_name: the folder, which is made.
        format: ending of the files' names, which says their format.
        with_horizontal_flip: whether to write mirrored copies, ``h_img_<n>``, too.
        with_vertical_flip: whether to write copies upside down, ``v_img_<n>``, too; with both
            flips, also ``hv_img_<n>``.

    Raises:
        ValueError: if images and labels are not as many or of other shapes, or no image files
            have that ending.
        OSError: if a file cannot be written.
    """
    images, classes = np.asarray(aImages), np.asarray(aClasses)
    if len(images) != len(classes):
        raise ValueError(f"{len(images)} images do not go with {len(classes)} labels")
    if classes.ndim == 2:
        classes = classes[:, 0] if classes.shape[1] == 1 else classes.argmax(axis=1)
    if images.ndim not in (3, 4) or classes.ndim != 1:
        raise ValueError(
            f"aImages of shape {images.shape} and aClasses of shape {np.shape(aClasses)}, "
            "expected (N, H, W, C) and (N, classes)"
        )
    if images.ndim == 4 and images.shape[-1] in (3, 4):
        images = images[..., [2, 1, 0, 3][: images.shape[-1]]]
    pairs = zip(images, classes, strict=True)
    _save(pairs, dest_folder_name, format, with_horizontal_flip, with_vertical_flip)


def save_dataset_as_png(
    aImages: ArrayLike,
    aClasses: ArrayLike,
    dest_folder_name: StrPath = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_dataset_in_format` as PNG."""
    save_dataset_in_format(
        aImages, aClasses, dest_folder_name, ".png", with_horizontal_flip, with_vertical_flip
    )


def save_dataset_as_jpg(
    aImages: ArrayLike,
    aClasses: ArrayLike,
    dest_folder_name: StrPath = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_dataset_in_format` as JPEG."""
    save_dataset_in_format(
        aImages, aClasses, dest_folder_name, ".jpg", with_horizontal_flip, with_vertical_flip
    )


def save_tfds_in_format(
    p_tfds: Iterable[Any],
    dest_folder_name: StrPath = "img",
    format: str = ".png",  # noqa: A002 - the original's name
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_dataset_in_format` for what TensorFlow Datasets has, with red first.

    Args:
        p_tfds: dictionaries of "image" (H, W, C) and "label", or pairs of them; the label is a
            number.
        dest_folder_name: the folder, which is made.
        format: ending of the files' names, which says their format.
        with_horizontal_flip: whether to write mirrored copies too.
        with_vertical_flip: whether to write copies upside down too.

    Raises:
        ValueError: if no image files have that ending, or an image has another rank.
        OSError: if a file cannot be written.
    """
    _save(p_tfds, dest_folder_name, format, with_horizontal_flip, with_vertical_flip)


def save_tfds_as_png(
    p_tfds: Iterable[Any],
    dest_folder_name: StrPath = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_tfds_in_format` as PNG."""
    _save(p_tfds, dest_folder_name, ".png", with_horizontal_flip, with_vertical_flip)


def save_tfds_as_jpg(
    p_tfds: Iterable[Any],
    dest_folder_name: StrPath = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_tfds_in_format` as JPEG."""
    _save(p_tfds, dest_folder_name, ".jpg", with_horizontal_flip, with_vertical_flip)


def _save(
    pairs: Iterable[Any],
    folder: StrPath,
    suffix: str,
    horizontal_flip: bool,
    vertical_flip: bool,
) -> None:
    """Write pairs of an image, red first, and the number of its class."""
    from PIL import Image

    kind = Image.registered_extensions().get(suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"format={suffix!r} is no ending of image files, expected '.png' or so")
    for number, pair in enumerate(pairs):
        image, label = (pair["image"], pair["label"]) if isinstance(pair, dict) else pair
        pixels = np.rint(np.clip(np.asarray(image), 0, 255)).astype(np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
            raise ValueError(f"image {number} has shape {np.shape(image)}, expected (H, W, 1 or 3)")
        target = Path(folder) / f"class_{int(label)}"
        target.mkdir(parents=True, exist_ok=True)
        for flip, copy in flipped(pixels, horizontal_flip, vertical_flip).items():
            copy = np.ascontiguousarray(copy[..., 0] if copy.shape[-1] == 1 else copy)
            name = f"{flip}_img_{number}{suffix}".removeprefix("_")
            if kind == "JPEG":
                Image.fromarray(copy).save(target / name, quality=95)  # OpenCV's
            else:
                Image.fromarray(copy).save(target / name)
