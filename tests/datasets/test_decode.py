"""Images to pixels: which formats, which ranges, which way up."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from kconv.datasets.decode import decode
from kconv.datasets.images import decode_all

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["BMP", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_formats(kind: str) -> None:
    if kind in ("AVIF", "WEBP") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    plain = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(encoded(Image.fromarray(plain), kind, **options))
    tolerance = 4 if kind in ("AVIF", "JPEG") else 0
    assert np.abs(found.astype(int) - plain).max() <= tolerance


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "SGI", "TGA", "PDF"])
def test_other_formats_are_not_tried(kind: str) -> None:
    """A file of images by its name only; EPS would start another program."""
    with pytest.raises(ValueError, match="it is none of AVIF, BMP"):
        decode(encoded(Image.fromarray(RGB), kind))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    values = np.array([[0, 1, 128, 129, 256], [385, 386, 32767, 65534, 65535]], np.uint16)
    found = pixels(encoded(Image.fromarray(values), kind))
    expected = [[round(int(v) / 257) for v in row] for row in values]
    assert found[..., 0].tolist() == expected
    assert (found == found[..., :1]).all()


def test_16_bit_grey_of_the_other_byte_order() -> None:
    values = np.array([[0, 256, 65535]], ">u2")
    found = pixels(encoded(Image.frombytes("I;16B", (3, 1), values.tobytes()), "TIFF"))
    assert found[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("white", [0, 1])
def test_16_bit_tiff_whose_white_is_0(white: int) -> None:
    pixels_16 = struct.pack("<3H", 0, 256, 65535)
    tags = {256: 3, 257: 1, 258: 16, 259: 1, 262: white, 273: 8, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 14)
    data = header + pixels_16 + struct.pack("<H", len(tags)) + entries + bytes(4)
    expected = [0, 1, 255] if white else [255, 254, 0]
    assert pixels(data)[0, :, 0].tolist() == expected


def test_floats_are_scaled_from_0_to_1() -> None:
    values = np.array([[0, 0.001, 0.1, 0.5, 0.999, 1]], np.float32)
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert found[0, :, 0].tolist() == [round(float(v) * 255) for v in values[0]]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 1.5]], np.float32),
        np.array([[-0.5, 1]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, 65536]], np.int32),
        np.array([[-1, 5]], np.int32),
    ],
)
def test_values_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"its values go from .*; expected 0 to (1|65535)"):
        decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation(kind: str, orientation: int) -> None:
    """The EXIF standard: where row 0 and column 0 of what is stored are to be seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(encoded(Image.fromarray(RGB), kind, exif=exif))
    stored = RGB.transpose(1, 0, 2) if orientation >= 5 else RGB
    rows_turned = orientation in (3, 4, 7, 8)
    columns_turned = orientation in (2, 3, 6, 7)
    np.testing.assert_array_equal(
        found, stored[:: -1 if rows_turned else 1, :: -1 if columns_turned else 1]
    )


def test_damaged_exif_does_not_matter() -> None:
    found = pixels(encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0nothing"))
    np.testing.assert_array_equal(found, RGB)


def test_alpha_is_dropped_and_palettes_are_looked_up() -> None:
    rgba = np.dstack([RGB, RNG.integers(0, 256, (5, 7), np.uint8)])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba), "PNG")), RGB)
    few = RGB // 128 * 255
    palette = Image.fromarray(few).quantize(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(encoded(palette, "PNG", transparency=bytes(range(8))))
    np.testing.assert_array_equal(found, few)
    bits = RGB[..., 0] > 99
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits), "PNG"))[..., 2], bits * 255)


def test_cmyk() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixels(encoded(cmyk, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert np.abs(pixels(encoded(cmyk, "JPEG"))[0, 0].astype(int) - [255, 0, 0]).max() <= 4


def test_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "TIFF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header alone says so."""
    data = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    data[18:26] = struct.pack("<ii", 30000, 3000)
    with pytest.raises(ValueError, match="it has 30000x3000 pixels; PIL"):
        decode(bytes(data))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with pytest.raises(ValueError, match="it has 7x5 pixels"):
        decode(encoded(Image.fromarray(RGB), "PNG"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_damaged_files_are_refused_or_decoded(kind: str) -> None:
    rng = np.random.default_rng(1)
    data = encoded(Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)), kind)
    contents = [data[:length] for length in (0, 1, 10, len(data) // 2)]
    for _ in range(100):
        content = bytearray(data)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            content[position] = rng.integers(256)
        contents.append(bytes(content))
    for number, content in enumerate(contents):
        try:
            found = decode_all(Path("x"), iter([("1", content)]), ["1"], size=4)
        except ValueError as error:
            assert str(error).startswith("x: 1 is not a readable image: ")  # noqa: PT017
        else:
            assert number > 3, "it was cut"
            assert found.shape == (1, 4, 4, 3)
