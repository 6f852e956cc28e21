"""Blocks that are one Keras layer: beside the plain layers, trained, saved and loaded."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest

import kconv.keras as kk
from kconv.models.blocks import mbconv_graph

BLOCKS = [
    (kk.ConvUnit, 16, {"groups": 4, "interleave": 4, "activation": "silu"}),
    (kk.ConvUnit, 24, {"groups": 12, "kernel_size": 3, "strides": 2, "activation": None}),
    (kk.ConvUnit, 12, {"kernel_size": 3, "residual": True, "activation": keras.activations.relu}),
    (kk.MBConv, 12, {"ktype": "D6_4ch", "expand_ratio": 2}),
    (kk.MBConv, 20, {"ktype": None, "expand_ratio": 1, "strides": 2, "activation": "hard_swish"}),
]


def images(count=6):
    return np.random.default_rng(2).normal(size=(count, 9, 6, 12)).astype(np.float32)


def numbers(tensor):
    return keras.ops.convert_to_numpy(tensor)


def classifier(block):
    x = keras.Input((9, 6, 12))
    return keras.Model(x, keras.layers.GlobalAveragePooling2D()(block(x)))


@pytest.mark.parametrize(("kind", "filters", "options"), BLOCKS)
def test_fused_and_plain(kind, filters, options, gradients):
    keras.utils.set_random_seed(0)
    models = [classifier(kind(filters, fused=fused, **options)) for fused in (True, False)]
    fused, plain = models
    inner = [type(model.layers[1].network) for model in models]
    assert inner[0] is kk.Network
    assert not issubclass(inner[1], kk.Network)
    plain.set_weights(fused.get_weights())
    size = -(-9 // options.get("strides", 1)), -(-6 // options.get("strides", 1))
    assert fused.layers[1].output.shape == (None, *size, filters)
    np.testing.assert_allclose(*(numbers(m(images())) for m in models), atol=1e-4)
    gy = np.random.default_rng(3).normal(size=(6, filters)).astype(np.float32)
    (y, dx, dw), (y_plain, dx_plain, dw_plain) = (gradients(m, images(), gy) for m in models)
    np.testing.assert_allclose(y, y_plain, atol=1e-4)
    largest = max(np.abs(grad).max() for grad in dw_plain)
    for ours, theirs in zip([dx, *dw], [dx_plain, *dw_plain], strict=True):
        bound = 1e-3 * max(np.abs(theirs).max(), 1e-3 * largest)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)
    for ours, theirs in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)  # moving statistics


def test_fit_save_and_load(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((9, 6, 12))
    y = kk.ConvUnit(16, groups=4, name="unit")(x)
    y = kk.MBConv(16, ktype="D6_4ch", expand_ratio=2, drop_connect=0.3, name="first")(y)
    y = kk.MBConv(16, ktype="D6_4ch", expand_ratio=2, name="second")(y)
    y = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(y))
    model = kk.Network(x, y)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    history = model.fit(images(12), np.arange(12) % 3, epochs=8, batch_size=12, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    expected = numbers(model(images()))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for copy in (loaded, keras.models.clone_model(model)):
        copy.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(numbers(copy(images())), expected, atol=1e-5)
    native = kk.to_native(model)
    assert not any("kconv" in type(layer).__module__ for layer in native._flatten_layers())
    np.testing.assert_allclose(numbers(native(images())), expected, atol=1e-4)


def test_config():
    block = kk.MBConv(24, 5, 2, ktype=2, activation="silu", name="mb", dtype="float64")
    copy = kk.MBConv.from_config(block.get_config())
    assert copy.get_config() == block.get_config()
    assert block.get_config()["activation"] == "swish"
    assert block.get_config()["data_format"] == "channels_last"
    assert isinstance(block.get_config()["ktype"], str)
    assert copy(np.ones((1, 5, 5, 8))).dtype == block(np.ones((1, 5, 5, 8))).dtype
    assert {weight.dtype for weight in copy.weights} == {"float64"}


@pytest.mark.parametrize("size", [(9, 7), (None, 7), (1, 1)])
def test_shapes_before_the_layers_are_made(size):
    for block in (kk.ConvUnit(24, 3, 2, groups=12), kk.MBConv(24, strides=2)):
        shape = tuple(None if n is None else -(-n // 2) for n in size)
        assert block.compute_output_shape((None, *size, 12)) == (None, *shape, 24)
        spec = block.compute_output_spec(keras.KerasTensor((4, *size, 12)))
        assert (spec.shape, spec.dtype) == ((4, *shape, 24), "float32")
        assert not block.built
        assert block(keras.Input((*size, 12))).shape == (None, *shape, 24)
    first = kk.ConvUnit(24, 3, 2, data_format="channels_first")
    assert first.compute_output_shape((2, 12, *size)) == (2, 24, *shape)
    with pytest.raises(ValueError, match="groups=5"):
        kk.ConvUnit(24, groups=5).compute_output_shape((None, *size, 12))
    with pytest.raises(ValueError, match="expected 4 axes"):
        kk.ConvUnit(24).compute_output_shape((None, 12))


@pytest.mark.parametrize("none", [None, "linear", keras.activations.linear])
def test_no_activation(none):
    for kind, options in ((kk.ConvUnit, {}), (kk.MBConv, {}), (kk.MBConv, {"ktype": None})):
        models = [classifier(kind(16, activation=none, fused=f, **options)) for f in (True, False)]
        models[1].set_weights(models[0].get_weights())
        inner = models[0].layers[1].network.layers
        kinds = {layer.activation for layer in inner if isinstance(layer, keras.layers.Activation)}
        assert kinds <= {keras.activations.sigmoid}  # squeeze and excite
        np.testing.assert_allclose(*(numbers(m(images())) for m in models), atol=1e-4)
        copy = kind.from_config(models[0].layers[1].get_config())
        assert copy.get_config()["activation"] is None


def relu(x):
    return keras.activations.leaky_relu(x, negative_slope=0.5)


@pytest.mark.parametrize(
    "activation", [relu, keras.layers.ReLU(), functools.partial(keras.activations.relu)]
)
def test_activations_of_ones_own(activation):
    for kind in (kk.ConvUnit, kk.MBConv):
        with pytest.raises(ValueError, match="neither Keras's function nor one of relu, relu6"):
            kind(8, activation=activation)


def test_weights_have_the_graphs_names():
    block = kk.MBConv(8, ktype=None)
    block(images()[..., :8])
    names = [layer.name for layer in mbconv_graph(8, 8, 3, 1, 6, 0.25, None, "swish", 0.0).layers]
    assert [layer.name for layer in block.network.layers] == names


def test_frozen_before_the_first_call():
    block = kk.ConvUnit(8)
    block.trainable = False
    block(images(), training=True)
    before = block.get_weights()
    block(images(), training=True)
    for ours, theirs in zip(block.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (kk.ConvUnit, {"groups": 5}, "groups=5"),
        (kk.ConvUnit, {"strides": 0}, "strides=0"),
        (kk.ConvUnit, {"activation": "gelu"}, "'gelu'"),
        (kk.ConvUnit, {"residual": True}, "12 to 8 channels"),
        (kk.MBConv, {"ktype": "D7"}, "D7"),
        (kk.MBConv, {"drop_connect": 1.0}, r"drop_connect=1\.0"),
    ],
)
def test_bad_input(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(8, **options)(images())


def test_blocks_tell_their_arguments_in_a_line():
    block = kk.MBConv(24, 5, 2, ktype=5, name="one")
    assert repr(block) == (
        "<MBConv name=one, filters=24, kernel_size=5, strides=2, expand_ratio=6, se_ratio=0.25, "
        "ktype='D10', activation='swish', drop_connect=0.0>"
    )
