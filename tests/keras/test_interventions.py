"""Networks after whatever is done to a model: fused = Keras's own layers.

Each case does the same to a fused network and to a plain model of Keras's layers, and compares
outputs, losses, gradients and statistics.
"""

from __future__ import annotations

import functools
import types

import keras
import numpy as np
import pytest
from keras import layers

import kconv.keras as kk
from kconv.keras._fusion import plan_of as _plan

BACKEND = keras.backend.backend()


def images(count=3):
    return np.random.default_rng(2).normal(size=(count, 6, 5, 4)).astype(np.float32)


def numbers(tensor):
    return keras.ops.convert_to_numpy(tensor)


def chain(x, tail=lambda x: x, **options):
    """A chain of what segments know, named."""
    x = layers.Conv2D(8, 3, padding="same", name="conv", **options)(x)
    x = layers.BatchNormalization(name="norm", momentum=0.5)(x)
    x = layers.Activation("relu", name="relu")(x)
    x = tail(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.DepthwiseConv2D(3, use_bias=False, name="dwconv")(x)
    x = layers.BatchNormalization(name="dwnorm")(x)
    return layers.Activation("silu", name="silu")(x)


def pair(tail=lambda x: x, **options):
    """A fused network and a plain model with equal weights."""
    models = []
    for kind in (kk.Network, keras.Model):
        keras.utils.set_random_seed(1)
        x = keras.Input((6, 5, 4))
        y = layers.GlobalAveragePooling2D(name="mean")(chain(x, tail, **options))
        models.append(kind(x, layers.Dense(3, name="dense")(y)))
    values = np.random.default_rng(0)
    weights = [w + 0.3 * values.random(w.shape) for w in models[0].get_weights()]
    for model in models:
        model.set_weights(weights)
    return models


def derivatives(model, x, training):
    """Output, losses, and the gradients of their sum by the image and the trainable weights."""
    if BACKEND == "jax":
        import jax

        weights = [v.value for v in model.trainable_variables]
        others = [v.value for v in model.non_trainable_variables]

        def loss(weights, x):
            y, state, losses = model.stateless_call(
                weights, others, x, training=training, return_losses=True
            )
            return (y**2).sum() + sum(losses), (y, state, losses)

        (dw, dx), (y, state, losses) = jax.grad(loss, (0, 1), has_aux=True)(weights, x)
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            variable.assign(value)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        weights = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, losses = model(x, training=training), model.losses
            loss = tf.reduce_sum(y**2) + sum(losses)
        dx, dw = tape.gradient(loss, [x, weights], unconnected_gradients="zero")
    else:
        import torch

        x = torch.tensor(x, requires_grad=True)
        weights = [v.value for v in model.trainable_variables]
        y, losses = model(x, training=training), model.losses
        loss = (y**2).sum() + sum(losses)
        dx, *dw = torch.autograd.grad(loss, [x, *weights], allow_unused=True)
        dw = [torch.zeros_like(w) if g is None else g for g, w in zip(dw, weights, strict=True)]
    return [numbers(value) for value in (y, *losses, dx, *dw)]


def compare(fused, plain, x=None):
    x = images() if x is None else x
    for training in (False, True):
        ours, theirs = (derivatives(model, x, training) for model in (fused, plain))
        assert len(ours) == len(theirs)
        largest = max(np.abs(value).max(initial=0) for value in theirs)
        for a, b in zip(ours, theirs, strict=True):
            bound = 1e-4 * np.abs(b).max(initial=0) + 1e-6 * largest
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)
    for a, b in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # moving statistics


def own_relu(x):
    return keras.activations.leaky_relu(x, negative_slope=0.5)


own_relu.__name__ = "relu"


class Scale(layers.Layer):
    def call(self, x, factor=1.0):
        self.add_loss(keras.ops.mean(x**2))
        return x * factor


class Twice(layers.Layer):
    def call(self, x, other=None, extras=()):
        return 2 * x + other["a"] + extras[0]


class OwnNorm(layers.BatchNormalization):
    def call(self, x, training=None, mask=None):
        return 3 * super().call(x, training=training, mask=mask)


def setting(layer, **values):
    def change(model):
        for name, value in values.items():
            setattr(model.get_layer(layer), name, value)

    return change


def own_call(model):
    layer = model.get_layer("norm")
    inner = layer.call
    layer.call = lambda *args, **kwargs: 2 * inner(*args, **kwargs)


def own_convolution(model):
    layer = model.get_layer("conv")
    layer.convolution_op = types.MethodType(
        lambda self, x, kernel: 2 * type(self).convolution_op(self, x, kernel), layer
    )


def freeze_all(model):
    model.trainable = False


def enable_lora(model):
    layer = model.get_layer("conv")
    keras.utils.set_random_seed(3)
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))


def other_gamma(model):
    norm = model.get_layer("norm")
    norm.gamma.assign(2 * norm.gamma)


CHANGES = {
    "epsilon": setting("norm", epsilon=0.5),
    "momentum": setting("norm", momentum=0.1),
    "scale": setting("norm", scale=False),
    "center": setting("norm", center=False),
    "activation": setting("relu", activation=keras.activations.gelu),
    "function named relu": setting("relu", activation=own_relu),
    "partial": setting(
        "relu", activation=functools.partial(keras.activations.leaky_relu, negative_slope=0.5)
    ),
    "strides": setting("conv", strides=(2, 2)),
    "strides as a list": setting("conv", strides=[2, 2]),
    "padding": setting("conv", padding="valid"),
    "dilation": setting("conv", dilation_rate=(2, 2)),
    "groups": setting("conv", groups=2),
    "bias off": setting("conv", use_bias=False),
    "pad": setting("pad", padding=((2, 0), (0, 3))),
    "activity regularizer": setting("conv", activity_regularizer=keras.regularizers.L2(0.1)),
    "frozen norm": setting("norm", trainable=False),
    "frozen convolution": setting("conv", trainable=False),
    "all frozen": freeze_all,
    "own call": own_call,
    "own convolution": own_convolution,
    "own class": lambda model: setattr(model.get_layer("norm"), "__class__", OwnNorm),
    "lora": enable_lora,
    "weights": other_gamma,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_after_the_first_call(change):
    fused, plain = pair()
    assert _plan(fused).fuses
    before = numbers(fused(images()))
    for model in (fused, plain):
        change(model)
    compare(fused, plain)
    changed = np.abs(numbers(fused(images())) - before).max() > 1e-4  # by the statistics at least
    assert changed or change is freeze_all


def test_changed_and_changed_back():
    fused, plain = pair()
    for padding in ("valid", "same"):
        for model in (fused, plain):
            model.get_layer("conv").padding = padding
        compare(fused, plain)


def branches(x):
    y = layers.Conv2D(8, 1, name="branch")(x)
    y = layers.BatchNormalization(name="branch_norm")(y)
    return layers.Concatenate()([layers.Add()([x, y]), layers.Multiply()([x, y]), x])


def shared(x):
    conv, norm = layers.Conv2D(8, 1, name="twice"), layers.BatchNormalization(name="norms")
    return norm(conv(norm(conv(x))))


def nested(x):
    inner = keras.Input((6, 5, 8))
    y = layers.BatchNormalization()(layers.Conv2D(8, 1, activation="relu")(inner))
    model = keras.Model(inner, y, name="inner")
    return keras.Sequential([model, layers.Conv2D(8, 1)], name="outer")(x)


def attention(x):
    y = layers.Reshape((30, 8))(x)
    y = layers.MultiHeadAttention(2, 4, name="attention")(y, y)
    return layers.Reshape((6, 5, 8))(y)


def vector(x):
    """From a vector into a convolution, which begins a chain."""
    y = layers.Dense(8, name="vector")(layers.GlobalAveragePooling2D()(x))
    y = layers.Conv2D(8, 1, name="gate")(layers.Reshape((1, 1, 8))(y))
    return layers.Multiply()([x, layers.Activation("sigmoid")(y)])


def copied(x):
    """A batch norm of which some channels are read by nobody."""
    y = layers.BatchNormalization(name="whole")(layers.Conv2D(10, 1, name="wide")(x))
    return kk.CopyChannels(2, 5)(y)


TAILS = {
    "call argument": lambda x: Scale()(x, factor=3.0),
    "untrained norm": lambda x: layers.BatchNormalization()(x, training=False),
    "dict and list": lambda x: Twice()(x, other={"a": x}, extras=[layers.Conv2D(8, 1)(x)]),
    "attention": attention,
    "branches": branches,
    "shared": shared,
    "nested": nested,
    "vector": vector,
    "operators": lambda x: layers.Conv2D(8, 1)(x * 2.0) + x,
    "constant": lambda x: layers.Add()([x, np.ones((1, 1, 1, 8), np.float32)]),
    "mask": lambda x: layers.Masking()(x),
    "axis": lambda x: layers.BatchNormalization(axis=1)(layers.Conv2D(8, 1)(x)),
    "layer as activation": lambda x: layers.Conv2D(8, 1, activation=layers.LeakyReLU())(x),
    "own relu": lambda x: layers.Activation(own_relu)(layers.Conv2D(8, 1)(x)),
    "unread channels": copied,
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_calls(tail):
    fused, plain = pair(tail)
    assert _plan(fused).fuses
    compare(fused, plain)


def test_regularizers_count_once():
    options = {"kernel_regularizer": "l2", "activity_regularizer": "l1"}
    fused, plain = pair(**options)
    compare(fused, plain)
    assert len(derivatives(fused, images(), False)) == len(fused.trainable_weights) + 2 + 2


def test_several_outputs_and_structures():
    models = [
        type(model)({"image": model.input}, [model.get_layer("relu").output, {"y": model.output}])
        for model in pair()
    ]
    for training in (False, True):
        ours, theirs = (model({"image": images()}, training=training) for model in models)
        np.testing.assert_allclose(numbers(ours[0]), numbers(theirs[0]), atol=1e-5)
        np.testing.assert_allclose(numbers(ours[1]["y"]), numbers(theirs[1]["y"]), atol=1e-5)


def test_dtypes_of_single_layers():
    """A chain has one dtype; a layer of another, or of a mixed policy, runs by itself."""

    def tail(x):
        x = layers.Conv2D(8, 1, dtype="mixed_bfloat16", name="mixed")(x)
        return layers.Conv2D(8, 1, dtype="float32", name="wide")(x)

    fused, plain = pair(tail)
    np.testing.assert_allclose(*(numbers(m(images())) for m in (fused, plain)), atol=1e-3)
    assert fused(images().astype(np.int32)).shape == (3, 3)


@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (1, 6, 5, 4)])
def test_few_images(shape):
    """Statistics of no images are what Keras's layers make of them, or their error."""
    fused, plain = pair()
    try:
        plain(images()[: shape[0]])
    except Exception as error:  # TensorFlow's convolution returns its input, which has no channels
        with pytest.raises(type(error)):
            fused(images()[: shape[0]])
    else:
        compare(fused, plain, images()[: shape[0]])


def test_no_pixels():
    """Empty results, or Keras's own error."""
    results = []
    for kind in (kk.Network, keras.Model):
        x = keras.Input((None, None, 4))
        model = kind(x, chain(x))
        try:
            results.append(numbers(model(np.ones((2, 0, 5, 4), np.float32))).shape)
        except Exception as error:
            results.append(type(error).__name__)
    assert results[0] == results[1]


def test_data_format_changed_after_the_build():
    fused, plain = pair()
    keras.config.set_image_data_format("channels_first")
    try:
        compare(fused, plain)
        assert kk.ConvUnit(8, data_format="channels_last")(images()).shape == (3, 6, 5, 8)
    finally:
        keras.config.set_image_data_format("channels_last")


def test_fit_after_a_change():
    """Keras compiles the training step once: what it does then is what the network does."""
    losses = []
    for model in pair():
        model.compile(keras.optimizers.SGD(0.1), "mse")
        target = np.ones((3, 3), np.float32)
        history = [float(model.train_on_batch(images(), target)) for _ in range(2)]
        model.get_layer("norm").epsilon = 0.5
        history.append(float(model.train_on_batch(images(), target)))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        history.append(float(model.train_on_batch(images(), target)))
        losses.append(history)
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="Keras's layers are PyTorch's modules there alone")
def test_hooks():
    fused, plain = pair()
    for model in (fused, plain):
        model.get_layer("norm").register_forward_hook(lambda module, args, output: 2 * output)
    compare(fused, plain)
