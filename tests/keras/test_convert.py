"""Models onto kconv's kernels and back."""

from __future__ import annotations

import keras
import numpy as np

import kconv.keras
from kconv.keras import DepthwiseConv2D, PointwiseConv2D


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def kinds(model):
    return {type(layer) for layer in model.layers}


def assert_same_outputs(a, b, x):
    outputs = [model.predict(x, verbose=0) for model in (a, b)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


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


def test_sequential_models_and_subclasses():
    class Special(keras.layers.Conv2D):
        """A subclass, which may do anything."""

    layers = [keras.Input((4, 4, 6)), keras.layers.Conv2D(8, 1, groups=2), Special(4, 1)]
    model = keras.Sequential(layers)
    fast = kconv.keras.accelerate(model)
    assert [type(layer) for layer in fast.layers] == [PointwiseConv2D, Special]
    assert_same_outputs(fast, model, random(2, 4, 4, 6))
