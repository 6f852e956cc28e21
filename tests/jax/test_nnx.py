"""The Flax layers against Flax's own."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kconv.jax.nnx import DepthwiseConv, InterleaveChannels, PointwiseConv
from kconv.ktypes import interleave_index


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), np.float32)


def value_and_gradients(layer, x):
    """Of a loss, by the input and every parameter, under jit."""

    @nnx.jit
    def run(layer, x):
        def loss(layer, x):
            return (layer(x) ** 2).sum()

        return nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)

    return jax.tree.leaves(run(layer, x))


def assert_same(ours, theirs, x):
    """Both layers have the same parameters to begin with, outputs and gradients."""
    pairs = zip(
        jax.tree.leaves(nnx.state(ours, nnx.Param)) + value_and_gradients(ours, x),
        jax.tree.leaves(nnx.state(theirs, nnx.Param)) + value_and_gradients(theirs, x),
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(2,), (), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"use_bias": False, "kernel_init": nnx.initializers.ones}])
def test_pointwise_is_conv(options, lead):
    ours = PointwiseConv(12, 8, groups=4, rngs=nnx.Rngs(1), **options)
    theirs = nnx.Conv(12, 8, (1, 1), feature_group_count=4, rngs=nnx.Rngs(1), **options)
    assert_same(ours, theirs, random(*lead, 5, 3, 12))


def test_interleave():
    x, index = random(2, 5, 3, 6), np.array(interleave_index(8, 3))
    plain, fused = (PointwiseConv(6, 8, 2, step, rngs=nnx.Rngs(1)) for step in (1, 3))
    for layer in (plain, fused):
        layer.bias[...] = jnp.arange(8.0)
    np.testing.assert_allclose(fused(x), plain(x)[..., index], rtol=1e-6)
    np.testing.assert_array_equal(fused(x), InterleaveChannels(3)(plain(x)))


@pytest.mark.parametrize(
    ("kernel", "strides", "padding"),
    [(3, 1, "SAME"), (5, 2, "SAME"), (3, 2, "VALID"), (7, 1, 2), (3, 2, ((0, 1), (1, 0)))],
)
def test_depthwise_is_conv(kernel, strides, padding):
    ours = DepthwiseConv(6, kernel, strides, padding, rngs=nnx.Rngs(1))
    theirs = nnx.Conv(
        6, 6, (kernel, kernel), strides, padding=padding, feature_group_count=6, rngs=nnx.Rngs(1)
    )
    assert_same(ours, theirs, random(2, 9, 8, 6))


def mask(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(0, 2, shape), np.float32)


def doubled(*args, **kwargs):
    return 2 * jax.lax.conv_general_dilated(*args, **kwargs)


COMMON = [
    {"strides": (1, 2)},
    {"strides": None},
    {"padding": "CIRCULAR", "strides": 2},
    {"padding": "REFLECT"},
    {"padding": "SAME_LOWER"},
    {"padding": [1, (0, 2)]},
    {"padding": 1},
    {"input_dilation": 2, "padding": 1},
    {"kernel_dilation": (2, 1)},
    {"preferred_element_type": jnp.float64},
    {"precision": "highest"},
    {"use_bias": False, "param_dtype": jnp.float16},
    {"dtype": jnp.float16},
    {"conv_general_dilated": doubled},
    {"promote_dtype": lambda arrays, dtype: [None if a is None else a * 2 for a in arrays]},
    {"kernel_init": nnx.initializers.ones, "bias_init": nnx.initializers.ones},
    {"kernel_metadata": {"note": "a"}, "bias_metadata": {"note": "b"}},
]
OURS_AND_THEIRS = {
    "pointwise": (partial(PointwiseConv, 6, 6), partial(nnx.Conv, 6, 6, (1, 1))),
    "depthwise": (
        partial(DepthwiseConv, 6, 3),
        partial(nnx.Conv, 6, 6, (3, 3), feature_group_count=6),
    ),
}
CASES = [(kind, options) for kind in OURS_AND_THEIRS for options in COMMON]
CASES += [
    ("pointwise", {"mask": mask(1, 1, 6, 6)}),
    ("pointwise", {"mask": mask(1, 1, 2, 6), "feature_group_count": 3}),
    ("depthwise", {"mask": mask(3, 3, 1, 6)}),
]


def test_the_table_has_all_arguments_of_the_parent():
    given = {"in_features", "out_features", "kernel_size", "rngs", "self"}
    tried = {name for _, options in CASES for name in options}
    assert set(inspect.signature(nnx.Conv.__init__).parameters) == given | tried


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_arguments_of_the_parent(kind, options):
    ours, theirs = (make(rngs=nnx.Rngs(1), **options) for make in OURS_AND_THEIRS[kind])
    for x in (random(2, 7, 6, 6), random(7, 6, 6)):
        actual, expected = ours(x), theirs(x)
        assert actual.dtype == expected.dtype
        tolerance = 1e-2 if actual.dtype == jnp.float16 else 1e-5
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    if kind == "pointwise":
        mixed = PointwiseConv(6, 6, interleave=4, rngs=nnx.Rngs(1), **options)(x)
        np.testing.assert_allclose(mixed, actual[..., interleave_index(6, 4)], rtol=1e-6)


@pytest.mark.parametrize("kind", OURS_AND_THEIRS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strides", 3),
        ("strides", 2),
        ("padding", "VALID"),
        ("padding", "CIRCULAR"),
        ("padding", ((2, 0), (0, 1))),
        ("kernel_dilation", 2),
        ("use_bias", False),
        ("dtype", jnp.bfloat16),
        ("conv_general_dilated", doubled),
        ("mask", None),
    ],
)
def test_attributes_set_afterwards(kind, name, value):
    ours, theirs = (make(rngs=nnx.Rngs(1)) for make in OURS_AND_THEIRS[kind])
    x = random(2, 7, 6, 6)
    for layer in (ours, theirs):
        layer(x)
        setattr(layer, name, nnx.data(mask(*layer.kernel_shape)) if name == "mask" else value)
    np.testing.assert_allclose(
        ours(x), theirs(x), rtol=1e-5, atol=1e-2 if name == "dtype" else 1e-5
    )


@pytest.mark.parametrize("dtype", [np.complex64, np.int32, np.uint8, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("kind", OURS_AND_THEIRS)
def test_input_of_any_dtype(kind, dtype):
    ours, theirs = (make(rngs=nnx.Rngs(1)) for make in OURS_AND_THEIRS[kind])
    x = (3 * random(2, 5, 4, 6)).astype(dtype)
    assert ours(x).dtype == theirs(x).dtype
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-4)
    order = np.array(interleave_index(6, 4))
    np.testing.assert_array_equal(InterleaveChannels(4)(x), x[..., order])


def test_dtype():
    layer = PointwiseConv(6, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(random(1, 2, 2, 6)).dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32
    assert PointwiseConv(6, 4, rngs=nnx.Rngs(0))(random(1, 2, 2, 6)).dtype == jnp.float32


def test_state_goes_into_another_model():
    models = [
        nnx.Sequential(
            PointwiseConv(6, 4, 2, 2, rngs=nnx.Rngs(i)),
            InterleaveChannels(2),
            DepthwiseConv(4, 3, rngs=nnx.Rngs(i)),
        )
        for i in range(2)
    ]
    x = random(1, 4, 4, 6)
    assert not np.allclose(models[0](x), models[1](x))
    nnx.update(models[1], nnx.state(models[0]))
    np.testing.assert_array_equal(models[0](x), models[1](x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rngs: PointwiseConv(6, 9, groups=2, rngs=rngs), "out_features=9 .* groups=2"),
        (lambda rngs: PointwiseConv(6, 8, groups=0, rngs=rngs), "groups=0"),
        (lambda rngs: PointwiseConv(6, 6, 2, feature_group_count=3, rngs=rngs), "groups=2"),
        (lambda rngs: PointwiseConv(6, 6, padding="full", rngs=rngs)(random(1, 4, 4, 6)), "full"),
        (lambda rngs: PointwiseConv(6, 8, interleave=0, rngs=rngs), "interleave=0"),
        (lambda rngs: DepthwiseConv(6, 4, rngs=rngs), "kernel_size=4"),
        (lambda rngs: DepthwiseConv(6, 3, strides=3, rngs=rngs), "strides=3"),
        (lambda rngs: DepthwiseConv(6, 3, padding="full", rngs=rngs)(random(1, 4, 4, 6)), "full"),
        (lambda rngs: InterleaveChannels(0), "step=0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
