"""kconv.jax against JAX's own convolutions, under every transformation."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import kconv.jax
from kconv.ktypes import interleave_index

POINTWISE = [  # N, H, W, C_in, C_out, groups, interleave
    (2, 5, 7, 8, 6, 2, 3),
    (1, 1, 1, 30, 20, 10, 1),
    (3, 4, 3, 18, 9, 3, 4),
    (0, 4, 4, 6, 4, 2, 2),
]
DEPTHWISE = [  # N, H, W, C, k, stride, padding
    (2, 9, 8, 5, 3, 1, "same"),
    (2, 9, 8, 5, 5, 2, "same"),
    (1, 8, 9, 3, 3, 2, "valid"),
    (1, 7, 7, 4, 7, 1, 2),
    (2, 6, 5, 3, 3, 2, ((0, 1), (1, 0))),
]
LAYOUTS = ["NCHW", "NHWC"]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def random(*shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def lax_conv(x, w, stride, padding, groups, layout):
    """JAX's own convolution; ``w`` is (O, I, k, k)."""
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, feature_group_count=groups,
        dimension_numbers=(layout, "OIHW", layout),
    )  # fmt: skip


def pointwise_case(case, layout, dtype=np.float64):
    """kconv's function and JAX's, with their arguments."""
    n, h, w, c_in, c_out, groups, step = case
    x = random(*((n, c_in, h, w) if layout == "NCHW" else (n, h, w, c_in)), dtype=dtype)
    weight, bias = random(c_out, c_in // groups, seed=1, dtype=dtype), random(c_out, dtype=dtype)
    index = np.array(interleave_index(c_out, step))
    axis = layout.index("C")

    def ours(x, weight, bias):
        return kconv.jax.pointwise_conv(
            x, weight, bias, groups=groups, interleave=step, layout=layout
        )

    def reference(x, weight, bias):
        y = lax_conv(x, weight[:, :, None, None], 1, "VALID", groups, layout)
        y += bias.reshape([-1 if i == axis else 1 for i in range(4)])
        return jnp.take(y, index, axis)

    return ours, reference, (x, weight, bias)


def depthwise_case(case, layout, dtype=np.float64):
    n, h, w, c, k, stride, padding = case
    x = random(*((n, c, h, w) if layout == "NCHW" else (n, h, w, c)), dtype=dtype)
    weight, bias = random(c, k, k, seed=1, dtype=dtype), random(c, dtype=dtype)
    axis = layout.index("C")
    pads = {int: lambda p: ((p, p), (p, p)), str: str.upper, tuple: lambda p: p}

    def ours(x, weight, bias):
        return kconv.jax.depthwise_conv(
            x, weight, bias, stride=stride, padding=padding, layout=layout
        )

    def reference(x, weight, bias):
        y = lax_conv(x, weight[:, None], stride, pads[type(padding)](padding), c, layout)
        return y + bias.reshape([-1 if i == axis else 1 for i in range(4)])

    return ours, reference, (x, weight, bias)


CASES = [
    pytest.param(make, case, id=f"{make.__name__}-{'-'.join(map(str, case))}")
    for make, cases in ((pointwise_case, POINTWISE), (depthwise_case, DEPTHWISE))
    for case in cases
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "case"), CASES)
def test_value_and_gradients(make, case, layout):
    ours, reference, args = make(case, layout)
    y, vjp = jax.vjp(jax.jit(ours), *args)
    expected, expected_vjp = jax.vjp(reference, *args)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    g = random(*y.shape, seed=2)
    for ours_grad, expected_grad in zip(vjp(g), expected_vjp(g), strict=True):
        np.testing.assert_allclose(ours_grad, expected_grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("make", "case"), [CASES[0], CASES[5]])
def test_finite_differences_of_second_order(make, case):
    ours, _, args = make(case, "NHWC")
    check_grads(lambda *a: jnp.sin(ours(*a)), args, order=2, modes=["rev"])


def test_forward_mode_raises_instead_of_giving_zero():
    ours, _, args = pointwise_case(POINTWISE[0], "NHWC")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(ours, args, args)


@pytest.mark.parametrize("mapped", [(0, None, None), (1, None, None), (0, 0, None), (None, 1, 0)])
@pytest.mark.parametrize(("make", "case"), [CASES[0], CASES[5]])
def test_vmap(make, case, mapped):
    ours, reference, args = make(case, "NCHW")
    args = [
        a if axis is None else jnp.stack([a, a + 1, 2 * a], axis)
        for a, axis in zip(args, mapped, strict=True)
    ]

    def per_example_gradients(function):
        def loss(*a):
            return (function(*a) ** 2).sum()

        return jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), mapped)

    ours_result = jax.jit(per_example_gradients(ours))(*args)
    expected = per_example_gradients(reference)(*args)
    for a, b in zip(jax.tree.leaves(ours_result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_vmap_over_images_is_one_call():
    ours, _, (x, weight, bias) = pointwise_case(POINTWISE[0], "NHWC")
    batches = jnp.stack([x, x + 1, x - 1])
    program = jax.jit(jax.vmap(ours, (0, None, None))).lower(batches, weight, bias).as_text()
    assert program.count("kconv_pointwise_conv") == 1
    assert "stablehlo.while" not in program


def test_scan_and_remat():
    weight, x = random(6, 3), random(2, 4, 4, 6)

    def loss(convolution, x, weight):
        def layer(x, _):
            return jnp.tanh(convolution(x, weight)), None

        return jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0].sum()

    def ours(x, w):
        return kconv.jax.pointwise_conv(x, w, groups=2, layout="NHWC")

    def reference(x, w):
        return lax_conv(x, w[:, :, None, None], 1, "VALID", 2, "NHWC")

    gradients = [
        jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(f, x, weight) for f in (ours, reference)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "step"), [(6, 3), (7, 3), (5, 9), (4, 1)])
def test_interleave(channels, step, layout):
    x = random(*((2, channels, 3, 1) if layout == "NCHW" else (2, 3, 1, channels)))
    index = np.array(interleave_index(channels, step))
    axis = layout.index("C")

    def ours(x):
        return kconv.jax.interleave(x, step, layout=layout)

    y, vjp = jax.vjp(jax.jit(ours), x)
    np.testing.assert_array_equal(y, jnp.take(x, index, axis))
    np.testing.assert_array_equal(vjp(y)[0], x)
    np.testing.assert_array_equal(kconv.jax.deinterleave(y, step, layout=layout), x)
    check_grads(lambda x: jnp.sin(ours(x)), (x,), order=2, modes=["rev"])
    batches = jnp.stack([x, x + 1])
    np.testing.assert_array_equal(jax.vmap(ours)(batches)[1], ours(x + 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_summed_in_float32(dtype):
    ours, _, args = pointwise_case(POINTWISE[0], "NHWC", dtype)
    narrow = ours(*args)
    assert narrow.dtype == dtype
    wide = ours(*(a.astype(np.float32) for a in args))
    np.testing.assert_array_equal(narrow, wide.astype(dtype))
    gradients = jax.grad(lambda *a: ours(*a).sum(), (0, 1, 2))(*args)
    assert all(g.dtype == dtype for g in gradients)


def test_keras_weights_need_no_transposition():
    x, weight = random(2, 4, 4, 8), random(1, 1, 4, 6)
    y = kconv.jax.pointwise_conv(x, weight, groups=2, layout="NHWC", weight_layout="IO")
    expected = kconv.jax.pointwise_conv(x, weight[0, 0].T, groups=2, layout="NHWC")
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    depth = random(3, 3, 8, 1)
    y = kconv.jax.depthwise_conv(x, depth, layout="NHWC", weight_layout="IO")
    expected = kconv.jax.depthwise_conv(x, depth[..., 0].transpose(2, 0, 1), layout="NHWC")
    np.testing.assert_allclose(y, expected, rtol=1e-12)


X, W, D = (np.ones(shape, np.float32) for shape in ((2, 8, 4, 4), (6, 4), (8, 3, 3)))
BIAS = np.ones(5, np.float32)
BAD_POINTWISE = [
    ((X, W), {"groups": 3}, ValueError, "in_channels=8 .* groups=3"),
    ((X, W), {"groups": 0}, ValueError, "groups=0"),
    ((X, W), {"groups": 2, "interleave": 0}, ValueError, "interleave=0"),
    ((X, W), {"groups": 2, "layout": "CHWN"}, ValueError, "CHWN"),
    ((X, W), {"groups": 2, "weight_layout": "HW"}, ValueError, "HW"),
    ((X[0], W), {"groups": 2}, ValueError, "shape"),
    ((X, W, BIAS), {"groups": 2}, ValueError, "bias"),
    ((X.astype(int), W), {"groups": 2}, TypeError, "int64"),
    ((X.astype(float), W), {"groups": 2}, TypeError, "float64, float32"),
]
BAD_DEPTHWISE = [
    ((X, np.ones((8, 4, 4), np.float32)), {}, ValueError, "kernel_size=4"),
    ((X, D[:7]), {}, ValueError, "weight"),
    ((X, D), {"stride": 3}, ValueError, "stride=3"),
    ((X, D), {"padding": "full"}, ValueError, "full"),
]


@pytest.mark.parametrize(("args", "keywords", "error", "message"), BAD_POINTWISE)
def test_bad_pointwise(args, keywords, error, message):
    with pytest.raises(error, match=message):
        kconv.jax.pointwise_conv(*args, **keywords)


@pytest.mark.parametrize(("args", "keywords", "error", "message"), BAD_DEPTHWISE)
def test_bad_depthwise(args, keywords, error, message):
    with pytest.raises(error, match=message):
        kconv.jax.depthwise_conv(*args, **keywords)


def test_bad_interleave():
    with pytest.raises(ValueError, match="step=0"):
        kconv.jax.interleave(X, 0)


def test_handlers_refuse_what_does_not_fit():
    """Whoever calls a handler by hand gets XLA's error with kconv's message, not a crash."""
    kconv.jax.pointwise_conv(X, W, groups=2)  # registers the handlers
    attributes = {"groups": np.int64(2), "interleave": np.int64(1), "layout": "NCHW"}

    def call(*operands, shape=(2, 6, 4, 4), dtype=np.float32, **attributes):
        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.ffi.ffi_call("kconv_pointwise_conv", result)(*operands, **attributes)

    with pytest.raises(jax.errors.JaxRuntimeError, match="weight_layout is missing"):
        call(X, W, **attributes)
    attributes["weight_layout"] = "OI"
    message = (
        r"weight has shape \[6, 4\], expected .* with C_in/groups=8 for in_channels=8, groups=1"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(X, W, shape=(2, 6, 4, 4), **{**attributes, "groups": np.int64(1)})
    message = r"output has shape \[2, 5, 4, 4\], expected \[2, 6, 4, 4\]"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(X, W, shape=(2, 5, 4, 4), **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected float32, float64 or bfloat16"):
        call(X, W, dtype=np.float16, **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="differ in type"):
        call(X.astype(np.float64), W, **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="operands"):
        call(X, **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected an integer"):
        call(X, W, **{**attributes, "groups": "two"})


FALLBACK = """
import warnings, jax, numpy as np, kconv.jax
def refuse(*args, **kwargs):
    raise RuntimeError("wrong version")
jax.ffi.register_ffi_target = refuse
x, w = np.ones((2, 8, 4, 4), np.float32), np.ones((6, 4), np.float32)
d = np.ones((8, 3, 3), np.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = kconv.jax.pointwise_conv(x, w, groups=2, interleave=3)
    loss = lambda x, d: kconv.jax.depthwise_conv(x, d, stride=2).sum()
    dx, dd = jax.jit(jax.grad(loss, (0, 1)))(x, d)
assert y.shape == (2, 6, 4, 4) and (y == 4).all()
assert float(dd[0, 1, 1]) == 8 and dx.shape == x.shape
assert len([w for w in caught if "wrong version" in str(w.message)]) == 1
print("fallback works")
"""


def test_fallback_to_callbacks_with_one_warning():
    run = subprocess.run([sys.executable, "-c", FALLBACK], capture_output=True, text=True)
    assert run.stdout == "fallback works\n", run.stderr


def test_export_with_any_batch_size():
    x, weight = random(3, 4, 4, 8, dtype=np.float32), random(6, 4, dtype=np.float32)

    def convolve(x, weight):
        return kconv.jax.pointwise_conv(x, weight, groups=2, interleave=3, layout="NHWC")

    (n,) = export.symbolic_shape("n")
    allowed = export.DisabledSafetyCheck.custom_call("kconv_pointwise_conv")
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((n, 4, 4, 8), (6, 4))]
    program = export.export(jax.jit(convolve), disabled_checks=[allowed])(*shapes)
    again = export.deserialize(program.serialize())
    np.testing.assert_array_equal(again.call(x, weight), convolve(x, weight))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, kconv.jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), np.float32)

x, *weights = random(4, 5, 5, 8), random(6, 4), random(6), random(3, 3, 6)

def network(x, w, b, d):
    y = kconv.jax.pointwise_conv(x, w, b, groups=2, interleave=3, layout="NHWC")
    y = kconv.jax.interleave(y, 2, layout="NHWC")
    return kconv.jax.depthwise_conv(y, d, stride=2, layout="NHWC", weight_layout="IO")

def loss(*args):
    return (network(*args) ** 2).sum()

def first(loss):
    return jax.grad(loss, (0, 1, 2, 3))

def second(loss):
    return first(lambda *args: sum((g**2).sum() for g in first(loss)(*args)))

EXPECTED = {order: order(loss)(x, *weights) for order in (first, second)}

def check(loss, x, orders=(first, second)):
    for order in orders:
        actual = jax.jit(order(loss))(x, *weights)
        for a, e in zip(actual, EXPECTED[order]):
            np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3 * float(abs(e).max()))

# What every device does is told by hand.
auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
for check_vma in (True, False):
    sharded = jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), "data"), mesh=auto,
        in_specs=(P("data"), P(), P(), P()), out_specs=P(), check_vma=check_vma)
    check(sharded, x)

# The compiler splits the work as the images are; channels that are split are brought together.
split = jax.device_put(x, NamedSharding(auto, P("data")))
check(loss, split)
step = jax.jit(first(loss)).lower(split, *weights).compile()
assert "all-gather" not in step.as_text() and "all-reduce" in step.as_text()
assert jax.jit(network)(split, *weights).sharding.spec == P("data")
assert network(split, *weights).sharding.spec == P("data")
assert first(loss)(split, *weights)[0].sharding.spec == P("data")
check(loss, jax.device_put(x, NamedSharding(auto, P(None, None, None, "data"))), [first])
three = jax.jit(network)(x[:3], *weights)
np.testing.assert_allclose(three, network(x, *weights)[:3], rtol=1e-5)

# A fused network's layers divide the work; its batch norm has the statistics of all images.
import keras
from kconv.keras import ConvUnit
unit, plain = ConvUnit(6), ConvUnit(6, fused=False)
unit(x), plain(x)
unit.set_weights(plain.get_weights())
values = [[v.value for v in kind] for kind in
          (unit.trainable_variables, unit.non_trainable_variables)]
run = jax.jit(lambda x: unit.stateless_call(*values, x, training=True)[0])
assert run(split).sharding.spec[0] == "data"
np.testing.assert_allclose(run(split), plain(x, training=True), rtol=1e-4, atol=1e-5)

# The types tell it.
explicit = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
check(loss, jax.device_put(x, NamedSharding(explicit, P("data"))), [first])
with jax.set_mesh(explicit):
    split = jax.device_put(x, P("data"))
    check(loss, split)
    assert jax.jit(network)(split, *weights).sharding.spec[0] == "data"
    weights[0] = jax.device_put(weights[0], P("data"))
    check(loss, split, [first])
print(len(jax.devices()), "devices")
"""


def test_over_two_devices():
    flags = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "KERAS_BACKEND": "jax"}
    run = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env)
    assert run.stdout == "2 devices\n", run.stderr
