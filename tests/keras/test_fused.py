"""Networks whose chains of layers run as one operation, beside the same layers one by one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kconv.keras as kk
from kconv.keras.network import _plan
from kconv.models.fusion import Segment


def graph(activation="silu", rate=0.0):
    """A network of all layers that fused segments know, from (N, 9, 9, 4) to (N, 3)."""
    axis = 3 if keras.config.image_data_format() == "channels_last" else 1
    source = keras.Input((9, 9, 4) if axis == 3 else (4, 9, 9))
    x = layers.Conv2D(12, 3, padding="same", use_bias=False)(source)
    x = layers.Activation(activation)(layers.BatchNormalization(axis, momentum=0.5)(x))
    skip = x
    x = kk.PointwiseConv2D(12, groups=3, use_bias=False)(x)
    x = layers.Activation(activation)(layers.BatchNormalization(axis, epsilon=1e-2)(x))
    x = kk.InterleaveChannels(4)(x)
    x = kk.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(axis, scale=False)(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Activation("sigmoid")(kk.PointwiseConv2D(12)(gate))
    x = layers.Multiply()([x, gate])
    x = layers.Dropout(rate, noise_shape=(None, 1, 1, 1))(x)
    x = layers.Add()([x, skip])
    x = layers.Concatenate(axis)([x, kk.CopyChannels(2, 5)(skip)])
    x = kk.DepthwiseConv2D(5, strides=2)(layers.ZeroPadding2D(2)(x))
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(x))
    return source, layers.Dense(3)(x)


def pair(**options):
    keras.utils.set_random_seed(1)
    fused = kk.Network(*graph(**options))
    plain = keras.Model(*graph(**options))
    values = np.random.default_rng(0)
    fused.set_weights([w + 0.1 * values.random(w.shape) for w in fused.get_weights()])
    plain.set_weights(fused.get_weights())
    return fused, plain


def images(count=6):
    shape = (9, 9, 4) if keras.config.image_data_format() == "channels_last" else (4, 9, 9)
    return np.random.default_rng(2).normal(size=(count, *shape)).astype(np.float32)


def numbers(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.fixture(params=["channels_last", "channels_first"])
def data_format(request):
    before = keras.config.image_data_format()
    keras.config.set_image_data_format(request.param)
    yield request.param
    keras.config.set_image_data_format(before)


def test_the_whole_chain_is_fused(data_format):
    fused, _ = pair()
    segment, dense = _plan(fused).parts
    assert isinstance(segment, Segment)
    assert dense.name == fused.layers[-1].name


def test_outputs(data_format):
    fused, plain = pair()
    x = images()
    if data_format == "channels_first" and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow's own layers have no channels_first on the CPU")
    for training in (False, True):
        expected = numbers(plain(x, training=training))
        np.testing.assert_allclose(numbers(fused(x, training=training)), expected, atol=1e-4)
    for ours, theirs in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)  # moving statistics


@pytest.mark.parametrize("activation", ["relu", "hard_silu"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_training(activation, run_eagerly):
    fused, plain = pair(activation=activation)
    x, y = images(), np.arange(6) % 3
    for model in (fused, plain):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=run_eagerly)
    losses = [[float(m.train_on_batch(x, y)) for _ in range(3)] for m in (fused, plain)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for ours, theirs in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    np.testing.assert_allclose(fused.predict(x, verbose=0), plain.predict(x, verbose=0), atol=1e-3)


def test_frozen_norms():
    """All frozen: statistics stay; some: layer by layer."""
    fused, plain = pair()
    for count in (1, None):
        for model in (fused, plain):
            norms = [x for x in model.layers if isinstance(x, layers.BatchNormalization)]
            for norm in norms[:count]:
                norm.trainable = False
        before = fused.get_weights()
        expected = numbers(plain(images(), training=True))
        np.testing.assert_allclose(numbers(fused(images(), training=True)), expected, atol=1e-4)
    for ours, theirs in zip(fused.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_saved_and_loaded_and_cloned(tmp_path):
    fused, _ = pair()
    expected = numbers(fused(images()))
    fused.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    cloned = keras.models.clone_model(fused)
    cloned.set_weights(fused.get_weights())
    for model in (loaded, cloned):
        assert isinstance(model, kk.Network)
        assert _plan(model).fuses
        np.testing.assert_allclose(numbers(model(images())), expected, atol=1e-6)


def test_drop_connect_drops_whole_images():
    fused, _ = pair(rate=0.5)
    keras.utils.set_random_seed(0)
    first, second = (numbers(fused(images(), training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_part_of_a_network():
    """A layer's output as a model of its own, and a network as a layer."""
    fused, plain = pair()
    inner = [keras.Model(m.input, m.layers[5].output) for m in (fused, plain)]
    np.testing.assert_allclose(*(numbers(m(images())) for m in inner), atol=1e-5)
    source = keras.Input(images().shape[1:])
    outer = [keras.Model(source, layers.Softmax()(m(source))) for m in (fused, plain)]
    np.testing.assert_allclose(*(numbers(m(images())) for m in outer), atol=1e-4)


def test_mixed_precision_runs_layer_by_layer():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        fused, _ = pair()
        assert not _plan(fused).fuses
        assert fused(images()).shape == (6, 3)
    finally:
        keras.config.set_dtype_policy("float32")
