"""The original's ``datasets``: loading, saving, and testing with flipped images."""
# ruff: noqa: N803, PT028 - the original's names, which are not those of tests

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kconv.cai.models import load_kereas_model
from kconv.training import classification_report

Array = NDArray[Any]
Images = NDArray[np.float32]

# CIE 1931 tristimulus values of linear sRGB, each row divided by the white point D65's.
_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
) / np.array([[0.95047], [1.0], [1.08883]])
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def load_dataset(
    dataset: Any,
    lab: bool = False,
    verbose: bool = False,
    bipolar: bool = True,
    base_model_name: str = "",
) -> tuple[Images, Array, Images, Array]:
    """Images in the networks' range and one-hot labels.

    Example:
        >>> class Dataset:
        ...     @staticmethod
        ...     def load_data():
        ...         images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 1])
        ...         return (images, labels), (images, labels)
        >>> x_train, y_train, x_test, y_test = load_dataset(Dataset)
        >>> x_train.shape, float(x_train[0, 0, 0, 0]), y_train.shape
        ((4, 8, 8, 3), -2.0, (4, 3))

    Args:
        dataset: what has a ``load_data()`` such as ``keras.datasets.cifar10``.
        lab: whether to convert to CIE LAB.
        verbose: whether to print shapes and ranges.
        bipolar: x / 64 - 2, in LAB (L / 25 - 2, a / 50, b / 50); else x / 255, in LAB
            (L / 100, a / 200 + 0.5, b / 200 + 0.5).
        base_model_name: of no effect.

    Returns:
        Training images (N, H, W, C) float32 and labels (N, classes), and those to test with.

    Raises:
        ValueError: if ``lab`` is asked of images that have not three channels.
    """
    (x_train, y_train), (x_test, y_test) = dataset.load_data()
    classes = int(max(np.max(y_train), np.max(y_test))) + 1
    arrays = (
        _scaled(x_train, lab, bipolar),
        _one_hot(y_train, classes),
        _scaled(x_test, lab, bipolar),
        _one_hot(y_test, classes),
    )
    if verbose:
        for name, array in zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True):
            print(f"{name}: {array.shape}, {array.min():.4f} to {array.max():.4f}")
    return arrays


def load_dataset_with_validation(
    dataset: Any,
    lab: bool = False,
    verbose: bool = False,
    bipolar: bool = True,
    base_model_name: str = "",
    validation_size: float = 0.1,
    validation_flip_horizontal: bool = False,
    validation_flip_vertical: bool = False,
) -> tuple[Images, Array, Images, Array, Images, Array]:
    """:func:`load_dataset`, with the first share of the training images held out.

    Args:
        dataset: as in :func:`load_dataset`, and so are the other arguments.
        lab: whether to convert to CIE LAB.
        verbose: whether to print shapes and ranges.
        bipolar: which range the values have.
        base_model_name: of no effect.
        validation_size: the share of the training images to validate with.
        validation_flip_horizontal: whether to append copies of these, mirrored.
        validation_flip_vertical: whether to append copies of these, upside down.

    Returns:
        Images and labels to train, to validate and to test with.

    Raises:
        ValueError: if the share is not from 0 to 1.
    """
    if not 0 <= validation_size <= 1:
        raise ValueError(f"validation_size={validation_size} is not from 0 to 1")
    x, y, x_test, y_test = load_dataset(dataset, lab, verbose, bipolar, base_model_name)
    held_out = int(validation_size * len(x))
    x_val, y_val = x[:held_out], y[:held_out]
    flips = ((2, validation_flip_horizontal), (1, validation_flip_vertical))
    copies = [x_val, *(np.flip(x_val, axis) for axis, wanted in flips if wanted)]
    y_val = np.concatenate([y_val] * len(copies))
    return x[held_out:], y[held_out:], np.concatenate(copies), y_val, x_test, y_test


def load_cifar10_dataset(
    lab: bool = False, verbose: bool = False, bipolar: bool = True
) -> tuple[Images, Array, Images, Array]:
    """:func:`load_dataset` of ``keras.datasets.cifar10``, which is downloaded."""
    return load_dataset(keras.datasets.cifar10, lab, verbose, bipolar)


def load_hyperspectral_matlab_image(
    ImgUrl: str,
    ClassUrl: str,
    ImgProperty: str,
    ClassProperty: str,
    LocalBaseName: str,
    Verbose: bool = True,
) -> NoReturn:
    """Not in kconv.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("load_hyperspectral_matlab_image of the original is not in kconv")


def save_dataset_in_format(
    aImages: ArrayLike,
    aClasses: ArrayLike,
    dest_folder_name: str = "img",
    format: str = ".png",  # noqa: A002 - the original's name
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """Write images as ``dest_folder_name/class<k>/img_<n>.png``.

    Args:
        aImages: (N, H, W, C) or (N, H, W), from 0 to 255.
        aClasses: (N,) or (N, 1) numbers of the classes.
        dest_folder_name: the folder, which is made.
        format: ending of the files' names, which says their format.
        with_horizontal_flip: whether to write mirrored copies, ``img_<n>_h``, too.
        with_vertical_flip: whether to write copies upside down, ``img_<n>_v``, too.

    Raises:
        ValueError: if images and labels are not as many.
        OSError: if a file cannot be written.
    """
    images, classes = np.asarray(aImages), np.asarray(aClasses).reshape(-1)
    if len(images) != len(classes):
        raise ValueError(f"{len(images)} images do not go with {len(classes)} labels")
    _save(
        zip(images, classes, strict=True),
        dest_folder_name,
        format,
        with_horizontal_flip,
        with_vertical_flip,
    )


def save_dataset_as_png(
    aImages: ArrayLike,
    aClasses: ArrayLike,
    dest_folder_name: str = "img",
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
    dest_folder_name: str = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_dataset_in_format` as JPEG."""
    save_dataset_in_format(
        aImages, aClasses, dest_folder_name, ".jpg", with_horizontal_flip, with_vertical_flip
    )


def save_tfds_in_format(
    p_tfds: Iterable[Any],
    dest_folder_name: str = "img",
    format: str = ".png",  # noqa: A002 - the original's name
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_dataset_in_format` for pairs of image and label, as TensorFlow Datasets has."""
    _save(p_tfds, dest_folder_name, format, with_horizontal_flip, with_vertical_flip)


def save_tfds_as_png(
    p_tfds: Iterable[Any],
    dest_folder_name: str = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_tfds_in_format` as PNG."""
    _save(p_tfds, dest_folder_name, ".png", with_horizontal_flip, with_vertical_flip)


def save_tfds_as_jpg(
    p_tfds: Iterable[Any],
    dest_folder_name: str = "img",
    with_horizontal_flip: bool = False,
    with_vertical_flip: bool = False,
) -> None:
    """:func:`save_tfds_in_format` as JPEG."""
    _save(p_tfds, dest_folder_name, ".jpg", with_horizontal_flip, with_vertical_flip)


def print_classification_report(pred_y: ArrayLike, test_y: ArrayLike) -> None:
    """Print precision, recall and F1 of each class.

    Example:
        >>> print_classification_report(np.eye(2)[[0, 0]], np.eye(2)[[0, 1]])
        class    precision  recall      F1  images
        0           0.5000  1.0000  0.6667       1
        1           0.0000  0.0000  0.0000       1
        mean        0.2500  0.5000  0.3333       2
        accuracy 0.5000

    Args:
        pred_y: (N, classes) probabilities, or sums of such.
        test_y: (N, classes) one-hot labels.
    """
    found, labels = np.argmax(pred_y, axis=1), np.argmax(test_y, axis=1)
    print(classification_report(labels, found, map(str, range(np.shape(test_y)[1]))))
    print(f"accuracy {np.mean(found == labels):.4f}")


def test_flips_on_model(
    test_x: ArrayLike,
    test_y: ArrayLike,
    model: keras.Model,
    has_flip_x: bool = True,
    has_flip_y: bool = True,
    has_bw: bool = True,
    center_crop: float = 0.0,
) -> None:
    """Print how well a model does on images, on changed ones, and on both together.

    A sum is that of the predictions for the plain and the changed images.

    Args:
        test_x: (N, H, W, C) images.
        test_y: (N, classes) one-hot labels.
        model: what predicts.
        has_flip_x: whether to try them mirrored.
        has_flip_y: whether to try them upside down.
        has_bw: whether to try them in grey.
        center_crop: the share of height and width to cut off, half at each side; 0 does not.

    Raises:
        ValueError: if the share is not from 0 to below 1.
    """
    images = np.asarray(test_x, np.float32)
    if not 0 <= center_crop < 1:
        raise ValueError(f"center_crop={center_crop} is not from 0 to below 1")

    def predict(changed: Images) -> Array:
        return model.predict(changed, verbose=0)

    def report(title: str, predictions: Array) -> None:
        print(f"{title}:")
        print_classification_report(predictions, test_y)

    plain = predict(images)
    report("Test Original", plain)
    total, names = plain, "Original"
    flipped = None
    if has_flip_x:
        flipped = predict(np.flip(images, 2))
        report("Test Flipped X", flipped)
        total, names = total + flipped, f"{names} + Flipped X"
        report(f"Test {names}", total)
    if has_flip_y:
        upside_down = predict(np.flip(images, 1))
        report("Test Flipped Y", upside_down)
        report("Test Original + Flipped Y", plain + upside_down)
        if has_flip_x:
            report(f"Test {names} + Flipped Y", total + upside_down)
    if center_crop > 0:
        cropped = predict(_cropped(images, center_crop))
        report("Test Center Crop", cropped)
        report("Test Original + Center Crop", plain + cropped)
        if flipped is not None:
            report("Test Original + Flipped X + Center Crop", plain + flipped + cropped)
    if has_bw:
        grey = predict(_grey(images))
        report("Test Black and White", grey)
        report("Test Original + Black and White", plain + grey)
        if flipped is not None:
            report("Test Original + Flipped X + Black and White", plain + flipped + grey)


def test_flips_on_saved_model(
    test_x: ArrayLike,
    test_y: ArrayLike,
    model_file_name: str | os.PathLike[str],
    has_flip_x: bool = True,
    has_flip_y: bool = True,
    has_bw: bool = True,
    center_crop: float = 0.0,
) -> None:
    """:func:`test_flips_on_model` for the model in a file."""
    model = load_kereas_model(model_file_name)
    test_flips_on_model(test_x, test_y, model, has_flip_x, has_flip_y, has_bw, center_crop)


# Not tests of kconv, whatever their names say to pytest.
for _function in (test_flips_on_model, test_flips_on_saved_model):
    vars(_function)["__test__"] = False


def _scaled(images: ArrayLike, lab: bool, bipolar: bool) -> Images:
    x = np.asarray(images)
    x = (x if x.ndim == 4 else x[..., None]).astype(np.float32)
    if not lab:
        scaled = x / np.float32(64) - np.float32(2) if bipolar else x / np.float32(255)
    elif bipolar:
        scaled = _lab(x) / (25, 50, 50) - (2, 0, 0)
    else:
        scaled = _lab(x) / (100, 200, 200) + (0, 0.5, 0.5)
    return scaled.astype(np.float32)


def _one_hot(labels: ArrayLike, classes: int) -> Array:
    return np.eye(classes, dtype=np.float32)[np.asarray(labels, np.int64).reshape(-1)]


def _lab(images: Images) -> NDArray[np.floating[Any]]:
    """From sRGB of 0 to 255 to CIE LAB under D65."""
    if images.shape[-1] != 3:
        raise ValueError(f"lab=True: the images have {images.shape[-1]} channels, not 3")
    rgb = images / np.float32(255)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _grey(images: Images) -> Images:
    if images.shape[-1] != 3:
        return images
    return np.repeat((images @ _GREY)[..., None], 3, axis=-1)


def _cropped(images: Images, share: float) -> Images:
    """The middle of images, brought back to their size."""
    height, width = images.shape[1:3]
    top, left = int(height * share / 2), int(width * share / 2)
    middle = images[:, top : height - top, left : width - left]
    resized = keras.ops.image.resize(middle, (height, width), data_format="channels_last")
    return keras.ops.convert_to_numpy(resized)


def _save(
    pairs: Iterable[Any], folder: str, suffix: str, horizontal_flip: bool, vertical_flip: bool
) -> None:
    from PIL import Image

    for number, pair in enumerate(pairs):
        image, label = (pair["image"], pair["label"]) if isinstance(pair, dict) else pair
        pixels = np.clip(np.asarray(image), 0, 255).astype(np.uint8)
        if pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        target = Path(folder) / f"class{int(label)}"
        target.mkdir(parents=True, exist_ok=True)
        copies = {"": pixels}
        if horizontal_flip:
            copies["_h"] = pixels[:, ::-1]
        if vertical_flip:
            copies["_v"] = pixels[::-1]
        for ending, copy in copies.items():
            Image.fromarray(np.ascontiguousarray(copy)).save(
                target / f"img_{number}{ending}{suffix}"
            )
