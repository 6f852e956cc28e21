"""What the original does to the pixels of images: ranges, colours, sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Images = NDArray[np.float32]

# CIE 1931 tristimulus values of linear sRGB, each row divided by the white point D65's.
_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
) / np.array([[0.95047], [1.0], [1.08883]])


def scaled(images: ArrayLike, lab: bool, bipolar: bool) -> Images:
    """Images of 0 to 255, in the networks' range.

    Args:
        images: (..., H, W, C).
        lab: whether to convert from sRGB to CIE LAB.
        bipolar: x / 64 - 2, in LAB (L / 25 - 2, a / 50, b / 50); else x / 255, in LAB
            (L / 100, a / 200 + 0.5, b / 200 + 0.5).

    Returns:
        The same shape, float32.

    Raises:
        ValueError: if ``lab`` is asked of images that have not three channels.
    """
    x = np.asarray(images, np.float32)
    if not lab:
        return x / np.float32(64) - np.float32(2) if bipolar else x / np.float32(255)
    if bipolar:
        return (to_lab(x) / (25, 50, 50) - (2, 0, 0)).astype(np.float32)
    return (to_lab(x) / (100, 200, 200) + (0, 0.5, 0.5)).astype(np.float32)


def to_lab(images: Images) -> NDArray[np.floating[Any]]:
    """From sRGB of 0 to 255 to CIE LAB under D65, (..., 3) to the same shape."""
    if images.shape[-1] != 3:
        raise ValueError(f"lab=True: the images have {images.shape[-1]} channels, not 3")
    rgb = images / np.float32(255)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def grey(images: Images) -> Images:
    """Each pixel's channels replaced by their mean."""
    return np.broadcast_to(images.mean(axis=-1, keepdims=True), images.shape)


def nearest(images: Array, height: int, width: int) -> Array:
    """Images (..., H, W, C) resized to (..., height, width, C), pixel by pixel."""
    rows = np.arange(height) * images.shape[-3] // height
    columns = np.arange(width) * images.shape[-2] // width
    return images[..., rows[:, None], columns, :]


def cropped(images: Array, share: float) -> Array:
    """The middle of images (..., H, W, C) without this share of both sizes, at their size."""
    height, width = images.shape[-3:-1]
    top, left = int(height * share / 2), int(width * share / 2)
    return nearest(images[..., top : height - top, left : width - left, :], height, width)


def flipped(images: Array, horizontally: bool, vertically: bool) -> dict[str, Array]:
    """Images (..., H, W, C) as they are, and their flips by "h", "v" and, if both, "hv"."""
    copies = {"": images}
    if horizontally:
        copies["h"] = np.flip(images, -2)
    if vertically:
        copies |= {f"{name}v": np.flip(copy, -3) for name, copy in copies.items()}
    return copies
