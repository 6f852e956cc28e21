"""kPointwiseConv2D against the original implementation's blocks."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import kconv.keras

BLOCKS = sorted((Path(__file__).parents[1] / "data" / "blocks").glob("*.npz"))


def build(meta, **changes):
    x = keras.Input((None, None, meta["cin"]))
    arguments = {
        "filters": meta["cout"],
        "name": "k",
        "activation": meta["activation"],
        "has_batch_norm": meta["has_batch_norm"],
        "use_bias": meta["use_bias"],
        "kType": meta["kType"],
        **changes,
    }
    return keras.Model(x, kconv.keras.kPointwiseConv2D(x, **arguments))


def assert_close(actual, expected):
    actual = keras.ops.convert_to_numpy(actual)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def weight_name(variable):
    """Layer and weight, as the fixtures name them."""
    return "/".join(variable.path.split("/")[-2:])


@pytest.mark.parametrize("path", BLOCKS, ids=[path.stem for path in BLOCKS])
def test_original_block(path, gradients):
    data = np.load(path)
    model = build(json.loads(str(data["meta"])))
    for variable in model.variables:
        variable.assign(data[f"w:{weight_name(variable)}"])
    assert_close(model(data["x"], training=False), data["y_infer"])
    y, dx, dw = gradients(model, data["x"], data["gy"])
    assert_close(y, data["y_train"])
    assert_close(dx, data["dx"])
    for variable, gradient in zip(model.trainable_variables, dw, strict=True):
        assert_close(gradient, data[f"g:{weight_name(variable)}"])
    for variable in model.non_trainable_variables:
        name = weight_name(variable)
        if "moving" in name:
            before, after = 0.99 * data[f"w:{name}"], data[f"after:{name}"]
            # The fixtures take the unbiased variance of 70 pixels, Keras the biased one.
            share = 69 / 70 if "variance" in name else 1
            assert_close(variable, before + (after - before) * share)


def test_layer_names_are_the_originals():
    for path in BLOCKS:
        meta = json.loads(str(np.load(path)["meta"]))
        original = [layer["name"] for layer in meta["layers"][1:]]
        # The original leaves the names of these to Keras.
        automatic = ("copy_channels", "sum_into_half_channels", "concatenate")
        ours = [layer.name for layer in build(meta).layers[1:]]
        named = [[n for n in names if not n.startswith(automatic)] for names in (ours, original)]
        assert sorted(named[0]) == sorted(named[1]), path.stem


def test_channels_first_is_the_same_block():
    meta = json.loads(str(np.load(BLOCKS[0])["meta"]))
    last = build(meta)
    x = keras.Input((meta["cin"], 5, 7))
    y = kconv.keras.kPointwiseConv2D(
        x, meta["cout"], 1, "k", meta["activation"], meta["has_batch_norm"],
        use_bias=meta["use_bias"], kType=meta["kType"],
    )  # fmt: skip
    first = keras.Model(x, y)
    first.set_weights(last.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 5, 7, meta["cin"])).astype(np.float32)
    assert_close(
        np.moveaxis(keras.ops.convert_to_numpy(first(np.moveaxis(images, 3, 1))), 1, 3),
        keras.ops.convert_to_numpy(last(images)),
    )


def test_activation_may_be_a_function_or_none():
    meta = json.loads(str(np.load(BLOCKS[0])["meta"]))
    model = build(meta, activation=keras.ops.tanh, has_batch_norm=False)
    x = np.ones((1, 2, 2, meta["cin"]), np.float32)
    assert np.abs(keras.ops.convert_to_numpy(model(x))).max() < 2  # a sum of two of tanh
    assert not [la for la in build(meta, activation=None).layers if "activation" in la.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kType": "D7"}, "unknown ktype='D7'; known are"),
        ({"filters": 0, "name": "top"}, "layer 'top': c_out=0"),
        ({"channel_axis": 2}, "channel_axis=2"),
    ],
)
def test_bad_arguments(arguments, message):
    x = keras.Input((4, 4, 32))
    with pytest.raises(ValueError, match=message):
        kconv.keras.kPointwiseConv2D(x, **{"filters": 8, **arguments})
    with pytest.raises(TypeError, match="last_tensor=48, expected a tensor"):
        kconv.keras.kPointwiseConv2D(48)(x)
