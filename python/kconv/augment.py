"""The papers' augmentation, for a whole batch at once: one random affine map for each image.

The arguments mean what they mean in Keras's ``ImageDataGenerator``, with which the papers trained.

Example:
    >>> images = np.zeros((2, 32, 32, 3), np.uint8)
    >>> augment(images, np.random.default_rng(0)).shape
    (2, 32, 32, 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How far an image may be moved; every value is drawn uniformly. The defaults are the papers'.

    Attributes:
        rotation: Degrees, to either side.
        shift: Share of the height and of the width, to either side.
        shear: Degrees, to either side.
        zoom: Height and width are scaled by factors in 1 - zoom ... 1 + zoom, each by its own.
        flip: Whether every other image, on average, is mirrored left to right.
        whole_pixels: Whether shifts are rounded, so that they blur nothing.
    """

    rotation: float = 20.0
    shift: float = 0.3
    shear: float = 0.2
    zoom: float = 0.3
    flip: bool = True
    whole_pixels: bool = False


PAPERS = Recipe()
FLIP_SHIFT = Recipe(rotation=0, shift=0.125, shear=0, zoom=0, whole_pixels=True)
"""What small photographs are trained with where few epochs are to do."""


def scale(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bring bytes to the networks' input range: x / 64 - 2, in [-2, 2).

    Example:
        >>> scale(np.array([0, 128, 255], np.uint8))
        array([-2.      ,  0.      ,  1.984375], dtype=float32)
    """
    return images.astype(np.float32) / np.float32(64) - np.float32(2)


def unscale(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The bytes' values again, as floats: (x + 2) * 64.

    Example:
        >>> unscale(scale(np.array([0, 128, 255], np.uint8)))
        array([  0., 128., 255.], dtype=float32)
    """
    return (images + np.float32(2)) * np.float32(64)


def augment(
    images: NDArray[np.uint8], rng: np.random.Generator, recipe: Recipe = PAPERS
) -> NDArray[np.uint8]:
    """Rotate, shear, zoom, shift and mirror each image at random; edges repeat outwards.

    Args:
        images: (N, H, W, C) uint8.
        rng: The source of chance: the same state gives the same images.
        recipe: How far to go.

    Returns:
        New images of the same shape, interpolated bilinearly.
    """
    n, height, width, channels = images.shape
    # Where the pixel at `grid`, counted from the middle, comes from: matrix @ grid + shift.
    matrix, shift = _random_maps(n, (height, width), rng, recipe)
    middle = np.array([(height - 1) / 2, (width - 1) / 2], np.float32)
    grid = np.indices((height, width), np.float32).reshape(2, -1) - middle[:, None]
    place = matrix @ grid + (shift + middle)[:, :, None]  # (N, 2, H * W)
    last = np.array([height - 1, width - 1], np.float32)
    np.clip(place, 0, last[:, None], out=place)

    corner = np.minimum(place.astype(np.int32), np.maximum(last.astype(np.int32) - 1, 0)[:, None])
    fraction = place - corner
    down, right = (fraction[:, axis, :, None] for axis in range(2))
    first = np.arange(n, dtype=np.int32)[:, None] * (height * width)
    top_left = first + corner[:, 0] * width + corner[:, 1]
    step_down, step_right = width * (height > 1), int(width > 1)
    pixels = images.reshape(-1, channels)

    def row(index: NDArray[np.int32]) -> NDArray[np.float32]:
        left = pixels[index].astype(np.float32)
        return left + (pixels[index + step_right] - left) * right

    top = row(top_left)
    top += (row(top_left + step_down) - top) * down
    top += 0.5  # the conversion to bytes cuts off
    return top.astype(np.uint8).reshape(images.shape)


def _random_maps(
    n: int, size: tuple[int, int], rng: np.random.Generator, recipe: Recipe
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrices (N, 2, 2) and shifts (N, 2), in pixels, in (row, column) order."""
    angle, shear = np.radians(rng.uniform(-1, 1, (2, n)) * [[recipe.rotation], [recipe.shear]])
    zoom = rng.uniform(1 - recipe.zoom, 1 + recipe.zoom, (n, 2))
    shift = rng.uniform(-recipe.shift, recipe.shift, (n, 2)) * size
    if recipe.whole_pixels:
        shift = np.rint(shift)
    mirror = np.where(rng.random(n) < 0.5 * recipe.flip, -1.0, 1.0)

    def stack(*rows: tuple[NDArray[np.float64], NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    zero, one = np.zeros(n), np.ones(n)
    rotation = stack((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))
    shearing = stack((one, -np.sin(shear)), (zero, np.cos(shear)))
    zooming = stack((zoom[:, 0], zero), (zero, zoom[:, 1]))
    mirroring = stack((one, zero), (zero, mirror))
    matrix = rotation @ shearing @ zooming @ mirroring
    shift = (rotation @ shift[:, :, None])[:, :, 0]
    return matrix.astype(np.float32), shift.astype(np.float32)
