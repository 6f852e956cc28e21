"""Data sets, the image generator, and pictures of filters."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kconv.cai as cai

RNG = np.random.default_rng(0)


class Dataset:
    """Two classes of small colour images; labels as Keras's CIFAR-10 has them."""

    @staticmethod
    def load_data():
        images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
        labels = np.arange(30).reshape(-1, 1) % 3
        return (images[:20], labels[:20]), (images[20:], labels[20:])


class GreyDataset:
    @staticmethod
    def load_data():
        images = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
        return (images, np.arange(6) % 2), (images, np.arange(6) % 2)


def test_load_dataset(capsys) -> None:
    (images, labels), _ = Dataset.load_data()
    x, y, x_test, y_test = cai.datasets.load_dataset(Dataset, verbose=True)
    assert "x_train: (20, 8, 8, 3)" in capsys.readouterr().out
    np.testing.assert_array_equal(x, images.astype(np.float32) / 64 - 2)
    np.testing.assert_array_equal(y, np.eye(3)[labels.ravel()])
    assert x.dtype == np.float32
    assert (x_test.shape, y_test.shape) == ((10, 8, 8, 3), (10, 3))
    x = cai.datasets.load_dataset(Dataset, bipolar=False)[0]
    np.testing.assert_allclose(x, images / 255, rtol=1e-6)
    assert cai.datasets.load_dataset(GreyDataset)[0].shape == (6, 4, 4, 1)
    with pytest.raises(ValueError, match="have 1 channels, not 3"):
        cai.datasets.load_dataset(GreyDataset, lab=True)


def test_lab() -> None:
    """Red, green, blue, white and black in CIE LAB (D65), from the tables."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3], np.uint8)
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    expected = np.array([*expected, [100, 0, 0], [0, 0, 0]])

    class Colours:
        @staticmethod
        def load_data():
            images = colours.reshape(5, 1, 1, 3)
            return (images, np.arange(5)), (images, np.arange(5))

    x = cai.datasets.load_dataset(Colours, lab=True)[0].reshape(5, 3)
    np.testing.assert_allclose((x - (-2, 0, 0)) * (25, 50, 50), expected, atol=0.03)
    x = cai.datasets.load_dataset(Colours, lab=True, bipolar=False)[0].reshape(5, 3)
    np.testing.assert_allclose((x - (0, 0.5, 0.5)) * (100, 200, 200), expected, atol=0.03)


def test_validation_is_the_first_share() -> None:
    x, y, *_ = cai.datasets.load_dataset(Dataset)
    parts = cai.datasets.load_dataset_with_validation(
        Dataset,
        validation_size=0.1,
        validation_flip_horizontal=True,
        validation_flip_vertical=True,
    )
    np.testing.assert_array_equal(parts[0], x[2:])
    np.testing.assert_array_equal(parts[1], y[2:])
    mirrored = x[:2, :, ::-1]
    expected = np.concatenate([x[:2], mirrored, x[:2, ::-1], mirrored[:, ::-1]])
    np.testing.assert_array_equal(parts[2], expected)
    np.testing.assert_array_equal(parts[3], np.concatenate([y[:2]] * 4))
    assert [len(part) for part in parts[4:]] == [10, 10]
    with pytest.raises(ValueError, match=r"validation_size=1\.5"):
        cai.datasets.load_dataset_with_validation(Dataset, validation_size=1.5)


class Constant:
    """Predicts the mean of the left half against that of the right."""

    def predict(self, images, verbose):
        half = images.shape[2] // 2
        return np.stack(
            [images[:, :, :half].mean((1, 2, 3)), images[:, :, half:].mean((1, 2, 3))], 1
        )


def test_flips(capsys) -> None:
    images = np.zeros((4, 8, 8, 3))
    images[:2, :, :4] = 1
    images[2:, :, 4:] = 1
    labels = np.eye(2)[[0, 0, 1, 1]]
    cai.datasets.test_flips_on_model(images, labels, Constant(), center_crop=0.15)
    reports = capsys.readouterr().out.split("Test ")[1:]
    accuracies = {
        report.partition(":")[0]: float(report.rpartition("accuracy ")[2]) for report in reports
    }
    assert list(accuracies) == [
        "Original",
        "Flipped X",
        "Original + Flipped X",
        "Flipped Y",
        "Original + Flipped Y",
        "Original + Flipped X + Flipped Y",
        "Center Crop",
        "Original + Center Crop",
        "Original + Flipped X + Center Crop",
        "Black and White",
        "Original + Black and White",
        "Original + Flipped X + Black and White",
    ]
    assert accuracies["Original"] == accuracies["Center Crop"] == 1
    assert accuracies["Flipped X"] == 0
    assert accuracies["Original + Flipped X + Flipped Y"] == 1
    names = ["cat", "dog"]
    cai.datasets.test_flips_on_model(images, labels, Constant(), False, False, class_names=names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == names
    cai.datasets.test_flips_on_model(images, labels, Constant(), False, False, False)
    assert capsys.readouterr().out.count("Test ") == 1
    with pytest.raises(ValueError, match="center_crop=1"):
        cai.datasets.test_flips_on_model(images, labels, Constant(), center_crop=1)


def test_generator_without_augmentation() -> None:
    x, y = RNG.random((5, 4, 4, 3), np.float32), np.arange(5)
    generator = cai.util.create_image_generator_no_augmentation(rescale=2.0)
    batches = generator.flow(x, y, batch_size=2, shuffle=False, sample_weight=y)
    assert (len(batches), batches.n) == (3, 5)
    np.testing.assert_allclose(batches[2][0], 2 * x[4:])
    np.testing.assert_array_equal(batches[2][1], [4])
    np.testing.assert_array_equal(batches[2][2], [4])
    seen = [next(batches)[1].tolist() for _ in range(4)]
    assert seen == [[0, 1], [2, 3], [4], [0, 1]]
    with pytest.raises(IndexError):
        batches[3]


def test_shuffling_is_reproducible_and_changes() -> None:
    x = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
    generator = cai.util.create_image_generator_no_augmentation()

    def epochs(seed):
        batches = generator.flow(x, batch_size=50, seed=seed)
        first = batches[0].ravel().tolist()
        batches.on_epoch_end()
        return first, batches[0].ravel().tolist()

    first, second = epochs(3)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))
    assert epochs(3) == (first, second)
    assert epochs(4) != (first, second)


def test_subsets() -> None:
    x = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    generator = cai.util.create_image_generator_no_augmentation(validation_split=0.3)
    validation = generator.flow(x, shuffle=False, subset="validation")[0]
    training = generator.flow(x, shuffle=False, subset="training")[0]
    assert validation.ravel().tolist() == [0, 1, 2]
    assert training.ravel().tolist() == [3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="subset='test'"):
        generator.flow(x, subset="test")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width_shift_range": 1.0}, "columns"),
        ({"height_shift_range": 1.0}, "rows"),
        ({"horizontal_flip": True}, "mirror"),
        ({"vertical_flip": True}, "mirror"),
        ({"channel_shift_range": 0.5}, "colours"),
        ({"rotation_range": 30, "shear_range": 10, "zoom_range": (0.8, 0.9)}, "anything"),
    ],
)
def test_augmentation(options, expected: str) -> None:
    defaults = {
        "rotation_range": 0,
        "width_shift_range": 0,
        "height_shift_range": 0,
        "shear_range": 0,
        "zoom_range": 0,
        "horizontal_flip": False,
    }
    generator = cai.util.create_image_generator(**{**defaults, **options})
    image = RNG.random((9, 7, 3), np.float32)
    changed = [generator.random_transform(image, seed) for seed in range(8)]
    assert any(not np.allclose(each, image) for each in changed)
    for each in changed:
        assert each.shape == image.shape
        assert each.min() >= image.min() - 1e-6
        assert each.max() <= image.max() + 1e-6
        if expected == "mirror":
            axis = 1 if "horizontal_flip" in options else 0
            assert (each == image).all() or (each == np.flip(image, axis)).all()
    still = cai.util.create_image_generator(**defaults)
    np.testing.assert_array_equal(still.random_transform(image), image)


@pytest.mark.parametrize(
    ("shift", "allowed"),
    [(2, {-1, 0, 1}), ([3], {-3, 3}), ((0.25, 0.5), {-4, -2, 2, 4}), (0, {0})],
)
def test_shifts_by_certain_pixels(shift, allowed: set[int]) -> None:
    """Keras's meaning of integers and sequences: one of these numbers of pixels, or shares."""
    image = np.zeros((9, 8, 1), np.float32)
    image[4, 4] = 1
    options = {"rotation_range": 0, "shear_range": 0, "zoom_range": 0, "horizontal_flip": False}
    generator = cai.util.create_image_generator(
        width_shift_range=shift, height_shift_range=0, fill_mode="constant", **options
    )
    moved = [generator.random_transform(image, seed) for seed in range(30)]
    places = [np.argwhere(each[..., 0] == 1) for each in moved]
    assert {int(row) for place in places for row, _ in place} == {4}
    assert {int(column) - 4 for place in places for _, column in place} == allowed - {4}


def test_colours_shift_together_and_columns_lean() -> None:
    image = RNG.random((8, 8, 3), np.float32) / 4 + 0.5
    image[0, 0], image[0, 1] = 0, 1
    still = {"rotation_range": 0, "width_shift_range": 0, "height_shift_range": 0.0}
    still |= {"zoom_range": 0, "horizontal_flip": False}
    colours = cai.util.create_image_generator(channel_shift_range=0.1, shear_range=0, **still)
    added = (colours.random_transform(image, 1) - image)[1:]
    np.testing.assert_allclose(added, added[0, 0, 0], atol=1e-6)
    rows = np.repeat(np.arange(8, dtype=np.float32), 8).reshape(8, 8, 1)
    leaning = cai.util.create_image_generator(shear_range=20, **still).random_transform(rows, 1)
    np.testing.assert_allclose(leaning, leaning[:, :1].repeat(8, axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "row"),
    [
        ("nearest", [1, 1, 1, 2]),
        ("constant", [9, 9, 1, 2]),
        ("reflect", [2, 1, 1, 2]),
        ("wrap", [3, 4, 1, 2]),
    ],
)
def test_fill_modes(mode: str, row: list[int]) -> None:
    """An image that is moved two pixels to the right."""
    generator = cai.util.create_image_generator(fill_mode=mode, cval=9)
    image = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 4, 1)
    moved = generator._warped(image, np.eye(2)[None], np.array([[0, -2]]))
    assert moved.ravel().tolist() == row


def test_rotation_by_a_right_angle() -> None:
    generator = cai.util.create_image_generator()
    image = RNG.random((1, 5, 5, 2)).astype(np.float32)
    turn = np.array([[[0.0, -1.0], [1.0, 0.0]]])
    turned = generator._warped(image, turn, np.zeros((1, 2)))
    expected = np.rot90(image[0], -1)
    assert np.allclose(turned[0], expected, atol=1e-5) or np.allclose(
        turned[0], np.rot90(image[0]), atol=1e-5
    )


def test_statistics() -> None:
    x = RNG.random((200, 3, 3, 2)).astype(np.float32) * 7 + 1
    generator = cai.util.create_image_generator_no_augmentation(
        featurewise_center=True, featurewise_std_normalization=True
    )
    with pytest.raises(ValueError, match="need fit"):
        generator.standardize(x)
    generator.fit(x)
    z = generator.standardize(x)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=1e-4)
    scaled = cai.util.create_image_generator_no_augmentation(rescale=0.1, featurewise_center=True)
    scaled.fit(x)
    np.testing.assert_allclose(scaled.standardize(x).mean((0, 1, 2)), 0, atol=1e-5)
    with pytest.warns(UserWarning, match="featurewise_center=True comes with"):
        alone = cai.util.create_image_generator_no_augmentation(featurewise_std_normalization=True)
    alone.fit(x)
    np.testing.assert_allclose(alone.standardize(x), z, atol=1e-5)
    sample = cai.util.create_image_generator_no_augmentation(
        samplewise_center=True, samplewise_std_normalization=True
    ).standardize(x)
    np.testing.assert_allclose(sample.mean((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(sample.std((1, 2, 3)), 1, atol=1e-3)
    whitening = cai.util.create_image_generator_no_augmentation(
        featurewise_center=True, zca_whitening=True, zca_epsilon=1e-8
    )
    whitening.fit(x)
    white = whitening.standardize(x).reshape(200, -1)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(18), atol=0.02)
    twice = cai.util.create_image_generator_no_augmentation(
        preprocessing_function=lambda image: image + 1, rescale=0.5
    )
    np.testing.assert_allclose(twice.standardize(x[0]), (x[0] + 1) / 2, rtol=1e-6)


def test_channels_first() -> None:
    x = RNG.random((3, 2, 5, 4)).astype(np.float32)
    first = cai.util.create_image_generator(data_format="channels_first")
    last = cai.util.create_image_generator(data_format="channels_last")
    a = first.flow(x, shuffle=False, seed=5)[0]
    b = last.flow(x.transpose(0, 2, 3, 1), shuffle=False, seed=5)[0]
    np.testing.assert_array_equal(a, b.transpose(0, 3, 1, 2))


def test_flow_from_directory(tmp_path) -> None:
    (images, labels), _ = Dataset.load_data()
    cai.datasets.save_dataset_as_png(images[..., ::-1], labels, tmp_path)
    generator = cai.util.create_image_generator_no_augmentation(validation_split=0.2)
    batches = generator.flow_from_directory(
        tmp_path, target_size=(8, 8), batch_size=6, shuffle=False
    )
    assert batches.class_indices == {"class_0": 0, "class_1": 1, "class_2": 2}
    assert (batches.samples, batches.num_classes, len(batches)) == (20, 3, 4)
    x, y = batches[0]
    assert (x.shape, y.shape) == ((6, 8, 8, 3), (6, 3))
    number = int(batches.filenames[0].partition("img_")[2].partition(".")[0])
    np.testing.assert_array_equal(x[0], images[number])
    grey = generator.flow_from_directory(
        tmp_path,
        (4, 5),
        color_mode="grayscale",
        class_mode="sparse",
        classes=["class_2", "class_0"],
        subset="validation",
        interpolation="bilinear",
    )
    assert grey[0][0].shape == (2, 4, 5, 1)
    assert sorted(grey[0][1]) == [0, 1]
    assert generator.flow_from_directory(tmp_path, (4, 4), class_mode=None)[0].shape[0] == 20
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        generator.flow_from_directory(tmp_path / "empty")
    with pytest.raises(ValueError, match="color_mode='bgr'"):
        generator.flow_from_directory(tmp_path, color_mode="bgr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fill_mode": "mirror"}, "fill_mode='mirror' is not one of nearest, reflect, wrap"),
        ({"zoom_range": 1.0}, "zoom_range=1.0"),
        ({"zoom_range": (0.8, 1, 2)}, r"zoom_range=\(0\.8, 1, 2\)"),
        ({"validation_split": 1}, "validation_split=1"),
        ({"data_format": "NCHW"}, "data_format='NCHW'"),
    ],
)
def test_bad_generators(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cai.util.create_image_generator(**options)


def test_bad_flows() -> None:
    generator = cai.util.create_image_generator()
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 4\)"):
        generator.flow(np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="3 images do not go with 2 labels"):
        generator.flow(np.zeros((3, 4, 4, 1)), np.zeros(2))
    with pytest.raises(ValueError, match="batch_size=0"):
        generator.flow(np.zeros((3, 4, 4, 1)), batch_size=0)


def test_fit_with_a_generator() -> None:
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")]
    )
    model.compile("sgd", "categorical_crossentropy")
    x, y, *_ = cai.datasets.load_dataset(Dataset)
    batches = cai.util.create_image_generator().flow(x, y, batch_size=8)
    history = model.fit(batches, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
