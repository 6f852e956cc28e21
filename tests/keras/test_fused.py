"""Networks whose chains of layers run as one operation, beside the same layers one by one."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from keras import layers

import kconv.keras as kk
from kconv.keras._fusion import plan_of as _plan
from kconv.models import create
from kconv.models.fusion import Segment


def graph(activation="silu", rate=0.0, kernels=True, groups=3):
    """A network of all layers that fused segments know, from (N, 9, 9, 4) to (N, 3).

    Without ``kernels`` of Keras's own layers alone.
    """
    pointwise = kk.PointwiseConv2D if kernels else functools.partial(layers.Conv2D, kernel_size=1)
    depthwise = kk.DepthwiseConv2D if kernels else layers.DepthwiseConv2D
    axis = 3 if keras.config.image_data_format() == "channels_last" else 1
    source = keras.Input((9, 9, 4) if axis == 3 else (4, 9, 9))
    x = layers.Conv2D(12, 3, padding="same", use_bias=False)(source)
    x = layers.Activation(activation)(layers.BatchNormalization(axis, momentum=0.5)(x))
    skip = x
    x = pointwise(12, groups=groups, use_bias=False)(x)
    x = layers.Activation(activation)(layers.BatchNormalization(axis, epsilon=1e-2)(x))
    x = kk.InterleaveChannels(4)(x) if kernels else x
    x = depthwise(3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(axis, scale=False)(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Activation("sigmoid")(pointwise(12)(gate))
    x = layers.Multiply()([x, gate])
    x = layers.Dropout(rate, noise_shape=(None, 1, 1, 1))(x)
    x = layers.Add()([x, skip])
    x = layers.Concatenate(axis)([x, kk.CopyChannels(2, 5)(skip)]) if kernels else x
    x = depthwise(5, strides=2)(layers.ZeroPadding2D(2)(x))
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


def penalty_gradients(model, x, training):
    """Gradients by the weights of the squared gradient by the image."""
    backend, weights = keras.backend.backend(), [v.value for v in model.trainable_variables]
    if backend == "jax":
        import jax

        others = [v.value for v in model.non_trainable_variables]

        def output(weights, x):
            y, _ = model.stateless_call(weights, others, x, training=training)
            return (y**2).sum()

        def penalty(weights):
            return (jax.grad(output, 1)(weights, x) ** 2).sum()

        return [numbers(g) for g in jax.jit(jax.grad(penalty))(weights)]
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(x):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = tf.reduce_sum(model(x, training=training) ** 2)
                penalty = tf.reduce_sum(inner.gradient(y, x) ** 2)
            return outer.gradient(penalty, weights, unconnected_gradients="zero")

        return [numbers(g) for g in run(tf.constant(x))]
    import torch

    x = torch.tensor(x, requires_grad=True)
    (dx,) = torch.autograd.grad((model(x, training=training) ** 2).sum(), x, create_graph=True)
    grads = torch.autograd.grad((dx**2).sum(), weights, allow_unused=True)
    pairs = zip(grads, weights, strict=True)
    return [numbers(torch.zeros_like(w) if g is None else g) for g, w in pairs]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_gradients(training):
    models = pair(kernels=False, groups=1)  # TensorFlow compiles groups, which takes long
    ours, theirs = (penalty_gradients(model, images(3), training) for model in models)
    for a, b in zip(ours, theirs, strict=True):
        bound = 1e-3 * np.abs(b).max() + 1e-5 * max(np.abs(g).max() for g in theirs)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def transformed(output, moved, weights, x):
    import jax
    import jax.numpy as jnp

    def of_bias(bias):
        return output([*weights[:-1], bias], x)

    def of_image(weights, image):
        return output(weights, image[None])

    pairs = [jnp.stack([w, 2 * w]) for w in weights]
    return [
        jax.jvp(output, (weights, x), (weights, x))[1],
        jax.jit(jax.hessian(of_bias))(weights[-1]),
        jax.jit(jax.vmap(jax.grad(of_image), (None, 0)))(weights, x),
        jax.vmap(output, (0, None))(pairs, x),
        jax.grad(jax.checkpoint(output))(weights, x),
        jax.grad(moved)(weights, x),
    ]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's transformations")
@pytest.mark.parametrize("training", [False, True])
def test_jax_transformations(training):
    """Forward mode, both modes together, and batches of images and of weights."""
    import jax
    import jax.numpy as jnp

    results = []
    for fused in (True, False):
        keras.utils.set_random_seed(0)
        unit = kk.ConvUnit(8, 3, groups=2, residual=True, fused=fused)
        x = jnp.asarray(images(3)[..., :2].repeat(4, -1))
        unit(x)
        model = unit.network if fused else kk.to_native(unit.network)
        weights = [v.value for v in model.trainable_variables]
        others = [v.value for v in model.non_trainable_variables]

        def output(weights, x, model=model, others=others):
            return (model.stateless_call(weights, others, x, training=training)[0] ** 2).sum()

        def moved(weights, x, model=model, others=others):
            state = model.stateless_call(weights, others, x, training=training)[1]
            return sum((value**2).sum() for value in state)

        results.append(transformed(output, moved, weights, x))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-5)


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


@pytest.fixture
def policy(request):
    """Keras's dtype policy, and the float32 network that has the same weights."""
    exact, _ = pair()
    keras.config.set_dtype_policy(request.param)
    yield request.param, exact
    keras.config.set_dtype_policy("float32")


def trained(model):
    """The output, and how a step of training changes the weights."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    before = [numbers(w.value).astype(np.float32) for w in model.weights]
    y = numbers(keras.ops.cast(model(images()), "float32"))
    model.train_on_batch(images(), np.arange(6) % 3)
    after = [numbers(w.value).astype(np.float32) for w in model.weights]
    return [y, *(a - b for a, b in zip(after, before, strict=True))]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"], indirect=True)
def test_bfloat16(policy):
    """What is stored is bfloat16, what is computed float32, and so no worse than layer by layer."""
    name, exact = policy
    fused, plain = pair()
    assert any(isinstance(part, Segment) for part in _plan(fused).parts)
    for model in (fused, plain):
        model.set_weights(exact.get_weights())
    assert fused.variables[0].dtype == ("float32" if name == "mixed_bfloat16" else "bfloat16")
    assert fused(images()).dtype == plain(images()).dtype
    expected, ours, layers = map(trained, (exact, fused, plain))

    def errors(found):
        largest = max(np.abs(value).max() for value in expected[1:])
        scales = [max(np.abs(value).max(), 0.1 * largest) for value in expected]
        return [np.abs(a - b).max() / s for a, b, s in zip(found, expected, scales, strict=True)]

    assert max(errors(ours)) < 1.5 * max(*errors(layers), 0.03)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_float16_runs_layer_by_layer(policy):
    fused, _ = pair()
    assert not _plan(fused).fuses
    assert fused(images()).shape == (6, 3)


def test_recomputation():
    """A network of a spec that computes anew what it has not kept."""
    spec = create("keffnet_s", ktype="D6_4ch", classes=3, input_shape=(16, 16, 3), dropout=0.0)
    models = []
    for recompute in (False, True):
        keras.utils.set_random_seed(1)
        models.append(kk.build(spec, recompute=recompute))
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    for model in models:
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        model.train_on_batch(x, np.arange(4) % 3)
        (segment,) = (part for part in _plan(model).parts if isinstance(part, Segment))
        assert segment.recompute == model.recompute
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="recompute=True"):
        kk.build(spec, fused=False, recompute=True)
