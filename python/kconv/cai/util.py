"""The original's ``util``: image generators, pictures of filters, parameter counts."""
# ruff: noqa: N803 - the original's names

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kconv.cai._generator import FillMode, ImageGenerator, Range

Array = NDArray[Any]


def create_image_generator(
    featurewise_center: bool = False,
    samplewise_center: bool = False,
    featurewise_std_normalization: bool = False,
    samplewise_std_normalization: bool = False,
    zca_whitening: bool = False,
    zca_epsilon: float = 1e-06,
    rotation_range: float = 15,
    width_shift_range: float = 0.1,
    height_shift_range: float = 0.1,
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


def slice_3d_into_2d(
    aImage: ArrayLike, NumRows: int, NumCols: int, ForceCellMax: bool = False
) -> Array:
    """The channels of an image, side by side in one picture.

    Example:
        >>> slice_3d_into_2d(np.zeros((5, 4, 6)), 2, 3).shape
        (10, 12)

    Args:
        aImage: (H, W, C).
        NumRows: cells above each other.
        NumCols: cells side by side.
        ForceCellMax: whether each cell is divided by its maximum.

    Returns:
        (NumRows * H, NumCols * W), row by row; cells without a channel are zero.

    Raises:
        ValueError: if it is not of rank 3.
    """
    image = np.asarray(aImage)
    if image.ndim != 3:
        raise ValueError(f"aImage has shape {image.shape}, expected (H, W, C)")
    return slice_4d_into_3d(image[:, :, None], NumRows, NumCols, ForceCellMax)[:, :, 0]


def slice_4d_into_3d(
    aImage: ArrayLike, NumRows: int, NumCols: int, ForceCellMax: bool = False
) -> Array:
    """Small pictures, such as filters, side by side in one.

    Example:
        >>> slice_4d_into_3d(np.zeros((3, 3, 3, 32)), 4, 8).shape
        (12, 24, 3)

    Args:
        aImage: (H, W, C, N).
        NumRows: cells above each other.
        NumCols: cells side by side.
        ForceCellMax: whether each cell is divided by its maximum.

    Returns:
        (NumRows * H, NumCols * W, C), row by row; cells without a picture are zero.

    Raises:
        ValueError: if it is not of rank 4, or there are no cells.
    """
    image = np.asarray(aImage)
    if image.ndim != 4:
        raise ValueError(f"aImage has shape {image.shape}, expected (H, W, C, N)")
    if NumRows < 1 or NumCols < 1:
        raise ValueError(f"NumRows={NumRows} and NumCols={NumCols} must be at least 1")
    height, width, channels, count = image.shape
    if ForceCellMax:
        most = image.max(axis=(0, 1, 2))
        image = image / np.where(most > 0, most, 1)
    shown = min(count, NumRows * NumCols)
    cells = np.zeros((NumRows * NumCols, height, width, channels), image.dtype)
    cells[:shown] = np.moveaxis(image, -1, 0)[:shown]
    cells = cells.reshape(NumRows, NumCols, height, width, channels)
    return cells.swapaxes(1, 2).reshape(NumRows * height, NumCols * width, channels)


def show_neuronal_patterns(
    aWeights: ArrayLike, NumRows: int, NumCols: int, ForceCellMax: bool = False
) -> Array:
    """The filters of a first layer as one picture.

    Example:
        >>> patterns = show_neuronal_patterns(np.random.randn(3, 3, 3, 32), 4, 8)
        >>> patterns.shape, float(patterns.min()), float(patterns.max())
        ((12, 24, 3), 0.0, 1.0)

    Args:
        aWeights: a kernel, (H, W, C, N).
        NumRows: filters above each other.
        NumCols: filters side by side.
        ForceCellMax: whether the brightest value of each filter is 1, or only that of all.

    Returns:
        (NumRows * H, NumCols * W, C) in [0, 1], for ``matplotlib.pyplot.imshow``.
    """
    weights = np.asarray(aWeights, np.float32)
    if weights.size:
        weights = weights - weights.min()
        weights = weights / (weights.max() or 1)
    return slice_4d_into_3d(weights, NumRows, NumCols, ForceCellMax)
