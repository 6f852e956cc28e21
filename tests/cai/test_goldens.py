"""The helpers of kconv.cai beside what the original made of the same inputs."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

import kconv.cai as cai

GOLDENS = np.load(Path(__file__).parents[1] / "data" / "cai_goldens.npz")


def same(found, name: str) -> None:
    expected = GOLDENS[name]
    assert np.shape(found) == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)


class Images:
    """What the original was given as a data set."""

    @staticmethod
    def load_data():
        rng = np.random.default_rng(1)
        return tuple(
            (
                rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
                (np.arange(count) % 3)[:, None],
            )
            for count in (12, 6)
        )


X, Y, *_ = cai.datasets.load_dataset(Images, bipolar=False)


def test_pictures() -> None:
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(5, 5, 3, 64)) * 0.1).astype(np.float32)
    image = np.maximum(rng.normal(size=(6, 6, 64)), 0).astype(np.float32)
    util = cai.util
    same(util.show_neuronal_patterns(weights, NumRows=4, NumCols=16, ForceCellMax=True), "patterns")
    same(util.show_neuronal_patterns(weights, NumRows=8, NumCols=8), "patterns_raw")
    same(util.slice_3d_into_2d(image, 4, 16), "channels")
    same(util.slice_3d_into_2d(image, 8, 8, ForceCellMax=True), "channels_max")


@pytest.fixture(scope="module")
def models() -> tuple[keras.Model, keras.Model]:
    """A classifier, and a convolution of images of any size, with the original's weights."""
    layers = keras.layers
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(8, 3, padding="same", name="last_conv_layer")(x)
    y = layers.Dense(3, name="dense")(layers.GlobalAveragePooling2D()(y))
    classifier = keras.Model(x, layers.Activation("softmax")(y))
    x = keras.Input((None, None, 3))
    convolution = keras.Model(x, layers.Conv2D(4, 3, padding="same", activation="relu")(x))
    rng = np.random.default_rng(2)
    for model in (classifier, convolution):
        model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.weights])
    return classifier, convolution


def test_looking_into_a_model(models) -> None:
    classifier, _ = models
    heat_map = cai.models.calculate_heat_map_from_dense_and_avgpool
    same(heat_map(X[0], 1, classifier, "last_conv_layer", "dense"), "heat_map")
    same(cai.models.PartialModelPredict(X[:2], classifier, "last_conv_layer", True), "pooled")


def test_gradient_ascent(models) -> None:
    _, model = models
    rng = np.random.default_rng(2)
    for shape in [(3, 3, 3, 8), 8, (8, 3), 3, (3, 3, 3, 4), 4]:
        rng.normal(size=shape)
    image = (rng.random((20, 24, 3)) * 2 - 1).astype(np.float32)
    ascent = cai.gradientascent
    same(float(ascent.calc_sum_channel_mean_from_model(image, model)), "mean")
    same(ascent.run_gradient_ascent(image, model, steps=5, step_size=0.1), "ascent")
    same(ascent.run_gradient_ascent_octaves(image, model, steps=2), "octaves")


def test_changed_images() -> None:
    seen = []

    class Model:
        def predict(self, images, verbose):
            seen.append(np.array(images))
            return images[:, 0, 0]

    cai.datasets.test_flips_on_model(X, Y, Model(), center_crop=0.25)
    np.testing.assert_array_equal(seen[0], X)
    np.testing.assert_array_equal(seen[1], X[:, :, ::-1])
    np.testing.assert_array_equal(seen[2], X[:, ::-1])
    same(seen[3], "crop")
    same(seen[4], "grey")


def test_saved_files(tmp_path) -> None:
    cai.datasets.save_dataset_in_format(255 * X, Y, tmp_path, ".png", True, True)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == GOLDENS["files"].tolist()
