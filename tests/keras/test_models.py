"""Whole models: counts, names, both builds, training."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import kconv.keras
from kconv.models import count, create

ARCHITECTURES = Path(__file__).parents[1] / "data" / "architectures"
SMALL = {"classes": 4, "input_shape": (16, 16, 3)}


def trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@pytest.mark.parametrize(
    ("file", "name", "options"),
    [
        ("kEffNetB0_D6_16ch_224", "keffnet_b0", {"ktype": "D6_16ch"}),
        ("kEffNetB0_D6v3_16ch_32_skip3", "keffnet_b0", {"ktype": 32, "skip_stride_cnt": 3}),
        ("kMobileNet_D6_32ch_224", "kmobilenet", {"ktype": "D6_32ch"}),
        ("kDenseNetBC_L100_D6_12ch_32", "kdensenet_bc_l100", {"ktype": "D6_12ch"}),
    ],
)
def test_architecture(file, name, options):
    original = json.loads((ARCHITECTURES / f"{file}.json").read_text())
    height, width, channels = original["layers"][0]["output_shape"]
    spec = create(name, classes=10, input_shape=(height, width, channels), **options)
    model = kconv.keras.build(spec)
    assert trainable(model) == original["trainable_params"] == count(spec).trainable
    assert model.count_params() == original["total_params"] == count(spec).total
    shapes = {layer.name: layer for layer in model.layers}
    for layer in original["layers"][1:]:
        ours = shapes[layer["name"].replace("/", "_")]
        assert list(ours.output.shape[1:]) == layer["output_shape"], layer["name"]
        assert sorted(map(tuple, layer["weights"].values())) == sorted(
            tuple(w.shape) for w in ours.weights if "seed" not in w.path
        )


def test_keras_kernels_make_the_same_network(gradients):
    spec = create("keffnet_s", ktype="D6_16ch", drop_connect=0.0, dropout=0.0, **SMALL)
    ours, theirs = kconv.keras.build(spec), kconv.keras.build(spec, kernels="keras")
    assert [v.path for v in ours.variables] == [v.path for v in theirs.variables]
    assert {type(layer).__module__.split(".")[0] for layer in theirs.layers} == {"keras"}
    theirs.set_weights(ours.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    expected = theirs.predict(x, verbose=0)
    np.testing.assert_allclose(ours.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)


def test_keras_kernels_with_names_that_keras_would_give():
    """A kDenseNet's layers are called "concatenate", as are the operations of an interleave."""
    keras.utils.clear_session()  # else what was counted before may hide it
    spec = create(
        "kdensenet_bc_l100",
        ktype="D6_12ch",
        classes=3,
        input_shape=(8, 8, 3),
        blocks=1,
    )
    ours = kconv.keras.build(spec)
    keras.utils.clear_session()
    theirs = kconv.keras.build(spec, kernels="keras")
    names = [layer.name for layer in theirs.layers]
    assert "concatenate" in names
    assert len(set(names)) == len(names)
    theirs.set_weights(ours.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    found, expected = (
        keras.ops.convert_to_numpy(model(x, training=False)) for model in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_every_parameter_gets_a_gradient(gradients):
    keras.utils.set_random_seed(0)
    spec = create("keffnet_s", ktype="D6v3_4ch", drop_connect=0.0, **SMALL)
    model = kconv.keras.build(spec)
    x = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    gy = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    _, _, dw = gradients(model, x, gy)
    for variable, gradient in zip(model.trainable_variables, dw, strict=True):
        assert np.isfinite(gradient).all(), variable.path
        assert (gradient != 0).any(), variable.path


def test_training_learns_and_follows_the_seed():
    x = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype(np.float32)
    y = np.arange(16) % 4
    losses = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        spec = create("keffnet_s", ktype="D6_16ch", **SMALL)
        model = kconv.keras.build(spec)
        model.compile("rmsprop", "sparse_categorical_crossentropy")
        losses.append([float(model.train_on_batch(x, y)) for _ in range(4)])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-4)


def test_initial_values_follow_the_initializers():
    keras.utils.set_random_seed(0)
    model = kconv.keras.build(create("keffnet_b0", ktype="D6_16ch", **SMALL))
    top = model.get_layer("k_top_conv_conv")
    glorot = np.sqrt(6 / sum(top.kernel.shape[2:]))
    values = np.asarray(top.get_weights()[0])
    assert 0.99 * glorot < np.abs(values).max() <= glorot
    stem = model.get_layer("k_stem_conv")
    values = np.asarray(stem.get_weights()[0])
    deviation = np.sqrt(2 / (9 * 32))
    assert abs(values.std() / deviation - 1) < 0.1
    assert np.abs(values).max() <= 2 * deviation / 0.879
    assert stem.get_config()["kernel_initializer"]["class_name"] == "VarianceScaling"


def test_unknown_kernels():
    with pytest.raises(ValueError, match="kernels='cuda'"):
        kconv.keras.build(create("keffnet_s", **SMALL), kernels="cuda")


if keras.backend.backend() == "tensorflow":

    def test_networks_in_tensorflow(tmp_path):
        """Exported with kconv's operations, and compiled with TensorFlow's own."""
        import tensorflow as tf

        model = kconv.keras.build(create("keffnet_s", ktype="D6_16ch", **SMALL))
        x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
        expected = model.predict(x, verbose=0)
        model.export(tmp_path, verbose=False)
        saved = tf.saved_model.load(tmp_path)
        np.testing.assert_allclose(saved.serve(x), expected, rtol=1e-5, atol=1e-6)
        compiled = tf.function(lambda x: model(x), jit_compile=True)
        np.testing.assert_allclose(compiled(x), expected, rtol=1e-4, atol=1e-5)
