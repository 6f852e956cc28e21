"""Flax's networks and blocks: fused as layer by layer, and as Keras's of the same spec."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kconv.jax._operations import operations
from kconv.jax.nnx import ConvUnit, MBConv, build, create_model
from kconv.models import create

BLOCKS = [
    (ConvUnit, 16, {"groups": 4, "interleave": 4}),
    (ConvUnit, 24, {"groups": 12, "kernel_size": 3, "strides": 2, "activation": None}),
    (ConvUnit, 12, {"kernel_size": 3, "residual": True, "activation": "relu6"}),
    (MBConv, 12, {"ktype": "D6_4ch", "expand_ratio": 2, "drop_connect": 0.4}),
    (MBConv, 20, {"ktype": None, "expand_ratio": 1, "strides": 2, "activation": "hard_swish"}),
]


def images(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), np.float32)


def pair(kind, *args, **options):
    return [kind(*args, rngs=nnx.Rngs(0), fused=fused, **options) for fused in (True, False)]


@nnx.jit
def gradients(network, x):
    """A loss, its gradients by parameters and image; running averages move."""

    def loss(network, x):
        return (network(x) ** 2).sum()

    return nnx.value_and_grad(loss, argnums=(0, 1))(network, x)


def assert_close(ours, theirs, bound=1e-4):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    largest = max(abs(value).max() for value in theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(abs(b).max(), 1e-2 * largest))


def in_training(network):
    network.train()
    return network


def in_inference(network):
    network.eval()
    return network


def runs_fused(network, x):
    kind, state = nnx.split(network)
    made = jax.make_jaxpr(lambda state, x: nnx.merge(kind, state)(x))(state, x)
    return "kconv_fused" in str(made)


@pytest.mark.parametrize(("kind", "features", "options"), BLOCKS)
def test_fused_and_plain(kind, features, options):
    fused, plain = pair(kind, 12, features, **options)
    x = images(6, 9, 5, 12)
    assert runs_fused(in_inference(fused), x)
    assert not runs_fused(in_inference(plain), x)
    for network in (in_training(fused), in_training(plain)):
        assert network(x[:1, :1]).shape[-1] == features  # another size, and a mask drawn by both
    assert_close(gradients(fused, x), gradients(plain, x))
    averages = [nnx.state(network, nnx.BatchStat) for network in (fused, plain)]
    assert_close(*averages)
    assert any(abs(value).max() > 0.01 for value in jax.tree.leaves(averages[0]))
    assert_close(in_inference(fused)(x), in_inference(plain)(x))
    assert_close(gradients(fused, x), gradients(plain, x))


@pytest.mark.parametrize("name", ["keffnet_b0", "mobilenet_v3_small"])
def test_as_keras_builds_it(name):
    """With copied weights, in inference and in training."""
    import kconv.keras

    spec = create(name, classes=5, input_shape=(33, 35, 3))
    keras_model = kconv.keras.build(spec)
    network = build(spec, rngs=nnx.Rngs(0))
    names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    values = np.random.default_rng(1)
    for layer in keras_model.layers:
        for variable in layer.weights:
            if variable.dtype == "float32":
                variable.assign(variable + 0.1 * values.random(variable.shape))
                ours = getattr(
                    getattr(network, layer.name), names.get(variable.name, variable.name)
                )
                ours[...] = jnp.asarray(variable.value).reshape(ours.shape)
    count = sum(value.size for value in jax.tree.leaves(nnx.state(network, nnx.Param)))
    assert count == sum(v.value.size for v in keras_model.trainable_weights)
    x = images(4, 33, 35, 3)
    np.testing.assert_allclose(
        nnx.jit(lambda network, x: network(x))(in_inference(network), x), keras_model(x), atol=1e-5
    )


def test_training_lowers_the_loss():
    """A whole loop: jit, an optimizer's step, train and eval."""
    unit = MBConv(4, 4, expand_ratio=2, drop_connect=0.2, rngs=nnx.Rngs(0))
    x, target = images(8, 6, 6, 4), images(8, 6, 6, 4)[::-1]

    @nnx.jit
    def step(unit, x):
        loss, grads = nnx.value_and_grad(lambda unit: ((unit(x) - target) ** 2).mean())(unit)
        params = nnx.state(unit, nnx.Param)
        nnx.update(unit, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return loss

    losses = [float(step(unit, x)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    copy = nnx.clone(in_inference(unit))
    assert runs_fused(copy, x)
    np.testing.assert_array_equal(copy(x), unit(x))


def test_what_is_changed_runs_by_itself():
    fused, plain = pair(ConvUnit, 6, 8)
    x = images(3, 5, 4, 6)

    def epsilon(unit):
        unit.bn.epsilon = 0.5

    def other_layer(unit):
        unit.conv = nnx.Conv(6, 8, (3, 3), rngs=nnx.Rngs(1))

    def half(unit):
        unit.conv.dtype = jnp.float16

    for change in (epsilon, other_layer, half):
        for unit in (fused, plain):
            change(unit)
        assert not runs_fused(in_inference(fused), x)
        for unit in (fused, plain):
            unit.train()
        assert_close(gradients(fused, x), gradients(plain, x), 1e-3)


def test_some_averages_running():
    fused, plain = pair(MBConv, 6, 6, ktype=None)
    x = images(3, 5, 4, 6)
    for block in (fused, plain):
        next(m for _, m in nnx.iter_modules(block) if isinstance(m, nnx.BatchNorm)).eval()
    assert not runs_fused(fused, x)
    assert_close(gradients(fused, x), gradients(plain, x))


def test_gradients_of_gradients():
    fused, plain = pair(ConvUnit, 6, 8, groups=2)
    x = images(3, 5, 4, 6)

    def penalty(unit):
        split = nnx.split(unit)

        def inner(x):
            return (nnx.merge(*split)(x) ** 2).sum()

        return (jax.grad(inner)(x) ** 2).sum()

    assert_close(*(nnx.grad(penalty)(in_inference(unit)) for unit in (fused, plain)), 1e-3)


def test_inputs():
    unit = ConvUnit(6, 8, rngs=nnx.Rngs(0))
    assert unit(jnp.ones((2, 4, 3, 6), jnp.bfloat16)).dtype == jnp.float32  # as the layers promote
    for shape in ((2, 4, 3, 5), (4, 3, 6)):
        with pytest.raises(ValueError, match="expected"):
            unit(jnp.ones(shape))
    with pytest.raises(ValueError, match="activation"):
        ConvUnit(6, 8, activation="cosine", rngs=nnx.Rngs(0))


def test_what_is_missing_is_named():
    for options in ({}, {"rngs": 0}):
        with pytest.raises(TypeError, match=r"rngs=\w+, expected flax\.nnx\.Rngs"):
            create_model("keffnet_s", image_size=8, **options)
        with pytest.raises(
            TypeError, match=r"jax\.nnx\.create_model\('keffnet_s'\) builds by name"
        ):
            build("keffnet_s", **options)


def test_average_pools_of_half_precision():
    """A sum of ones in bfloat16 stops at 256, one of hundreds in float16 is infinite."""
    for dtype, value in ((jnp.bfloat16, 1), (jnp.float16, 100)):
        x = jnp.full((1, 33, 32, 2), value, dtype)
        for padding, size in (("valid", 32), ("same", 33)):
            y = operations.average_pool(x, size, 1, padding, "channels_last")
            assert y.dtype == dtype
            assert (y == value).all()


def test_bfloat16():
    """Parameters and images of bfloat16: no worse than layer by layer."""
    x = images(6, 9, 9, 12).astype(jnp.bfloat16)
    options = {"ktype": "D6_4ch", "dtype": jnp.bfloat16}
    fused, plain = pair(MBConv, 12, 12, **options)
    exact, _ = pair(MBConv, 12, 12, ktype="D6_4ch")
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), nnx.state(fused, nnx.Param))
    nnx.update(exact, wide)
    assert runs_fused(fused, x)
    wide = [exact, x.astype(jnp.float32)]
    results = [gradients(*wide), gradients(fused, x), gradients(plain, x)]
    assert results[1][0].dtype == jnp.bfloat16
    leaves = [[np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(r)] for r in results]
    worst = [
        max(abs(a - b).max() / abs(b).max() for a, b in zip(found, leaves[0], strict=True))
        for found in leaves[1:]
    ]
    assert worst[0] < max(worst[1], 0.05), worst
