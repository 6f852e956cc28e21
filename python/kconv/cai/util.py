"""The original's ``util``: image generators, pictures of filters, small helpers."""
# ruff: noqa: N803 - the original's names

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kconv.cai._generator import FillMode, ImageGenerator, Range, Shift

Array = NDArray[Any]


def create_image_generator(
    featurewise_center: bool = False,
    samplewise_center: bool = False,
    featurewise_std_normalization: bool = False,
    samplewise_std_normalization: bool = False,
    zca_whitening: bool = False,
    zca_epsilon: float = 1e-06,
    rotation_range: float = 15,
    width_shift_range: Shift = 0.1,
    height_shift_range: Shift = 0.1,
    shear_range: float = 0.2,
    zoom_range: Range = 0.3,
    channel_shift_range: float = 0.0,
    fill_mode: FillMode = "nearest",
    cval: float = 0.0,
    horizontal_flip: bool = True,
    vertical_flip: bool = False,
    rescale: float | None = None,
    preprocessing_function: Callable[[Array], Array] | None = None,
    data_format: str | None = None,
    validation_split: float = 0.0,
) -> ImageGenerator:
    """A generator that augments images; the arguments are Keras's ``ImageDataGenerator``'s.

    Example:
        >>> generator = create_image_generator(rotation_range=20)
        >>> images, labels = next(generator.flow(np.zeros((4, 8, 8, 3)), np.zeros(4)))
        >>> images.shape
        (4, 8, 8, 3)

    Returns:
        An object with ``flow``, ``flow_from_directory``, ``fit``, ``standardize`` and
        ``random_transform``.
    """
    return ImageGenerator(**locals())


def create_image_generator_no_augmentation(
    featurewise_center: bool = False,
    samplewise_center: bool = False,
    featurewise_std_normalization: bool = False,
    samplewise_std_normalization: bool = False,
    zca_whitening: bool = False,
    zca_epsilon: float = 0,
    rescale: float | None = None,
    preprocessing_function: Callable[[Array], Array] | None = None,
    data_format: str | None = None,
    validation_split: float = 0.0,
) -> ImageGenerator:
    """A generator that leaves images as they are, but for rescaling and normalising.

    Example:
        >>> generator = create_image_generator_no_augmentation(rescale=1 / 255)
        >>> float(next(generator.flow(np.full((4, 8, 8, 3), 255))).max())
        1.0
    """
    return ImageGenerator(**locals())


def get_model_parameter_counts(model: keras.Model) -> tuple[int, int]:
    """Trainable parameters, and all.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> get_model_parameter_counts(model)
        (8, 16)
    """
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    return trainable, model.count_params()


def create_folder_if_required(save_dir: str | os.PathLike[str]) -> None:
    """Make a folder and its parents where they are missing.

    Example:
        >>> import tempfile
        >>> create_folder_if_required(f"{tempfile.mkdtemp()}/models/first")

    Raises:
        OSError: if it cannot be made, as where a file has that name.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)


def evaluate_model_print(model: keras.Model, x_test: ArrayLike, y_test: ArrayLike) -> None:
    """Evaluate a model that was compiled with one metric, and print its loss and accuracy.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Softmax()])
        >>> model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
        >>> evaluate_model_print(model, np.eye(4), np.eye(4))  # doctest: +ELLIPSIS
        Test loss: 0.743...
        Test accuracy: 1.0

    Args:
        model: a compiled model.
        x_test: what it predicts from.
        y_test: what it should predict.

    Raises:
        ValueError: if the model has no metric beside its loss.
    """
    scores = model.evaluate(x_test, y_test, verbose=0)
    if np.ndim(scores) == 0:
        raise ValueError("the model was compiled without metrics, expected metrics=['accuracy']")
    print("Test loss:", scores[0])
    print("Test accuracy:", scores[1])


def relu(adata: ArrayLike) -> Array:
    """The numbers, with 0 in the place of negative ones.

    Example:
        >>> relu([-1.5, 2.0])
        array([0., 2.])
    """
    return np.maximum(adata, 0)


def reverse_sort(arraydata: ArrayLike) -> Array:
    """The numbers (of the last axis), the largest first.

    Example:
        >>> reverse_sort([1, 3, 2])
        array([3, 2, 1])
    """
    return np.sort(arraydata)[..., ::-1]


def get_class_position(pclass: int, predictions: ArrayLike) -> int:
    """How many classes a model finds likelier than this one: 0 for its first choice.

    Example:
        >>> get_class_position(2, [0.2, 0.5, 0.3])
        1

    Args:
        pclass: number of the class.
        predictions: (classes,) of one image.

    Raises:
        ValueError: if there is no such class.
    """
    likelihoods = np.asarray(predictions)
    if likelihoods.ndim != 1 or not 0 <= pclass < len(likelihoods):
        raise ValueError(f"pclass={pclass!r} is none of predictions of shape {likelihoods.shape}")
    return int(np.sum(likelihoods > likelihoods[pclass]))


def slice_3d_into_2d(
    aImage: ArrayLike, NumRows: int, NumCols: int, ForceCellMax: bool = False
) -> Array:
    """The channels of an image, side by side in one picture.

    As in the original, one "row" is a strip of cells from top to bottom: the channels go down the
    picture ``NumCols`` at a time, and there are ``NumRows`` such strips from left to right.

    Example:
        >>> slice_3d_into_2d(np.zeros((5, 4, 6)), 2, 3).shape
        (15, 8)

    Args:
        aImage: (H, W, C).
        NumRows: cells side by side.
        NumCols: cells above each other.
        ForceCellMax: whether each cell is brought to the range from 0 to 1.

    Returns:
        (NumCols * H, NumRows * W) float64; cells without a channel are zero.

    Raises:
        ValueError: if it is not of rank 3, or there are no cells.
    """
    image = np.asarray(aImage)
    if image.ndim != 3:
        raise ValueError(f"aImage has shape {image.shape}, expected (H, W, C)")
    return slice_4d_into_3d(image[:, :, None], NumRows, NumCols, ForceCellMax)[:, :, 0]


def slice_4d_into_3d(
    aImage: ArrayLike, NumRows: int, NumCols: int, ForceCellMax: bool = False
) -> Array:
    """Small pictures, such as filters, side by side in one.

    They are arranged as in :func:`slice_3d_into_2d`.

    Example:
        >>> slice_4d_into_3d(np.zeros((3, 3, 3, 32)), 4, 8).shape
        (24, 12, 3)

    Args:
        aImage: (H, W, C, N).
        NumRows: cells side by side.
        NumCols: cells above each other.
        ForceCellMax: whether each cell is brought to the range from 0 to 1.

    Returns:
        (NumCols * H, NumRows * W, C) float64; cells without a picture are zero.

    Raises:
        ValueError: if it is not of rank 4, or there are no cells.
    """
    return _tiled(aImage, NumRows, NumCols, ForceCellMax, gap=0)


def slice_4d_into_2d(
    aImage: ArrayLike,
    ForceColMax: bool = False,
    ForceRowMax: bool = False,
    ForceCellMax: bool = False,
) -> Array:
    """Every channel of every filter of a kernel, in one picture.

    Example:
        >>> slice_4d_into_2d(np.zeros((3, 4, 5, 6))).shape
        (18, 20)

    Args:
        aImage: (H, W, C, N).
        ForceColMax: whether what is above each other, a channel of all filters, is brought to the
            range from 0 to 1.
        ForceRowMax: whether what is side by side, a filter, is.
        ForceCellMax: whether each cell is.

    Returns:
        (N * H, C * W) float64: a filter to each line of cells, a channel to each column.

    Raises:
        ValueError: if it is not of rank 4.
    """
    image = _of_rank_4(aImage)
    for axes, wanted in (
        ((0, 1, 3), ForceColMax),
        ((0, 1, 2), ForceRowMax),
        ((0, 1), ForceCellMax),
    ):
        if wanted:
            image = _stretched(image, axes)
    height, width, channels, count = image.shape
    return image.transpose(3, 0, 2, 1).reshape(count * height, channels * width)


def show_neuronal_patterns(
    aWeights: ArrayLike, NumRows: int, NumCols: int, ForceCellMax: bool = False
) -> Array:
    """The filters of a first layer as one picture, arranged as by :func:`slice_4d_into_3d`.

    Example:
        >>> patterns = show_neuronal_patterns(np.random.randn(3, 3, 3, 32), 4, 8, True)
        >>> patterns.shape, float(patterns.min()), float(patterns.max())
        ((31, 15, 3), 0.0, 1.0)

    Args:
        aWeights: a kernel, (H, W, C, N).
        NumRows: filters side by side.
        NumCols: filters above each other.
        ForceCellMax: whether each filter is brought to the range from 0 to 1, which
            ``matplotlib.pyplot.imshow`` shows; else the picture has the weights as they are.

    Returns:
        (NumCols * (H + 1) - 1, NumRows * (W + 1) - 1, C) float64, with a gap of zeros between the
        filters.

    Raises:
        ValueError: if it is not of rank 4, or there are no cells.
    """
    return _tiled(aWeights, NumRows, NumCols, ForceCellMax, gap=1)


def _of_rank_4(image: ArrayLike) -> Array:
    image = np.asarray(image, np.float64)
    if image.ndim != 4:
        raise ValueError(f"the array has shape {image.shape}, expected (H, W, C, N)")
    return image


def _stretched(image: Array, axes: tuple[int, ...]) -> Array:
    """The numbers from the least to the largest over some axes, as numbers from 0 to 1."""
    if not image.size:
        return image
    image = image - image.min(axis=axes, keepdims=True)
    most = image.max(axis=axes, keepdims=True)
    return image / np.where(most > 0, most, 1)


def _tiled(image: ArrayLike, rows: int, columns: int, force_cell_max: bool, gap: int) -> Array:
    """Pictures (H, W, C, N) with ``rows`` side by side and ``columns`` above each other."""
    image = _of_rank_4(image)
    if rows < 1 or columns < 1:
        raise ValueError(f"NumRows={rows} and NumCols={columns} must be at least 1")
    if force_cell_max:
        image = _stretched(image, (0, 1, 2))
    height, width, channels, count = image.shape
    shown = min(count, rows * columns)
    cells = np.zeros((rows * columns, height + gap, width + gap, channels))
    cells[:shown, :height, :width] = np.moveaxis(image, -1, 0)[:shown]
    cells = cells.reshape(rows, columns, height + gap, width + gap, channels)
    picture = cells.transpose(1, 2, 0, 3, 4).reshape(
        columns * (height + gap), rows * (width + gap), channels
    )
    return picture[: len(picture) - gap, : picture.shape[1] - gap]
