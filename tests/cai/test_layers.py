"""The layers and convolutions of kconv.cai.layers."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kconv.keras
from kconv.cai import layers
from kconv.ktypes import KTYPES


def run(function, *inputs: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(function(*map(keras.ops.convert_to_tensor, inputs)))


def channels(count: int) -> np.ndarray:
    """One pixel whose channels are numbered."""
    return np.arange(count, dtype=np.float32).reshape(1, 1, 1, count)


def test_numbers() -> None:
    assert (layers.D6_16ch(), layers.D6_32ch(), layers.D6v3_32ch(), layers.kT3v3_8ch()) == (
        2,
        13,
        33,
        48,
    )
    for ktype in KTYPES:
        if ktype.scheme in ("D6", "K", "D6v3", "kT3v3"):
            assert getattr(layers, ktype.name)() == ktype.number


@pytest.mark.parametrize("number", [7, 12, 16, 22, 28, 31])
@pytest.mark.parametrize(
    "convolution", [layers.kConv2D, layers.kPointwiseConv2D], ids=lambda f: f.__name__
)
def test_experimental_ktypes_are_named(convolution, number: int) -> None:
    with pytest.raises(NotImplementedError, match=f"kType {number} of the original"):
        convolution(keras.Input((8, 8, 32)), kType=number)


@pytest.mark.parametrize("number", [7, 8, 9])
def test_experimental_convolutions(number: int) -> None:
    with pytest.raises(NotImplementedError, match=f"kType {number} of the original"):
        getattr(layers, f"kConv2DType{number}")(keras.Input((8, 8, 32)))


def test_small_layers() -> None:
    x = channels(4)
    np.testing.assert_array_equal(run(layers.Negate(), x), -x)
    np.testing.assert_array_equal(
        run(layers.ConcatNegation(), x).ravel(), [*x.ravel(), *-x.ravel()]
    )
    np.testing.assert_array_equal(run(layers.CopyChannels(1, 2), x).ravel(), [1, 2])
    np.testing.assert_array_equal(run(layers.SumIntoHalfChannels(), x).ravel(), [2, 4])
    np.testing.assert_array_equal(run(layers.InterleaveChannels(1), x), x)
    values = np.array([-4, -1, 0, 1, 4], np.float32)
    sigmoid = np.clip((values + 3) / 6, 0, 1)
    np.testing.assert_allclose(run(layers.HardSigmoid, values), sigmoid, rtol=1e-6)
    np.testing.assert_allclose(run(layers.HardSwish, values), values * sigmoid, rtol=1e-6)


def test_pooling_concatenates() -> None:
    x = np.random.default_rng(0).random((2, 3, 5, 4), np.float32)
    expected = np.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=1)
    np.testing.assert_allclose(run(layers.GlobalAverageMaxPooling2D, x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "interleaved", "expected"),
    [
        (4, False, [0, 1, 2, 3]),
        (3, False, [0, 1, 2]),
        (6, False, [0, 1, 2, 3, 0, 1]),
        (9, False, [0, 1, 2, 3, 0, 1, 2, 3, 0]),
        (13, True, [0, 1, 2, 3, 0, 2, 1, 3, 0, 3, 1, 2, 0]),
    ],
)
def test_fit_channel_count(count: int, interleaved: bool, expected: list[int]) -> None:
    result = run(lambda x: layers.FitChannelCountTo(x, count, interleaved), channels(4))
    np.testing.assert_array_equal(result.ravel(), expected)


def test_even_channel_count() -> None:
    assert run(layers.EnforceEvenChannelCount, channels(5)).ravel().tolist() == [0, 1, 2, 3, 4, 0]
    assert run(layers.EnforceEvenChannelCount, channels(4)).shape == (1, 1, 1, 4)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 32, 36])
def test_pointwise_is_kconvs(number: int) -> None:
    x = keras.Input((4, 4, 64))
    arguments = {"filters": 48, "name": "k", "activation": "relu", "kType": number}
    ours = keras.Model(x, layers.kPointwiseConv2D(x, **arguments))
    other = keras.Model(x, kconv.keras.kPointwiseConv2D(x, **arguments))
    same_as_conv = keras.Model(x, layers.kConv2D(x, **arguments))
    names = [weight.path for weight in other.weights]
    assert [weight.path for weight in ours.weights] == names
    assert [weight.path for weight in same_as_conv.weights] == names


@pytest.mark.parametrize(
    ("convolution", "options", "number"),
    [
        (layers.kConv2DType0, {}, 0),
        (layers.kConv2DType1, {}, 1),
        (layers.kConv2DType2, {"min_channels_per_group": 8}, "D6_8ch"),
        (layers.kConv2DType3, {"min_channels_per_group": 32}, "kT3_32ch"),
        (layers.kConv2DType4, {}, 4),
        (layers.kConv2DType5, {}, 5),
        (layers.kConv2DType6, {}, 6),
        (layers.kConv2DType10, {}, "D6v3_16ch"),
        (layers.kConv2DType10, {"never_intergroup": True}, "kT3v3_16ch"),
    ],
)
@pytest.mark.parametrize("window", [{}, {"kernel_size": 3, "stride_size": 2}])
def test_types_by_function(convolution, options, number, window) -> None:
    x = keras.Input((8, 8, 72))
    by_function = keras.Model(x, convolution(x, 48, name="k", **options, **window))
    by_number = keras.Model(x, layers.kConv2D(x, 48, name="k", kType=number, **window))
    assert by_function.output_shape == (None, 4, 4, 48) if window else (None, 8, 8, 48)
    summary = [(weight.path, tuple(weight.shape)) for weight in by_number.weights]
    assert [(weight.path, tuple(weight.shape)) for weight in by_function.weights] == summary


def test_other_kernels_compute_what_pointwise_ones_do() -> None:
    """A 1x1 kernel at stride 2 is the pointwise block on every other pixel."""
    x = np.random.default_rng(0).random((2, 5, 7, 40), np.float32)
    source = keras.Input((None, None, 40))
    for number in (2, 5, 6, 43):
        arguments = {"filters": 24, "name": "k", "activation": "swish", "kType": number}
        strided = keras.Model(source, layers.kConv2D(source, stride_size=2, **arguments))
        plain = keras.Model(source, layers.kConv2D(source, **arguments))
        strided.set_weights(plain.get_weights())
        np.testing.assert_allclose(run(strided, x), run(plain, x[:, ::2, ::2]), atol=1e-5)


def test_arguments_without_a_meaning() -> None:
    x = keras.Input((8, 8, 4))
    with pytest.raises(ValueError, match="padding='full' is not 'same' or 'valid'"):
        layers.kConv2D(x, 6, padding="full", kType=0)
    with pytest.raises(ValueError, match="padding='full' is not 'same' or 'valid'"):
        layers.conv2d_bn(x, 6, 1, 1, padding="full")
    with pytest.raises(ValueError, match="next_channel_count=0 is below 1"):
        layers.FitChannelCountTo(x, 0)


@pytest.mark.parametrize(("filters", "groups"), [(36, 4), (3, 3), (64, 4)])
def test_group_convolution(filters: int, groups: int) -> None:
    y, found = layers.kGroupConv2D(keras.Input((8, 8, 50)), filters, name="g", kernel_size=3)
    assert (y.shape, found) == ((None, 8, 8, filters), groups)
    y, found = layers.kGroupConv2D(keras.Input((8, 8, 16)), filters)
    assert (y.shape, found) == ((None, 8, 8, filters), 1)


def test_conv2d_bn() -> None:
    x = keras.Input((8, 8, 4))
    y = layers.conv2d_bn(x, 6, 1, 7, padding="valid", strides=(1, 2), name="c", use_bias=True)
    model = keras.Model(x, y)
    assert model.output_shape == (None, 8, 1, 6)
    assert [layer.name for layer in model.layers[1:]] == ["c_conv", "c_bn", "c"]
    assert {weight.path.split("/")[-1] for weight in model.weights} == {
        "kernel",
        "bias",
        "beta",
        "moving_mean",
        "moving_variance",
    }


def test_custom_classes_survive_a_file(tmp_path) -> None:
    x = keras.Input((4, 4, 8))
    y = layers.ConcatNegation()(layers.Negate()(x))
    y = layers.kPointwiseConv2D(y, 8, activation=layers.HardSwish, kType=3)
    model = keras.Model(x, y)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras", custom_objects=layers.GetClasses())
    images = np.random.default_rng(0).random((1, 4, 4, 8), np.float32)
    np.testing.assert_allclose(run(again, images), run(model, images), atol=1e-6)
