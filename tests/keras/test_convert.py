"""Models onto kconv's kernels and back."""

from __future__ import annotations

from functools import partial

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


def tripled(x):
    return 3 * x


tripled.__name__ = "relu"  # by which Keras would find its own


def ascending(x):
    return x * keras.ops.arange(64, dtype="float32")


class Stateful(keras.layers.Layer):
    """A user's layer with state that is no weight."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = np.zeros(1, np.float32)

    def call(self, inputs):
        return inputs + float(self.table[0])

    def save_own_variables(self, store):
        store["table"] = self.table

    def load_own_variables(self, store):
        self.table = np.array(store["table"])


class Scale(keras.layers.Layer):
    """A user's layer without a configuration."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, inputs):
        return self.factor(inputs)


class Doubled(keras.Model):
    """A functional model that does more than its layers."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


def adapted(layer, *shape):
    layer.adapt(random(9, *shape) * 4 + 1)
    return layer


def stateful(x):
    layer = Stateful()
    layer.table[:] = 2
    return layer(x)


def patched(x):
    layer = keras.layers.Conv2D(64, 1)
    y, original = layer(x), layer.call
    layer.call = lambda inputs: original(inputs) + 1
    return y


def tied(x):
    first, second = (keras.layers.Conv2D(64, 1, use_bias=False) for _ in range(2))
    y = second(first(x))
    second._tracker.unlock()
    second._kernel = first._kernel
    return y


def with_lora(x):
    layer = keras.layers.Conv2D(64, 1)
    layer.build(x.shape)
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(random(2, 64))
    return layer(x)


def shared(x):
    layer = keras.layers.Conv2D(64, 1)
    return layer(x) + layer(2 * x)


def pixels(x):
    return keras.layers.Reshape((4, 64))(x)


LAYERS = keras.layers
CASES = {  # from the input, (2, 2, 64), and the names of layers that stay the model's own
    "normalization": (lambda x: adapted(LAYERS.Normalization(), 2, 2, 64)(x), 0),
    "constants": (lambda x: LAYERS.Normalization(mean=[3] * 64, variance=[2.0] * 64)(x), 0),
    "discretization": (lambda x: adapted(LAYERS.Discretization(num_bins=4), 4)(x), 1),
    "attention": (lambda x: LAYERS.MultiHeadAttention(2, 8)(pixels(x), pixels(x)), 0),
    "queries": (lambda x: LAYERS.MultiHeadAttention(2, 8)(query=pixels(x), value=pixels(x)), 0),
    "keyword": (lambda x: LAYERS.Conv2D(64, 1)(inputs=x), 0),
    "a function": (lambda x: LAYERS.Conv2D(64, 1, activation=tripled)(x), 0),
    "a function inside": (lambda x: LAYERS.TimeDistributed(LAYERS.Dense(3, tripled))(x), 0),
    "a layer": (lambda x: LAYERS.Conv2D(64, 1, activation=LAYERS.LeakyReLU(0.7))(x), 0),
    "a partial": (lambda x: LAYERS.Conv2D(64, 1, activation=partial(keras.ops.add, 1.0))(x), 1),
    "lambda": (lambda x: LAYERS.Lambda(lambda y: tripled(y))(x), 1),
    "operations": (lambda x: keras.ops.relu(LAYERS.Conv2D(64, 1)(x) - x[..., :1]), 0),
    "call arguments": (lambda x: LAYERS.Dropout(0.5, seed=3)(x, training=True), 0),
    "shared": (shared, 0),
    "stateful": (stateful, 0),
    "no configuration": (lambda x: Scale(tripled)(x), 1),
    "patched": (patched, 1),
    "tied": (tied, 2),
    "lora": (with_lora, 0),
    "own call": (lambda x: Doubled(i := keras.Input(x.shape[1:]), LAYERS.Conv2D(64, 1)(i))(x), 0),
    "strided": (lambda x: LAYERS.Conv2D(64, 1, 2, padding="same", dtype="float64")(x), 0),
    "permuted": (lambda x: PointwiseConv2D(64, interleave=8, activation="softmax")(x), 0),
    "permuted first": (
        lambda x: PointwiseConv2D(64, interleave=8, activation=ascending)(x),
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_copy_computes_what_the_model_does(name):
    if name == "strided" and keras.backend.backend() == "jax":
        pytest.skip("float64 is an option of JAX's")
    make, kept = CASES[name]
    x = keras.Input((2, 2, 64), name="images")
    model = keras.Model({"images": x}, {"result": make(x)}, name="model")
    inputs = {"images": random(3, 2, 2, 64)}
    copies = []
    for convert in (kconv.keras.accelerate, kconv.keras.to_native, kconv.keras.compress):
        copies.append(convert(model))
        report = kconv.keras.report(copies[-1])
        own = [text for text in report.kept.values() if "groups and interleave" not in text]
        assert len(own) == kept, report
        assert copies[-1].name == "model"
        assert list(copies[-1](inputs)) == ["result"]
    back = kconv.keras.to_native(copies[0])
    seeds = [v for m in (model, *copies, back) for v in m.variables if "seed" in v.path]
    for seed in seeds[1:]:
        seed.assign(seeds[0])
    expected = keras.ops.convert_to_numpy(model(inputs)["result"])
    for copy in (*copies[:2], back):
        actual = keras.ops.convert_to_numpy(copy(inputs)["result"])
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_has_all_that_belongs_to_the_weights():
    x, y = keras.Input((4, 4, 64), dtype="uint8", name="b"), keras.Input((4, 4, 64), name="a")
    conv = keras.layers.Conv2D(64, 1, kernel_regularizer="l2", kernel_constraint="max_norm")
    norm = keras.layers.BatchNormalization()
    z = norm(conv(keras.layers.Rescaling(0.1)(x)) + y)
    model = keras.Model([x, y], [z, keras.layers.Dropout(0.5, seed=1)(z, training=True)])
    norm.trainable = False
    conv.bias.trainable = False
    model.compile(loss=lambda a, b: keras.ops.mean(a - b))
    inputs = [np.full((2, 4, 4, 64), 7, np.uint8), random(2, 4, 4, 64)]
    model(inputs)  # moves the seed
    before = [v.numpy() for v in conv.variables]
    fast = kconv.keras.accelerate(model)
    assert [(i.name, i.dtype, i.shape) for i in fast.inputs] == [
        (i.name, i.dtype, i.shape) for i in model.inputs
    ]
    assert len(fast.trainable_variables) == len(model.trainable_variables) == 1
    assert [layer.trainable for layer in fast.layers] == [layer.trainable for layer in model.layers]
    assert isinstance(fast.get_layer(conv.name).kernel.constraint, keras.constraints.MaxNorm)
    to_numpy = keras.ops.convert_to_numpy
    np.testing.assert_allclose(to_numpy(sum(fast.losses)), to_numpy(sum(model.losses)), rtol=1e-6)
    for a, b in zip(fast(inputs), model(inputs), strict=True):  # the same images dropped
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-5, atol=1e-5)
    assert not fast.compiled
    fast.compile("sgd", "mse")
    fast.train_on_batch(inputs, [random(2, 4, 4, 64)] * 2)
    for value, old in zip(conv.variables, before, strict=True):
        np.testing.assert_array_equal(value.numpy(), old)


def test_reports():
    class Special(keras.layers.Conv2D):
        """A subclass, which may do anything."""

    inner = keras.Sequential(
        [keras.Input((4, 4, 64)), keras.layers.Conv2D(64, 1, name="in")], name="m"
    )
    x = keras.Input((4, 4, 64))
    y = keras.layers.Conv2D(3, 1, name="few")(keras.layers.Conv2D(64, 1, name="many")(inner(x)))
    y = keras.layers.Conv2D(3, 1, dilation_rate=2, name="dilated")(y)
    y = Special(3, 1, name="special")(y)
    model = keras.Model(x, keras.layers.Conv2D(3, 3, name="3x3")(y))
    fast = kconv.keras.accelerate(model)
    report = kconv.keras.report(fast)
    assert report.action == "accelerate"
    assert report.changed == dict.fromkeys(["m/in", "many", "few"], "PointwiseConv2D")
    assert report.kept == {
        "dilated": "dilation_rate=(2, 2) has no kernel",
        "special": "Special is a class of its own",
    }
    native = kconv.keras.report(kconv.keras.to_native(fast))
    assert native.changed == dict.fromkeys(["m/in", "many", "few"], "Conv2D")
    for source in (model, fast):  # what accelerate made is compressed as well
        small = kconv.keras.report(kconv.keras.compress(source, "D6_16ch"))
        assert set(small.changed) == {"m/in", "many"}
        assert set(small.kept) == {"few", "dilated", "special"}
        assert "64 to 3 channels" in small.kept["few"]
    with pytest.raises(ValueError, match="does not come from a conversion"):
        kconv.keras.report(model)


def test_compress_replaces_a_shared_convolution_everywhere():
    x = keras.Input((4, 4, 64))
    conv = keras.layers.Conv2D(64, 1, name="shared")
    y = keras.layers.BatchNormalization(name="norm")(conv(conv(x)))
    small = kconv.keras.compress(keras.Model(x, y))
    block = small.get_layer("shared")
    assert {PointwiseConv2D} <= kinds(block)
    assert small.get_layer("norm")  # of one call alone
    images = random(2, 4, 4, 64)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(small.layers[-1](block(block(images)))),
        small.predict(images, verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_compress_leaves_a_batch_norm_with_call_arguments():
    x = keras.Input((4, 4, 64))
    y = keras.layers.BatchNormalization(name="n")(keras.layers.Conv2D(64, 1)(x), training=False)
    small = kconv.keras.compress(keras.Model(x, y))
    assert "n" in {layer.name for layer in small.layers}


class Subclassed(keras.Model):
    """A model whose layers Keras does not know."""


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: Subclassed(), TypeError, "functional or sequential model"),
        (lambda: Doubled(x := keras.Input((4, 4, 2)), 2 * x), TypeError, "call of its own"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), ValueError, "not been built"),
        (lambda: keras.layers.Dense(2), TypeError, "functional or sequential model"),
    ],
)
def test_models_that_cannot_be_copied(model, error, message):
    for convert in (kconv.keras.accelerate, kconv.keras.to_native, kconv.keras.compress):
        with pytest.raises(error, match=message):
            convert(model())


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
