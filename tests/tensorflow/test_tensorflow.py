"""kconv.tensorflow against TensorFlow's own operations, eager and in graphs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import kconv.tensorflow as ktf
from kconv import _kconv
from kconv.ktypes import interleave_index
from kconv.models import create
from kconv.models.fusion import Segment, partition
from kconv.tensorflow._fused import fused
from kconv.tensorflow._library import kernels

POINTWISE = [  # N, H, W, C_in, C_out, groups, interleave
    (2, 5, 7, 8, 6, 2, 3),
    (3, 4, 3, 18, 9, 3, 4),
    (1, 1, 1, 30, 20, 10, 1),
    (0, 4, 4, 6, 4, 2, 2),
]
DEPTHWISE = [  # N, H, W, C, k, stride, padding
    (2, 9, 8, 5, 3, 1, "same"),
    (2, 9, 8, 5, 5, 2, "same"),
    (1, 8, 9, 3, 3, 2, "valid"),
    (1, 7, 7, 4, 7, 1, 2),
    (2, 6, 5, 3, 3, 2, ((0, 1), (1, 0))),
]
LAYOUTS = ["NHWC", "NCHW"]


def random(*shape, dtype=np.float64, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def to_layout(x, layout):
    return x if layout == "NHWC" else tf.transpose(x, (0, 3, 1, 2))


def from_layout(x, layout):
    return x if layout == "NHWC" else tf.transpose(x, (0, 2, 3, 1))


def pointwise_case(case, layout):
    """Functions of (N, H, W, C) images, kconv's and of TensorFlow's operations; arguments."""
    n, h, w, c_in, c_out, groups, step = case
    index = np.array(interleave_index(c_out, step))

    def ours(x, weight, bias):
        options = {"groups": groups, "interleave": step, "layout": layout, "weight_layout": "IO"}
        return from_layout(
            ktf.pointwise_conv(to_layout(x, layout), weight, bias, **options), layout
        )

    def reference(x, weight, bias):
        x = tf.reshape(x, (n, h, w, groups, c_in // groups))
        weight = tf.reshape(weight, (c_in // groups, groups, c_out // groups))
        y = tf.reshape(tf.einsum("nhwgi,igo->nhwgo", x, weight), (n, h, w, c_out)) + bias
        return tf.gather(y, index, axis=3)

    arguments = random(n, h, w, c_in), random(c_in // groups, c_out, seed=1), random(c_out, seed=2)
    return ours, reference, arguments


def depthwise_case(case, layout):
    n, h, w, c, k, stride, padding = case
    pads = {int: lambda p: ((p, p), (p, p)), str: lambda p: p.upper(), tuple: lambda p: p}
    pads = pads[type(padding)](padding)
    pads = pads if isinstance(pads, str) else [(0, 0), *pads, (0, 0)]

    def ours(x, weight, bias):
        options = {"stride": stride, "padding": padding, "layout": layout, "weight_layout": "IO"}
        return from_layout(
            ktf.depthwise_conv(to_layout(x, layout), weight, bias, **options), layout
        )

    def reference(x, weight, bias):
        return tf.nn.depthwise_conv2d(x, weight, (1, stride, stride, 1), pads) + bias

    return ours, reference, (random(n, h, w, c), random(k, k, c, 1, seed=1), random(c, seed=2))


CASES = [
    pytest.param(make, case, id=f"{make.__name__}-{'-'.join(map(str, case))}")
    for make, cases in ((pointwise_case, POINTWISE), (depthwise_case, DEPTHWISE))
    for case in cases
]


def value_and_gradients(function, args):
    """Of a loss, and the gradients of the sum of the squares of those."""
    with tf.GradientTape() as outer:
        outer.watch(args)
        with tf.GradientTape() as tape:
            tape.watch(args)
            y = function(*args)
            loss = tf.reduce_sum(tf.sin(y))
        first = tape.gradient(loss, args)
        total = tf.add_n([tf.reduce_sum(g**2) for g in first])
    return [y, *first, *outer.gradient(total, args)]


def assert_close(ours, expected, rtol=1e-10):
    for a, e in zip(ours, expected, strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * max(1, np.abs(e).max(initial=0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "case"), CASES)
def test_value_and_gradients(make, case, layout):
    ours, reference, args = make(case, layout)
    assert_close(value_and_gradients(ours, args), value_and_gradients(reference, args))


@pytest.mark.parametrize("known", ["all", "channels", "rank", "nothing"])
@pytest.mark.parametrize(("make", "case"), [CASES[0], CASES[5], CASES[8]])
def test_graph_with_unknown_sizes(make, case, known):
    ours, _, args = make(case, "NHWC")
    x, *others = args
    shapes = {"all": x.shape, "channels": [None] * 3 + x.shape[3:], "rank": [None] * 4}
    signature = [tf.TensorSpec(shapes.get(known), x.dtype), *map(tf.TensorSpec.from_tensor, others)]

    @tf.function(input_signature=signature)
    def run(*args):
        return value_and_gradients(ours, args)

    assert_close(run(*args), value_and_gradients(ours, args))


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((9, None), {"stride": 2}, (5, None)),
        ((9, 8), {"stride": 2, "padding": "valid"}, (4, 3)),
        ((None, 8), {"padding": ((0, 1), (2, 1))}, (None, 9)),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_knows_shapes(size, options, expected, layout):
    @tf.function
    def run(x):
        y = ktf.depthwise_conv(x, np.ones((6, 3, 3), np.float32), layout=layout, **options)
        return ktf.pointwise_conv(y, np.ones((4, 6), np.float32), layout=layout)

    def shape(channels, h, w):
        return [None, channels, h, w] if layout == "NCHW" else [None, h, w, channels]

    traced = run.get_concrete_function(tf.TensorSpec(shape(6, *size)))
    assert traced.output_shapes.as_list() == shape(4, *expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "case"), [CASES[0], CASES[5], CASES[8]])
def test_tensorflow_operations_inside_xla(make, case, layout):
    ours, _, args = make(case, layout)

    def gradients(*args):
        return value_and_gradients(tf.function(ours), args)[:4]

    compiled = tf.function(gradients, jit_compile=True)
    assert_close(compiled(*args), gradients(*args))
    graph = compiled.get_concrete_function(*args).graph.as_graph_def()
    assert "Kconv" not in str(graph)


def test_weights_of_pytorch_inside_xla():
    x, weight, kernel = random(2, 6, 4, 4), random(4, 3, 1, 1), random(6, 1, 3, 3)

    def run(x):
        y = ktf.depthwise_conv(ktf.interleave(x, 4), kernel, stride=2, padding=1)
        return ktf.deinterleave(ktf.pointwise_conv(y, weight, groups=2), 3)

    assert_close([tf.function(run, jit_compile=True)(x)], [run(x)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "step"), [(6, 3), (7, 3), (5, 9), (4, 1)])
def test_interleave(channels, step, layout):
    x = to_layout(random(2, 3, 1, channels), layout)
    axis = layout.index("C")
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = ktf.interleave(x, step, layout=layout)
        back = ktf.deinterleave(y, step, layout=layout)
    np.testing.assert_array_equal(y, tf.gather(x, interleave_index(channels, step), axis=axis))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(tape.gradient(y, x, y), x)
    np.testing.assert_array_equal(tape.gradient(back, x, x), x)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_narrow_floats_are_summed_in_float32(dtype):
    ours, _, args = pointwise_case(POINTWISE[0], "NHWC")
    args = [tf.cast(a, dtype) for a in args]
    with tf.GradientTape() as tape:
        tape.watch(args)
        narrow = ours(*args)
    wide = ours(*(tf.cast(a, tf.float32) for a in args))
    np.testing.assert_array_equal(narrow, tf.cast(wide, dtype))
    assert all(g.dtype == dtype for g in tape.gradient(narrow, args))


DTYPES = [tf.float64, tf.float32, tf.bfloat16, tf.float16, tf.int32, tf.complex64]


@pytest.mark.parametrize("of_x", DTYPES)
@pytest.mark.parametrize("make", [pointwise_case, depthwise_case])
def test_mixed_dtypes_with_and_without_xla(make, of_x):
    """One answer, or one kind of error."""
    ours, reference, args = make(POINTWISE[0] if make is pointwise_case else DEPTHWISE[0], "NHWC")
    for of_weight in DTYPES:
        dtypes = (of_x, of_weight, of_weight)
        x, weight, bias = (tf.cast(a, d) for a, d in zip(args, dtypes, strict=True))
        results = []
        for jit_compile in (False, True):
            try:
                results.append(tf.function(ours, jit_compile=jit_compile)(x, weight, bias))
            except (TypeError, INVALID) as error:
                results.append(error)
        a, b = results
        if isinstance(a, Exception):
            assert (type(a), str(a).split("\n")[-1]) == (type(b), str(b).split("\n")[-1])
            mixed = tf.float64 in (of_x, of_weight) and of_x != of_weight
            assert mixed or not (of_x.is_floating and of_weight.is_floating)
            continue
        assert a.dtype == b.dtype == of_x
        a, b, exact = (tf.cast(y, tf.float64) for y in (a, b, reference(*args)))
        narrow = {tf.bfloat16: 2**-7, tf.float16: 2**-9}
        tolerance = max(narrow.get(of_x, 1e-5), narrow.get(of_weight, 1e-5))
        np.testing.assert_allclose(a, b, rtol=narrow.get(of_x, 1e-5), atol=1e-5)
        np.testing.assert_allclose(a, exact, rtol=4 * tolerance, atol=8 * tolerance)


def test_data_pipeline():
    images = random(6, 4, 4, 8, dtype=np.float32)
    data = tf.data.Dataset.from_tensor_slices(images).batch(2)
    data = data.map(lambda x: ktf.interleave(x, 3, layout="NHWC"), num_parallel_calls=2)
    expected = tf.gather(images, interleave_index(8, 3), axis=3)
    np.testing.assert_array_equal(tf.concat(list(data.prefetch(1)), 0), expected)


class Model(tf.Module):
    def __init__(self):
        super().__init__()
        self.weight = tf.Variable(random(4, 6, dtype=np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 8])])
    def __call__(self, x):
        return ktf.pointwise_conv(
            x, self.weight, groups=2, interleave=3, layout="NHWC", weight_layout="IO"
        )


RELOAD = """
import sys, numpy as np, tensorflow as tf
import kconv.tensorflow
folder = sys.argv[1]
model = tf.saved_model.load(folder)
x = tf.constant(np.load(folder + "/x.npy"))
with tf.GradientTape() as tape:
    y = model(x)
np.save(folder + "/y.npy", y)
np.save(folder + "/gradient.npy", tape.gradient(y, model.weight))
"""


def test_saved_model_in_a_fresh_process(tmp_path):
    model, x = Model(), random(2, 4, 5, 8, dtype=np.float32)
    with tf.GradientTape() as tape:
        y = model(x)
    tf.saved_model.save(model, tmp_path)
    np.save(tmp_path / "x.npy", x)
    run = subprocess.run([sys.executable, "-c", RELOAD, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), y)
    gradient = tape.gradient(y, model.weight)
    np.testing.assert_allclose(np.load(tmp_path / "gradient.npy"), gradient, rtol=1e-6)


X, W, D = (np.ones(shape, np.float32) for shape in ((2, 8, 4, 4), (6, 4), (8, 3, 3)))
INVALID = tf.errors.InvalidArgumentError


BAD_INPUT = (
    ("call", "error", "message"),
    [
        (lambda: ktf.pointwise_conv(X, W, groups=3), INVALID, "in_channels=8 .* groups=3"),
        (lambda: ktf.pointwise_conv(X, W, groups=0), INVALID, "groups=0"),
        (lambda: ktf.pointwise_conv(X, W, groups=2, interleave=0), INVALID, "interleave=0"),
        (
            lambda: ktf.pointwise_conv(X, W[:, :3], groups=2),
            INVALID,
            r"\[6, 3\], expected .* with C_in/groups=4",
        ),
        (lambda: ktf.pointwise_conv(X, W, W[:5, 0], groups=2), INVALID, "bias"),
        (
            lambda: ktf.pointwise_conv(X[0], W, groups=2),
            INVALID,
            r"\[8, 4, 4\], expected \(N, C, H",
        ),
        (lambda: ktf.pointwise_conv(X, W.astype(float), groups=2), INVALID, "float64|double"),
        (lambda: ktf.pointwise_conv(X.astype(int), W), TypeError, "int64"),
        (lambda: ktf.pointwise_conv(X, W, layout="CHWN"), ValueError, "CHWN"),
        (lambda: ktf.pointwise_conv(X, W, weight_layout="HW"), ValueError, "HW"),
        (lambda: ktf.depthwise_conv(X, D[:7]), INVALID, "weight"),
        (lambda: ktf.depthwise_conv(X, D[:, :2]), INVALID, "weight"),
        (lambda: ktf.depthwise_conv(X, D, stride=3), INVALID, "stride=3"),
        (lambda: ktf.depthwise_conv(X, D, padding=-1), INVALID, "padding"),
        (lambda: ktf.depthwise_conv(X, D, padding="full"), ValueError, "full"),
        (lambda: ktf.interleave(X, 0), INVALID, "step=0"),
        (lambda: tf.function(ktf.interleave)(X, 0), INVALID, "step=0"),
    ],
)


@pytest.mark.parametrize(*BAD_INPUT)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(*BAD_INPUT)
def test_bad_input_inside_xla(call, error, message):
    if message.startswith(r"\["):  # said in other words
        message = "shape"
    with pytest.raises(error, match=message):
        tf.function(call, jit_compile=True)()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensors_that_are_not_dense(jit_compile):
    ragged = tf.RaggedTensor.from_row_splits(tf.ones((3, 8, 1, 1)), [0, 1, 3])
    sparse = tf.sparse.from_dense(X)
    for x in (ragged, sparse):
        with pytest.raises((TypeError, ValueError, INVALID)):
            tf.function(lambda x: ktf.pointwise_conv(x, W, groups=2), jit_compile=jit_compile)(x)


def test_registration():
    assert _kconv.register_tensorflow_ops("anything") == []  # done already
    code = "import kconv; kconv._kconv.register_tensorflow_ops('/no/library.so')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: /no/library.so is not loaded" in run.stderr


@pytest.mark.parametrize("graph", [False, True])
def test_fused_networks(graph):
    """With given statistics, the inference and what training does are one function."""
    network = create("keffnet_s", ktype="D6_16ch", classes=4, input_shape=(16, 16, 3)).graph()
    (segment,) = (part for part in partition(network) if isinstance(part, Segment))
    program = segment.program((16, 16), "IO")
    options = {"program": list(program.integers), "layout": "NHWC"}
    size = sum(np.prod(network[layer].weights()[name]) for layer, name in program.parameters)
    channels = sum(norm.channels for norm in program.norms)
    statistics = tf.stack([random(channels), 1 + random(channels, seed=1) ** 2])

    def infer(x, weights):
        return fused(program, "NHWC", x, weights, None, statistics)[0]

    def train(x, weights):
        none = tf.zeros(0, x.dtype)
        return kernels.kconv_fused_forward(x, weights, none, statistics, **options)[0]

    def gradients(function):
        def run(x, weights):
            with tf.GradientTape() as tape:
                tape.watch([x, weights])
                y = function(x, weights)
            return [y, *tape.gradient(y, [x, weights])]

        return tf.function(run) if graph else run

    x, weights = random(2, 16, 16, 3), random(size)
    inference = gradients(infer)(x, weights)
    assert_close(inference, gradients(train)(x, weights))
    for i, argument in ((1, x), (2, weights)):
        step = 1e-6 * random(*argument.shape, seed=3)
        ends = [
            infer(*(a + sign * step if a is argument else a for a in (x, weights)))
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            tf.reduce_sum(inference[i] * 2 * step), tf.reduce_sum(ends[0] - ends[1]), rtol=1e-4
        )
