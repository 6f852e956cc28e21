"""The layers against Keras's own, on the backend of this process."""

from __future__ import annotations

import inspect
from functools import partial

import keras
import numpy as np
import pytest

import kconv.keras
from kconv.keras import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.ktypes import interleave_index

BACKEND = keras.backend.backend()
FORMATS = ["channels_last", "channels_first"]


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def images(n, h, w, c, data_format):
    x = random(n, h, w, c)
    return x if data_format == "channels_last" else np.moveaxis(x, 3, 1)


def models(ours, keras_layer, options, x):
    """A model of each layer, with the same weights."""
    theirs = [keras_layer(**options)]
    if BACKEND == "tensorflow" and options.get("data_format") == "channels_first":
        # TensorFlow's own convolutions know no NCHW on a CPU.
        inner = keras_layer(**{**options, "data_format": "channels_last"})
        theirs = [keras.layers.Permute((2, 3, 1)), inner, keras.layers.Permute((3, 1, 2))]
    stacks = [ours(**options)], theirs
    pair = [keras.Sequential([keras.Input(x.shape[1:]), *layers]) for layers in stacks]
    pair[1].set_weights([random(*w.shape) for w in pair[1].get_weights()])
    pair[0].set_weights(pair[1].get_weights())
    return pair


def assert_same(gradients, ours, theirs, x):
    """Outputs and gradients of both models."""
    for actual, expected in zip(gradients(ours, x, None), gradients(theirs, x, None), strict=True):
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * max(1, np.abs(e).max()))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(("c_in", "filters", "groups"), [(12, 8, 4), (9, 5, 1)])
def test_pointwise_is_conv2d(c_in, filters, groups, data_format, gradients):
    options = {"filters": filters, "groups": groups, "data_format": data_format}
    options["activation"] = "tanh"
    x = images(2, 5, 3, c_in, data_format)
    theirs = partial(keras.layers.Conv2D, kernel_size=1)
    assert_same(gradients, *models(PointwiseConv2D, theirs, options, x), x)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("size", [(8, 7), (9, 8)])
@pytest.mark.parametrize(
    ("kernel", "strides", "padding"), [(3, 1, "same"), (5, 2, "same"), (3, 2, "valid")]
)
def test_depthwise_is_depthwise_conv2d(kernel, strides, padding, size, data_format, gradients):
    options = {"kernel_size": kernel, "strides": strides, "padding": padding}
    options["data_format"] = data_format
    x = images(2, *size, 6, data_format)
    layers = DepthwiseConv2D, keras.layers.DepthwiseConv2D
    assert_same(gradients, *models(*layers, options, x), x)


# Arguments beside those of the tests above, and those that start or train the same weights.
POINTWISE = [
    {"strides": 2},
    {"strides": (3, 1), "padding": "same", "use_bias": False},
    {"strides": 2, "groups": 2, "activation": "softmax"},
    {"dilation_rate": (2, 1), "padding": "same"},
    {"lora_rank": 2, "lora_alpha": 3},
    {"activity_regularizer": "l2"},
]
DEPTHWISE = [
    {"depth_multiplier": 2, "strides": 2},
    {"kernel_size": (3, 5)},
    {"kernel_size": 4, "strides": 3, "padding": "same"},
    {"dilation_rate": 2, "use_bias": False},
    {"activity_regularizer": "l2"},
]
if BACKEND != "tensorflow":  # whose operation takes equal strides alone
    DEPTHWISE += [{"strides": (1, 2), "padding": "same"}]
KINDS = {
    "pointwise": (partial(PointwiseConv2D, 6), partial(keras.layers.Conv2D, 6, 1)),
    "depthwise": (
        partial(DepthwiseConv2D, kernel_size=3),
        partial(keras.layers.DepthwiseConv2D, kernel_size=3),
    ),
}
INPUTS = {"jax": ("uint8", "int32", "float16", "complex64")}.get(BACKEND, ("float16",))


@pytest.mark.parametrize(("kind", "tried"), [("pointwise", POINTWISE), ("depthwise", DEPTHWISE)])
def test_the_table_has_all_arguments_of_the_parent(kind, tried):
    of_weights = ("initializer", "regularizer", "constraint")
    bases = KINDS[kind][1].func.__mro__[:2]  # Keras's layer, and that for any number of axes
    parent = {name for base in bases for name in inspect.signature(base.__init__).parameters}
    names = {name for name in parent if not name.endswith(of_weights)} | {"activity_regularizer"}
    given = {"self", "filters", "rank", "kernel_size", "kwargs", "data_format", "activation"}
    given |= {"name", "trainable"}
    assert names - given == {name for options in tried for name in options} - given


@pytest.mark.parametrize(
    ("kind", "options"),
    [("pointwise", case) for case in POINTWISE] + [("depthwise", case) for case in DEPTHWISE],
)
def test_arguments_of_the_parent(kind, options):
    x = random(2, 7, 8, 4)
    ours, theirs = (make(**options) for make in KINDS[kind])
    expected = theirs(x)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    assert_close(ours(x), expected)
    assert len(ours.losses) == len(theirs.losses)
    assert ours.compute_output_shape((None, *x.shape[1:])) == (None, *expected.shape[1:])
    again = type(ours).from_config(ours.get_config())
    again.build(x.shape)
    again.set_weights(theirs.get_weights())
    assert_close(again(x), expected)
    if kind == "pointwise":
        mixed = PointwiseConv2D(interleave=4, filters=6, **options)
        mixed.build(x.shape)
        mixed.set_weights(theirs.get_weights())
        assert_close(mixed(x), keras.ops.take(expected, interleave_index(6, 4), 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strides", (2, 2)),
        ("strides", (3, 3)),
        ("padding", "same"),
        ("dilation_rate", (2, 2)),
        ("use_bias", False),
        ("activation", keras.ops.abs),
        ("groups", 3),
    ],
)
def test_attributes_set_afterwards(kind, name, value):
    x = random(2, 7, 8, 6)
    ours, theirs = (make(activation="tanh") for make in KINDS[kind])
    theirs(x)
    ours(x)
    ours.set_weights(theirs.get_weights())
    for layer in (ours, theirs):
        setattr(layer, name, value)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_input_of_any_dtype(kind, dtype):
    x = keras.ops.convert_to_tensor((3 * random(2, 5, 4, 6)).astype(dtype))
    ours, theirs = (make() for make in KINDS[kind])
    if kind == "depthwise" and dtype != "float16":
        for layer in (ours, theirs):
            with pytest.raises(TypeError, match="the same dtypes"):
                layer(x)
        return
    theirs(x)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    assert_close(ours(x), theirs(x))


def test_a_convolution_of_ones_own():
    """Keras asks subclasses to override ``convolution_op``."""

    class Standardized(PointwiseConv2D):
        def convolution_op(self, inputs, kernel):
            return super().convolution_op(inputs, kernel * 2)

    x = random(1, 3, 3, 4)
    ours, plain = (kind(6, interleave=4) for kind in (Standardized, PointwiseConv2D))
    for layer in (ours, plain):
        layer.build(x.shape)
    ours.set_weights(plain.get_weights())
    assert_close(ours(x), 2 * plain(x))


def assert_close(a, b):
    to_numpy = keras.ops.convert_to_numpy
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_interleave_of_any_dtype(dtype):
    x = np.arange(2 * 3 * 7).reshape(1, 2, 3, 7).astype(dtype)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(InterleaveChannels(3)(keras.ops.convert_to_tensor(x))),
        np.take(x, interleave_index(7, 3), 3),
    )


@pytest.mark.parametrize("data_format", FORMATS)
def test_interleave(data_format, gradients):
    x = images(2, 3, 4, 7, data_format)
    axis = 3 if data_format == "channels_last" else 1
    order = np.array(interleave_index(7, 3))
    layer = InterleaveChannels(3, data_format=data_format)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    gy = random(*x.shape) + 1
    y, dx, _ = gradients(model, x, gy)
    np.testing.assert_array_equal(y, np.take(x, order, axis))
    np.testing.assert_array_equal(dx, np.take(gy, np.argsort(order), axis))
    fused = PointwiseConv2D(6, interleave=4, data_format=data_format)
    plain = PointwiseConv2D(6, data_format=data_format)
    shape = [None, *x.shape[1:]]
    fused.build(shape)
    plain.build(shape)
    plain.set_weights([w + 1 for w in fused.get_weights()])
    fused.set_weights(plain.get_weights())
    expected = InterleaveChannels(4, data_format=data_format)(plain(x))
    assert_equal(fused(x), expected)


def assert_equal(a, b):
    to_numpy = keras.ops.convert_to_numpy
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-6)


@pytest.mark.parametrize("step", [1, 0, -3])
def test_steps_below_2_change_nothing(step):
    x = random(1, 2, 2, 5)
    assert_equal(InterleaveChannels(step)(x), x)


@pytest.mark.parametrize("data_format", FORMATS)
def test_channel_layers(data_format):
    x = images(2, 3, 4, 7, data_format)
    axis = 3 if data_format == "channels_last" else 1
    part = CopyChannels(2, 3, data_format=data_format)
    assert_equal(part(x), np.take(x, range(2, 5), axis))
    assert part.compute_output_shape((None, 7, 7, 7))[axis] == 3
    half = SumIntoHalfChannels(data_format=data_format)
    expected = np.take(x, range(3), axis) + np.take(x, range(3, 6), axis)
    assert_equal(half(x), expected)
    assert half.compute_output_shape((None, 7, 7, 7))[axis] == 3
    assert half.compute_output_shape((None,) * 4) == (None,) * 4
    part.channel_count = 6  # more than there are
    with pytest.raises(ValueError, match="channel_count=6"):
        part(x)


LAYERS = [
    PointwiseConv2D(6, groups=2, interleave=3, use_bias=False, activation="relu"),
    DepthwiseConv2D(3, strides=2, padding="same", depthwise_regularizer="l2"),
    InterleaveChannels(3, name="mix"),
    CopyChannels(1, 4),
    SumIntoHalfChannels(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_configuration_round_trip(layer):
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert again.name == layer.name
    assert keras.saving.get_registered_name(type(layer)) == f"kconv>{type(layer).__name__}"


def small_model(size=(8, 8)):
    x = keras.Input((*size, 8))
    y = kconv.keras.kPointwiseConv2D(x, 12, name="a", activation="swish", kType="D6_4ch")
    y = DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = CopyChannels(2, 8)(y)
    y = SumIntoHalfChannels()(y)
    y = keras.layers.GlobalAveragePooling2D()(y)
    return keras.Model(x, keras.layers.Dense(3, activation="softmax")(y))


def tiny_model():
    layers = [PointwiseConv2D(12, interleave=4), DepthwiseConv2D(3, padding="same")]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, activation="softmax")]
    return keras.Sequential([keras.Input((8, 8, 8)), *layers])


@pytest.mark.filterwarnings("ignore:Model doesn't support `jit_compile=True`")  # TensorFlow
@pytest.mark.parametrize(
    "compilation", [{}, {"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}]
)
def test_fit_lowers_the_loss(compilation):
    keras.utils.set_random_seed(1)
    # PyTorch's compiler would take more than a minute with all of the small model.
    model = tiny_model() if compilation.get("jit_compile") else small_model()
    x = random(32, 8, 8, 8)
    y = x.mean((1, 2))[:, :3].argmax(1)
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy", **compilation)
    history = model.fit(x, y, batch_size=32, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_save_and_load(tmp_path):
    model = small_model()
    x = random(2, 8, 8, 8)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(again(x), model(x))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_equal(clone(x), model(x))


def test_any_image_size():
    model = small_model((None, None))
    for size in ((8, 8), (5, 11)):
        assert model.predict(random(2, *size, 8), verbose=0).shape == (2, 3)


def test_mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("depthwise").compute_dtype == "bfloat16"
    assert {v.dtype for v in model.variables if v.dtype != "uint32"} <= {"float32", "int64"}
    wide = small_model()
    wide.set_weights(model.get_weights())
    x, y = random(4, 8, 8, 8), np.arange(4) % 3
    np.testing.assert_allclose(model.predict(x, verbose=0), wide.predict(x, verbose=0), atol=0.02)
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert np.isfinite(model.train_on_batch(x, y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PointwiseConv2D(6, groups=4), "groups"),
        (lambda: PointwiseConv2D(6, groups=2)(random(1, 2, 2, 5)), "divisible"),
        (lambda: PointwiseConv2D(6, interleave=0), "interleave=0"),
        (lambda: PointwiseConv2D(0), "filters"),
        (lambda: PointwiseConv2D(6, padding="causal"), "causal"),
        (lambda: PointwiseConv2D(6, strides=2, dilation_rate=2), "dilation_rate"),
        (lambda: DepthwiseConv2D(3, padding="causal"), "causal"),
        (lambda: InterleaveChannels(2, data_format="NHWC"), "data_format='NHWC'"),
        (lambda: InterleaveChannels(2)(random(2, 3)), "ndim"),
        (lambda: CopyChannels(5, 4)(random(1, 2, 2, 8)), "channel_start=5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
