"""Models onto kconv's kernels and back."""

from __future__ import annotations

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

import kconv.keras
from kconv.keras import DepthwiseConv2D, PointwiseConv2D


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def kinds(model):
    return {type(layer) for layer in model.layers}


def assert_same_outputs(a, b, x):
    outputs = [model.predict(x, verbose=0) for model in (a, b)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_accelerate_an_application():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)
    fast = kconv.keras.accelerate(model)
    names = [[layer.name for layer in m.layers[1:]] for m in (fast, model)]
    assert names[0] == names[1]
    assert {PointwiseConv2D, DepthwiseConv2D} <= kinds(fast)
    assert keras.layers.DepthwiseConv2D not in kinds(fast)
    convolutions = [la for la in fast.layers if type(la) is keras.layers.Conv2D]
    assert [la.name for la in convolutions] == ["Conv1"]  # the 3x3 stem
    x = random(2, 32, 32, 3)
    assert_same_outputs(fast, model, x)
    back = kconv.keras.to_native(fast)
    assert kinds(back) == kinds(model)
    assert_same_outputs(back, model, x)


def test_to_native_has_nothing_of_kconv(tmp_path):
    x = keras.Input((6, 6, 9))
    y = PointwiseConv2D(10, interleave=4, activation="tanh")(x)
    y = kconv.keras.kPointwiseConv2D(y, 7, name="v2", kType="D6v3_4ch", activation="swish")
    y = kconv.keras.kPointwiseConv2D(y, 8, name="fold", kType=6)
    y = kconv.keras.SumIntoHalfChannels()(y)
    model = keras.Model(x, DepthwiseConv2D(3)(y))
    native = kconv.keras.to_native(model)
    assert not [k for k in kinds(native) if k.__module__.startswith("kconv")]
    native.save(tmp_path / "native.keras")
    assert "kconv" not in str(native.get_config())
    again = keras.saving.load_model(tmp_path / "native.keras")
    assert_same_outputs(again, model, random(2, 6, 6, 9))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("size", [(2, 3), (None, None)])
def test_native_interleave(size, data_format):
    def layer(step):
        return kconv.keras.InterleaveChannels(step, data_format=data_format)

    shape = (*size, 10) if data_format == "channels_last" else (10, *size)
    x = keras.Input(shape)
    model = keras.Model(x, [layer(step)(x) for step in (1, 2, 3, 4, 7, 10, 12)])
    native = kconv.keras.to_native(model)
    assert not [k for k in kinds(native) if k.__module__.startswith("kconv")]
    images = random(2, *(n or 4 for n in shape))
    for a, b in zip(native(images), model(images), strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))


def test_export(tmp_path):
    x = keras.Input((6, 6, 9))
    y = PointwiseConv2D(10, interleave=4, activation="tanh")(x)
    y = kconv.keras.kPointwiseConv2D(y, 7, name="v2", kType="D6v3_4ch", activation="swish")
    model = keras.Model(x, DepthwiseConv2D(3, strides=2, padding="same")(y))
    images = random(2, 6, 6, 9)
    expected = model.predict(images, verbose=0)
    native = kconv.keras.to_native(model)
    native.predict(images, verbose=0)  # an export to ONNX wants a model that has been called
    if keras.backend.backend() == "torch":  # the backend from which Keras itself exports to ONNX
        native.export(tmp_path / "model.onnx", format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (actual,) = session.run(None, {session.get_inputs()[0].name: images})
    else:
        # TensorFlow takes the kernels along; from JAX only JAX's own operations go there.
        exported = model if keras.backend.backend() == "tensorflow" else native
        exported.export(tmp_path / "saved", verbose=False)
        saved = tf.saved_model.load(tmp_path / "saved")
        actual = saved.serve(images)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_sequential_models_and_subclasses():
    class Special(keras.layers.Conv2D):
        """A subclass, which may do anything."""

    layers = [keras.Input((4, 4, 6)), keras.layers.Conv2D(8, 1, groups=2), Special(4, 1)]
    model = keras.Sequential(layers)
    fast = kconv.keras.accelerate(model)
    assert [type(layer) for layer in fast.layers[1:]] == [PointwiseConv2D, Special]
    assert_same_outputs(fast, model, random(2, 4, 4, 6))


def test_models_within_models():
    inner = keras.Sequential([keras.Input((4, 4, 6)), keras.layers.Conv2D(64, 1)], name="inner")
    x = keras.Input((4, 4, 6))
    model = keras.Model(x, keras.layers.Conv2D(64, 1)(inner(x)))
    fast = kconv.keras.accelerate(model)
    assert PointwiseConv2D in kinds(fast) & kinds(fast.get_layer("inner"))
    assert_same_outputs(fast, model, random(2, 4, 4, 6))
    interleaved = keras.Sequential([keras.Input((4, 4, 6)), PointwiseConv2D(8, interleave=4)])
    assert_same_outputs(kconv.keras.to_native(interleaved), interleaved, random(2, 4, 4, 6))
    inner = keras.Sequential([keras.Input((4, 4, 64)), keras.layers.Conv2D(64, 1)], name="inner")
    small = kconv.keras.compress(keras.Sequential([keras.Input((4, 4, 64)), inner]))
    assert small.count_params() < inner.count_params()


def parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


# Name, arguments, trainable parameters of 5 classes before and after.
APPLICATIONS = [("MobileNetV2", {"alpha": 0.35}, 402_533, 152_805)]
if keras.backend.backend() == "torch":  # which compiles nothing: elsewhere this takes a minute
    APPLICATIONS += [("EfficientNetB0", {}, 4_013_953, 633_297)]


@pytest.mark.parametrize(("name", "options", "before", "after"), APPLICATIONS)
def test_compress_an_application(name, options, before, after, tmp_path):
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(input_shape=(32, 32, 3), weights=None, classes=5, **options)
    small = kconv.keras.compress(model, "D6_16ch")
    assert (parameters(model), parameters(small)) == (before, after)
    # A block's last layer has the name of the convolution that it replaces.
    twins = {(layer.name, type(layer)): layer for layer in small.layers}
    kept = [(twins.get((layer.name, type(layer))), layer) for layer in model.layers]
    kept = [pair for pair in kept if pair[0] and pair[0].weights]
    assert len(kept) > 20
    for ours, theirs in kept:
        for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    layers = [[(layer.name, type(layer)) for layer in m.layers] for m in (again, small)]
    assert layers[0] == layers[1]
    weights = small.get_weights()
    assert all(map(np.array_equal, again.get_weights(), weights))
    small.compile("sgd", "sparse_categorical_crossentropy")
    assert np.isfinite(small.train_on_batch(random(4, 32, 32, 3), np.arange(4)))
    unchanged = list(map(np.array_equal, weights, small.get_weights()))
    assert np.mean(unchanged) < 0.1


def test_compress_keeps_the_configuration():
    """Of everything that a block takes in; and what others read stays."""
    x = keras.Input((9, 7, 64))
    y = keras.layers.Conv2D(64, 1, 2, use_bias=False, kernel_regularizer="l2", name="strided")(x)
    y = keras.layers.BatchNormalization(epsilon=0.5, name="norm")(y)
    y = keras.layers.ReLU(6.0, name="cut")(y)
    shared = keras.layers.Conv2D(64, 1, name="shared")
    y = shared(shared(y))
    read_twice = keras.layers.Conv2D(64, 1, activation="tanh", name="twice")(y)
    norm = keras.layers.BatchNormalization(name="norm_of_twice")(read_twice)
    y = keras.layers.Add()([read_twice, norm])
    y = keras.layers.Conv2D(64, 1, name="softmaxed")(y)
    y = keras.layers.Activation("softmax", name="softmax")(y)
    result = keras.layers.Conv2D(64, 1, name="result")(y)
    after_result = keras.layers.ReLU(name="after_result")(result)
    model = keras.Model(x, [result, after_result])
    small = kconv.keras.compress(model, "D6_16ch")
    shapes = [tuple(y.shape) for y in small(random(2, 9, 7, 64))]
    assert shapes == [(2, 5, 4, 64)] * 2
    unit = small.get_layer("strided_conv")
    assert type(unit) is PointwiseConv2D
    assert (unit.groups, unit.use_bias) == (4, False)
    assert isinstance(unit.kernel_regularizer, keras.regularizers.L2)
    assert small.get_layer("strided_bn").epsilon == 0.5
    assert small.get_layer("strided").max_value == 6.0
    assert small.get_layer("twice_conv").activation is keras.activations.tanh
    names = {layer.name for layer in small.layers}
    assert {"shared", "norm_of_twice", "softmax", "after_result"} <= names
    assert not names & {"norm", "cut", "softmaxed", "result"}
    with pytest.raises(ValueError, match="D7"):
        kconv.keras.compress(model, "D7")
