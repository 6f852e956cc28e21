"""Images from files, from folders, and to files."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

import kconv.cai as cai

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 8, 6, 3), np.uint8)
LABELS = np.arange(20) % 3


def test_saved_images(tmp_path) -> None:
    save = cai.datasets.save_dataset_as_png
    save(IMAGES, np.eye(3)[LABELS], tmp_path / "png", True, True)
    assert len(list((tmp_path / "png").rglob("*.png"))) == 80
    blue_first = IMAGES[4, ..., ::-1]
    flips = {
        "img": blue_first,
        "h_img": blue_first[:, ::-1],
        "v_img": blue_first[::-1],
        "hv_img": blue_first[::-1, ::-1],
    }
    for name, expected in flips.items():
        found = Image.open(tmp_path / f"png/class_1/{name}_4.png")
        np.testing.assert_array_equal(found, expected)
    save(IMAGES - 0.3, LABELS[:, None], tmp_path / "numbers")  # rounded, not cut
    np.testing.assert_array_equal(
        Image.open(tmp_path / "numbers/class_1/img_4.png"), np.maximum(blue_first, 0)
    )
    cai.datasets.save_dataset_as_jpg(IMAGES[..., :1], LABELS, tmp_path / "jpg")
    assert Image.open(tmp_path / "jpg/class_0/img_0.jpg").format == "JPEG"
    cai.datasets.save_dataset_in_format(IMAGES[..., 0], LABELS, tmp_path / "tif", ".tif")
    np.testing.assert_array_equal(Image.open(tmp_path / "tif/class_2/img_2.tif"), IMAGES[2, ..., 0])
    pairs = [{"image": IMAGES[0], "label": 7}, (IMAGES[1], np.int64(7))]
    cai.datasets.save_tfds_as_png(pairs, tmp_path / "tfds", with_vertical_flip=True)
    assert len(list((tmp_path / "tfds/class_7").iterdir())) == 4
    np.testing.assert_array_equal(Image.open(tmp_path / "tfds/class_7/img_0.png"), IMAGES[0])


@pytest.mark.parametrize(
    ("images", "labels", "ending", "message"),
    [
        (IMAGES, LABELS[:3], ".png", "20 images do not go with 3 labels"),
        (IMAGES, LABELS, ".txt", r"format='\.txt' is no ending of image files"),
        (IMAGES[0, 0], LABELS[:6], ".png", r"aImages of shape \(6, 3\) and aClasses"),
        (IMAGES, np.zeros((20, 3, 1)), ".png", r"aClasses of shape \(20, 3, 1\)"),
        (IMAGES[..., :2], LABELS, ".png", r"image 0 has shape \(8, 6, 2\)"),
    ],
)
def test_what_cannot_be_saved(images, labels, ending: str, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        cai.datasets.save_dataset_in_format(images, labels, tmp_path, ending)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((2, 5), slice(1, 3), slice(0, 5)), ((5, 2), slice(0, 5), slice(1, 3)), ((3, 3), ..., ...)],
)
def test_padding_to_a_square(shape, rows, columns) -> None:
    image = RNG.random((*shape, 3))
    square = cai.datasets.add_padding_to_make_img_array_squared(image)
    assert square.shape == (max(shape), max(shape), 3)
    found = square if rows is ... else square[rows, columns]
    np.testing.assert_array_equal(found, image)
    assert square.sum() == pytest.approx(image.sum())
    with pytest.raises(ValueError, match=r"img has shape \(2, 3\)"):
        cai.datasets.add_padding_to_make_img_array_squared(image[0, :2])


def test_images_from_files(tmp_path) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[1, ..., 0]).save(tmp_path / "grey.png")
    load = cai.datasets.load_images_from_files
    image, grey = load([tmp_path / "a.png", str(tmp_path / "grey.png")], (8, 6))
    np.testing.assert_array_equal(image, IMAGES[0])
    np.testing.assert_array_equal(grey, np.repeat(IMAGES[1, ..., :1], 3, axis=2))
    assert image.dtype == np.float32
    (square,) = load([tmp_path / "a.png"], (16, 16), "float64", smart_resize=True)
    assert square.dtype == np.float64
    assert not square[:, :2].any()
    assert not square[:, 14:].any()
    np.testing.assert_array_equal(square[::2, 2:14:2], IMAGES[0])

    class Dataset:
        @staticmethod
        def load_data():
            return (IMAGES[:1], LABELS[:1]), (IMAGES[:1], LABELS[:1])

    for lab in (False, True):
        for bipolar in (False, True):
            (found,) = load([tmp_path / "a.png"], (8, 6), lab=lab, rescale=True, bipolar=bipolar)
            expected = cai.datasets.load_dataset(Dataset, lab=lab, bipolar=bipolar)[0][0]
            np.testing.assert_allclose(found, expected, atol=1e-6)
    (lab_image,) = load([tmp_path / "a.png"], (8, 6), lab=True)
    np.testing.assert_allclose((lab_image / (25, 50, 50)) - (2, 0, 0), expected, atol=1e-5)
    with pytest.raises(ValueError, match="dtype='uint8' cannot hold rescaled"):
        load([tmp_path / "a.png"], dtype="uint8", rescale=True)


@pytest.fixture
def folder(tmp_path):
    """Ten images of "a" and five of "b", whose first pixel is their number; and other files."""
    for name, count, suffix in (("b", 5, ".JPG"), ("a", 10, ".png")):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (3, 4), (10 * number, 0, 0)).save(
                tmp_path / name / f"{number}{suffix}", quality=100
            )
    (tmp_path / "a" / "readme.txt").write_text("no image")
    (tmp_path / "list.txt").write_text("no class")
    return tmp_path


def test_images_from_folders(folder, capsys) -> None:
    load = cai.datasets.load_images_from_folders
    train_x, val_x, test_x, train_y, val_y, test_y, weights, classes = load(
        3, folder, target_size=(4, 3)
    )
    assert classes == ["a", "b"]
    assert [part.shape for part in (train_x, val_x, test_x)] == [
        (6 + 3, 4, 3, 3),
        (2 + 1, 4, 3, 3),
        (2 + 1, 4, 3, 3),
    ]
    assert [part.sum(axis=0).tolist() for part in (train_y, val_y, test_y)] == [
        [6, 3],
        [2, 1],
        [2, 1],
    ]
    assert weights == {0: 9 / (2 * 6), 1: 9 / (2 * 3)}
    assert "2 classes: a, b" in capsys.readouterr().out
    order = list(range(10))
    random.Random(3).shuffle(order)
    found = [part[y[:, 0] == 1, 0, 0, 0] * 25.5 for part, y in ((train_x, train_y), (val_x, val_y))]
    np.testing.assert_allclose(np.concatenate(found), order[:8], atol=1e-4)
    assert capsys.readouterr().out == ""


def test_shares_and_unwanted_parts(folder) -> None:
    load = cai.datasets.load_images_from_folders
    options = {"verbose": False, "target_size": (4, 3), "bipolar": True}
    *arrays, weights, _ = load(
        1, folder, training_size=0.5, validation_size=0.2, test_size=0.1, **options
    )
    assert [len(part) for part in arrays] == [5 + 2, 2 + 1, 1 + 1, 5 + 2, 2 + 1, 1 + 1]
    assert arrays[0].min() == -2
    train_x, val_x, test_x, train_y, *_, weights, _ = load(
        1, folder, has_training=False, has_validation=False, **options
    )
    assert (train_x.shape, val_x.shape, train_y.shape) == ((0, 4, 3, 3), (0, 4, 3, 3), (0, 2))
    assert len(test_x) == 3
    assert weights is None


def test_what_is_no_folder_of_classes(folder) -> None:
    load = cai.datasets.load_images_from_folders
    with pytest.raises(ValueError, match="root_dir=None"):
        load()
    with pytest.raises(ValueError, match=r"test_size=0\.5 are no shares of 1"):
        load(root_dir=folder, test_size=0.5)
    with pytest.raises(ValueError, match="has no folders of classes"):
        load(root_dir=folder / "a")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="the class 'empty' has no"):
        load(root_dir=folder)
