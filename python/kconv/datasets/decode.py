"""Image files to pixels: RGB of 8 bits, as a viewer shows them.

Photographs are turned as their EXIF orientation says; of several frames or pages the first is
taken; transparency is dropped, and the colours below it stay, as they do in PyTorch's and Keras's
loaders. Grey images of 16 bits are scaled from 0..65535 to 0..255, and images of floats from 0..1;
wider integers count as 16 bits and wider floats are refused, as nothing says what their white is.
"""

from __future__ import annotations

import importlib
import io
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kconv._require import require

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = {
    "Avif": (".avif",),
    "Bmp": (".bmp",),
    "Gif": (".gif",),
    "Jpeg": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "Png": (".png",),
    "Ppm": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "Tiff": (".tif", ".tiff"),
    "WebP": (".webp",),
}
"""Names of Pillow's plugins, without which nothing is decoded, and their files' suffixes."""

IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in _FORMATS.values() for suffix in suffixes))
OTHER_IMAGE_SUFFIXES = (".heic", ".heif", ".j2k", ".jp2", ".jxl", ".psd", ".svg", ".tga")
"""Of images that are not read: nothing in a class should be left out without a word."""
_PHOTOMETRIC = 262
"""TIFF's tag that says whether 0 is black."""
INTERPOLATIONS = ("bilinear", "nearest")


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ImportError: Pillow is not installed.
    """
    return require("PIL.Image", "pillow", "decoding and resizing images")


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats of ``IMAGE_SUFFIXES``, of those that this Pillow has.

    Image.open without them tries all that Pillow knows, of which EPS starts another program.

    Returns:
        What Image.open takes as ``formats``; AVIF came late, and any may be left out of a build.

    Raises:
        ImportError: Pillow is not installed.
    """
    for name in _FORMATS:
        try:
            importlib.import_module(f"PIL.{name}ImagePlugin")
        except ImportError:
            continue
    return tuple(name.upper() for name in _FORMATS if name.upper() in pillow().OPEN)


def decode(data: bytes) -> Image.Image:
    """Decode an image file, in any of the formats of ``IMAGE_SUFFIXES`` whatever its name.

    Args:
        data: The file's contents.

    Returns:
        The picture, in mode "RGB".

    Raises:
        ValueError: It is no such image, is damaged, has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or has values whose range is unknown.
    """
    library = pillow()
    from PIL import ImageOps, UnidentifiedImageError

    try:
        picture: Image.Image = library.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(formats())}, or is damaged") from None
    width, height = picture.size
    if library.MAX_IMAGE_PIXELS is not None and width * height > library.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"it has {width}x{height} pixels; PIL.Image.MAX_IMAGE_PIXELS allows "
            f"{library.MAX_IMAGE_PIXELS:,}"
        )
    picture.load()
    with suppress(Exception):  # damaged EXIF data are no reason to lose the picture
        ImageOps.exif_transpose(picture, in_place=True)
    return eight_bits(picture).convert("RGB")


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture whose conversion to "L" or "RGB" neither clips values nor warns.

    Raises:
        ValueError: Its values' range is unknown.
    """
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        # Of these, Pillow does not turn over those whose white is 0.
        turned = picture.format == "TIFF" and picture.getexif().get(_PHOTOMETRIC) == 0
        return pillow().fromarray(_to_bytes(np.asarray(picture), turned))
    if picture.mode == "P" and "transparency" in picture.info:
        return picture.convert("RGBA")  # else Pillow warns
    return picture


def _to_bytes(values: NDArray[Any], turned: bool) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits, scaled to bytes; ``turned`` tells that 0 is white."""
    white = 1 if values.dtype.kind == "f" else 65535
    least, most = values.min(), values.max()
    if not (least >= 0 and most <= white):  # NaN is neither
        raise ValueError(f"its values go from {least} to {most}; expected 0 to {white}")
    scaled = np.rint(values * (255 / white)).astype(np.uint8)
    return 255 - scaled if turned else scaled


def resize(picture: Image.Image, size: int, interpolation: str) -> Image.Image:
    """A picture of this height and width, whatever its proportions were."""
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), pillow().Resampling[interpolation.upper()])
