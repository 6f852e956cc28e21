"""Models that `fuse` was given, beside the same models as they were.

Each is trained for three steps in float64: losses, gradients and all variables have to be equal.
"""

from __future__ import annotations

import copy
import importlib
import pickle

import keras
import numpy as np
import pytest
from keras import layers

import kconv.keras as kk
from kconv.keras import _fusion

BACKEND = keras.backend.backend()


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Keras makes layers of float64, and computes all of them in it."""
    # On JAX and PyTorch batch norms of float64 compute in float32 otherwise.
    dtypes = importlib.import_module("keras.src.backend.common.dtypes")
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    if BACKEND == "jax":
        jax.config.update("jax_enable_x64", False)


def numbers(tensor):
    return keras.ops.convert_to_numpy(tensor)


def images(shape, count=3):
    return np.random.default_rng(2).normal(size=(count, *shape))


def pair(make, *args, noise=0.3, **options):
    """A fused model and the same one as it is, with equal variables that are not as they began."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        models.append(make(*args, **options))
    values = np.random.default_rng(0)
    for a, b in zip(*(model.variables for model in models), strict=True):
        if a.dtype == "float64":  # a dropout's seeds are others
            a.assign(numbers(a) + noise * values.random(a.shape))
        b.assign(numbers(a))
    assert kk.fuse(models[0]) is models[0]
    return models


def step(model):
    """A function from images to loss and gradients by the weights, in which state moves on."""
    if BACKEND == "jax":
        import jax

        def loss(weights, others, x):
            y, state, losses = model.stateless_call(
                weights, others, x, training=True, return_losses=True
            )
            outputs = jax.tree.leaves(y)
            return sum((y**2).mean() for y in outputs) + sum(losses), state

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def values(x):
            weights = [v.value for v in model.trainable_variables]
            others = [v.value for v in model.non_trainable_variables]
            (loss, state), grads = run(weights, others, x)
            for variable, value in zip(model.non_trainable_variables, state, strict=True):
                variable.assign(value)
            return loss, grads

    elif BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def values(x):
            weights = [v.value for v in model.trainable_variables]
            with tf.GradientTape() as tape:
                outputs = keras.tree.flatten(model(x, training=True))
                loss = sum(tf.reduce_mean(y**2) for y in outputs) + sum(model.losses)
            return loss, tape.gradient(loss, weights)

    else:
        import torch

        def values(x):
            weights = [v.value for v in model.trainable_variables]
            outputs = keras.tree.flatten(model(torch.tensor(x), training=True))
            loss = sum((y**2).mean() for y in outputs) + sum(model.losses)
            return loss, torch.autograd.grad(loss, weights)

    return values


def assert_close(ours, theirs, bound=1e-10):
    largest = max(np.abs(value).max(initial=0) for value in theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * largest)


def assert_trains_alike(fused, plain, x, rate=0.01):
    """Three steps of SGD and an evaluation."""
    steps = [step(model) for model in (fused, plain)]
    for _ in range(3):
        results = []
        for model, values in zip((fused, plain), steps, strict=True):
            keras.utils.set_random_seed(3)  # which dropout on PyTorch goes by
            loss, grads = values(x)
            for variable, grad in zip(model.trainable_variables, grads, strict=True):
                variable.assign_sub(rate * grad)
            results.append(([numbers(loss)], [numbers(grad) for grad in grads]))
        (loss, grads), (plain_loss, plain_grads) = results
        assert_close(loss, plain_loss)
        assert_close(grads, plain_grads)
    for ours, theirs in zip(fused.variables, plain.variables, strict=True):
        np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=1e-10, atol=1e-10)
    ours, theirs = (keras.tree.flatten(model.predict(x, verbose=0)) for model in (fused, plain))
    assert_close(ours, theirs)


def chains(model):
    """How many chains there are, and the names of the layers that run by themselves."""
    report = kk.report(model)
    return len(set(report.changed.values())), list(report.kept)


def conv_unit(x, filters=8, kernel_size=1, activation="relu6", **options):
    x = layers.Conv2D(filters, kernel_size, use_bias=False, **options)(x)
    x = layers.BatchNormalization(momentum=0.7)(x)
    return layers.Activation(activation)(x)


def separable(x):
    """What Xception and NASNet are made of, at a stride, and with zeros around."""
    x = layers.SeparableConv2D(8, 3, padding="same", activation="silu", depth_multiplier=2)(x)
    x = layers.ZeroPadding2D(((0, 1), (1, 1)))(x)
    x = layers.SeparableConv2D(8, 3, strides=2, use_bias=False)(x)
    return layers.AveragePooling2D(2)(layers.BatchNormalization()(x))


def squeeze_excite(x):
    """In the spellings of EfficientNet and MobileNet V3."""
    y = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    y = layers.Conv2D(4, 1, activation="silu")(y)
    x = layers.Multiply()([x, layers.Conv2D(8, 1, activation="sigmoid")(y)])
    x = x * keras.ops.sigmoid(x)
    y = layers.Conv2D(8, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x))
    y = layers.ReLU(6.0)(y + 3.0) * (1.0 / 6.0)
    return layers.Multiply()([y, x])


def dense_gates(x):
    """Squeeze-excites by dense layers, of vectors and of single pixels."""
    for keepdims in (False, True):
        y = layers.GlobalAveragePooling2D(keepdims=keepdims)(x)
        y = layers.Dense(3, activation="mish")(y)
        y = layers.Dense(8, activation="sigmoid", use_bias=keepdims)(y)
        y = layers.Reshape((1, 1, 8))(y)
        x = layers.Activation("linear")(layers.Multiply()([x, y]))
    return layers.Conv2D(8, 1)(x)


def hard_swish(x):
    y = layers.Conv2D(8, 1)(x)
    y = layers.Multiply()([y, layers.ReLU(6.0)(3.0 + y) / 6.0])
    return keras.ops.hard_silu(layers.Conv2D(8, 1)(keras.ops.relu(x + y)))


def windows(x):
    """What the engine has for users' models."""
    x = layers.Conv2D(8, (3, 2), padding="same", dilation_rate=(2, 1), activation="gelu")(x)
    x = layers.Conv2D(8, (2, 3), strides=(1, 2), padding="same")(x)
    x = layers.LeakyReLU(0.3)(layers.MaxPooling2D(3, 2, padding="same")(x))
    x = layers.ELU(0.7)(layers.Conv2D(8, 3, activation="leaky_relu", padding="same")(x))
    return layers.ReLU(max_value=4)(layers.AveragePooling2D(2, 1, padding="same")(x))


def branches(x):
    parts = [conv_unit(x, 5), conv_unit(x, 3, 3, padding="same"), x]
    return layers.Concatenate()(parts)


def drop_connect(x):
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    return layers.Add()([layers.Dropout(0.4, noise_shape=(None, 1, 1, 1), seed=3)(y), x])


class Twice(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return 2 * x


def custom_layer(x):
    return conv_unit(Twice()(x), 6)


def shared(x):
    conv, norm = layers.Conv2D(8, 1), layers.BatchNormalization()
    return norm(conv(norm(conv(x))))


def nested(x):
    inner = keras.Input((7, 9, 8))
    model = keras.Model(inner, conv_unit(inner), name="inner")
    tail = [layers.Conv2D(8, 1, kernel_regularizer="l2"), layers.BatchNormalization()]
    return keras.Sequential([model, *tail], name="outer")(x)


def unknown_branch(x):
    return layers.Add()([layers.Lambda(keras.ops.tanh)(conv_unit(x)), conv_unit(x, 8, 1, "silu")])


TAILS = {  # chains, and what is outside but for the last layer
    separable: (1, []),
    squeeze_excite: (1, []),
    dense_gates: (1, []),
    hard_swish: (1, []),
    windows: (1, []),
    branches: (1, []),
    drop_connect: (1, []),
    custom_layer: (2, ["twice"]),
    shared: (1, []),
    nested: (3, []),
    unknown_branch: (3, ["lambda", "add"]),
}


def network(tail, outputs=lambda x, y: y, shape=(7, 9, 3)):
    keras.backend.clear_session()  # names begin anew
    x = keras.Input(shape)
    y = tail(conv_unit(x, kernel_size=3, padding="same", activation="silu"))
    return keras.Model(x, outputs(x, layers.Dense(2, name="head")(y)))


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: tail.__name__)
def test_training(tail):
    fused, plain = pair(network, tail)
    count, outside = TAILS[tail]
    found = chains(fused)
    assert (found[0], set(found[1])) == (count, {*outside, "head"})
    assert_trains_alike(fused, plain, images((7, 9, 3)))


def unet():
    """Three outputs, one of them from inside, and a skip connection."""
    x = keras.Input((8, 12, 3))
    wide = conv_unit(x, kernel_size=3, padding="same")
    deep = conv_unit(conv_unit(wide, strides=2), 6)
    up = layers.Concatenate()([layers.UpSampling2D()(deep), wide])
    end = conv_unit(conv_unit(up, 5), 4, 3, padding="same")
    return keras.Model({"image": x}, [end, {"deep": deep, "mean": layers.Dense(2)(end)}])


def test_several_outputs_and_skip_connections():
    keras.backend.clear_session()
    fused, plain = pair(unet)
    assert chains(fused) == (3, ["up_sampling2d", "concatenate", "dense"])
    x = images((8, 12, 3))
    for training in (False, True):
        ours, theirs = (model({"image": x}, training=training) for model in (fused, plain))
        keras.tree.assert_same_structure(ours, theirs)
        assert_close(
            map(numbers, keras.tree.flatten(ours)), list(map(numbers, keras.tree.flatten(theirs)))
        )


def test_saved_loaded_cloned_and_restored(tmp_path):
    fused, plain = pair(network, nested)
    x = images((7, 9, 3))
    assert fused.get_config() == plain.get_config()
    assert [v.path for v in fused.variables] == [v.path for v in plain.variables]
    fused.save(tmp_path / "model.keras")
    fused.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    expected = numbers(plain(x))
    others = [keras.saving.load_model(tmp_path / "model.keras"), copy.deepcopy(fused)]
    others += [pickle.loads(pickle.dumps(fused)), keras.models.clone_model(fused)]
    others[-1].set_weights(fused.get_weights())
    for model in others:
        with pytest.raises(ValueError, match="does not come from a conversion"):
            kk.report(model)
        np.testing.assert_allclose(numbers(model(x)), expected, rtol=1e-10)
    before = vars(plain).keys()
    assert kk.restore(fused) is fused
    assert vars(fused).keys() == before
    np.testing.assert_array_equal(numbers(fused(x)), expected)


def test_fit_goes_on():
    """Fused and restored between epochs: what Keras has compiled is compiled anew."""
    _, model = pair(network, branches)
    calls = []

    def run(*args, **options):
        calls.append(args)
        return original(*args, **options)

    original, _fusion._run = _fusion._run, run
    try:
        model.compile("sgd", "mse", metrics=["mae"])
        x, y = images((7, 9, 3)), np.zeros((3, 7, 9, 2))
        for change, fuses in ((None, False), (kk.fuse, True), (kk.restore, False)):
            calls.clear()
            if change:
                change(model)
            model.fit(x, y, verbose=0)
            model.evaluate(x, y, verbose=0)
            assert bool(calls) is fuses
    finally:
        _fusion._run = original


def test_partly_frozen():
    """Flags count when they are set, before the step is compiled."""
    fused, plain = pair(network, drop_connect)
    for model in (fused, plain):
        model.layers[1].trainable = False
        model.layers[2].trainable = False
    assert_trains_alike(fused, plain, images((7, 9, 3)))


def test_norms_frozen_in_the_middle(monkeypatch):
    """Each side of them is one operation all the same."""
    results = []

    def run(segment, *args):
        results.append(original(segment, *args))
        return results[-1]

    original = _fusion._run
    monkeypatch.setattr(_fusion, "_run", run)
    fused, plain = pair(network, branches)
    for model in (fused, plain):
        norms = [x for x in model.layers if isinstance(x, layers.BatchNormalization)]
        assert len(norms) > 2
        norms[1].trainable = False
    assert_trains_alike(fused, plain, images((7, 9, 3)))
    assert results
    assert all(y is not None for y in results), "a chain ran layer by layer"


def test_a_variable_takes_the_place_of_an_equal_one():
    """One of one element, which Keras says is equal."""

    def make():
        x = keras.Input((5, 7, 1))
        conv = layers.Conv2D(1, 1, use_bias=False, name="conv")
        return keras.Model(x, layers.ReLU()(conv(x)))

    fused, _ = pair(make)
    conv, x = fused.get_layer("conv"), images((5, 7, 1))
    before = numbers(fused(x))
    plan = _fusion.plan_of(fused)
    conv._tracker.unlock()
    conv._kernel = keras.Variable(numbers(conv.kernel), dtype="float64", name="kernel")
    np.testing.assert_array_equal(numbers(fused(x)), before)
    assert _fusion.plan_of(fused) is not plan
    (kernel,) = _fusion.plan_of(fused).calls.variables.values()
    assert kernel is conv._kernel


def test_sequential():
    def make():
        return keras.Sequential([layers.Input((5, 7, 4)), layers.Conv2D(6, 3), layers.ReLU()])

    fused, plain = pair(make)
    assert chains(fused) == (1, [])
    assert_trains_alike(fused, plain, images((5, 7, 4)))
    with pytest.raises(ValueError, match="has not been built"):
        kk.fuse(keras.Sequential([layers.Conv2D(6, 3)]))


def test_layers_of_a_sequential_model_change():
    """Keras makes another model inside then, which is not fused until `fuse` is called again."""

    def make():
        conv = layers.Conv2D(6, 3, kernel_initializer="ones")
        return keras.Sequential([layers.Input((5, 7, 4)), conv, layers.ReLU(), layers.Flatten()])

    fused, plain = pair(make)
    for model in (fused, plain):
        model.pop()
        model.add(layers.DepthwiseConv2D(2, depthwise_initializer="ones"))
    np.testing.assert_allclose(numbers(fused(images((5, 7, 4)))), numbers(plain(images((5, 7, 4)))))
    assert chains(kk.fuse(fused)) == (1, [])
    assert_trains_alike(fused, plain, images((5, 7, 4)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        x = keras.Input((5, 7, 4))
        self.backbone = keras.Model(x, conv_unit(x), name="backbone")

    def call(self, x, training=None):
        return self.backbone(x, training=training) + 1


def test_a_subclassed_model_with_a_functional_one():
    fused, plain = pair(Subclassed)
    for model in (fused, plain):
        model(images((5, 7, 4)))
    assert chains(fused) == (1, [])
    assert all(name.startswith("backbone/") for name in kk.report(fused).changed)
    assert_trains_alike(fused, plain, images((5, 7, 4)))


def test_bad_models():
    for model in (layers.Conv2D(2, 1), None, keras.Model()):
        with pytest.raises(TypeError, match="expected a"):
            kk.fuse(model)


APPLICATIONS = {  # chains, and what is outside
    "MobileNetV2": (1, ["predictions"]),
    "MobileNetV3Small": (2, ["rescaling", "dropout", "predictions"]),
    "EfficientNetB0": (1, ["rescaling", "normalization", "top_dropout", "predictions"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications(name):
    if BACKEND != "torch" and name != "MobileNetV3Small":
        pytest.skip(f"{BACKEND} takes minutes to compile the model as it is: run on PyTorch")

    def make():
        keras.backend.clear_session()
        kind = getattr(keras.applications, name)
        return kind(weights=None, input_shape=(33, 35, 3), classes=3, classifier_activation=None)

    # Deep networks amplify rounding, and steps of more than this make them diverge.
    fused, plain = pair(make, noise=0.01)
    assert chains(fused) == APPLICATIONS[name]
    assert_trains_alike(fused, plain, images((33, 35, 3)), rate=1e-4)
