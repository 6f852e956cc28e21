"""From a Keras model to a network on NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import activations, layers

from kconv._freezing import dense_of, frozen
from kconv._model_folder import expected_weights
from kconv.keras._clone import functional, is_functional
from kconv.keras._graph import CallGraph, call_graph
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array
from kconv.weights._layouts import keras_class, layout

__all__ = ["freeze"]


def freeze(
    model: keras.Model,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    scale: float | Sequence[float] = 1 / 64,
    offset: float | Sequence[float] = -2.0,
) -> FrozenNetwork:
    """A model as it is now, on NumPy alone: weights are copied, and run as one operation.

    It computes what ``model(x, training=False)`` does, in float32.

    Example:
        >>> import kconv.keras
        >>> from kconv.models import create
        >>> model = kconv.keras.build(create("keffnet_b0", classes=10, input_shape=(32, 32, 3)))
        >>> net = freeze(model)
        >>> net
        FrozenNetwork(keffnet_b0, 10 classes, 32x32x3)
        >>> x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
        >>> bool(abs(net(x) - keras.ops.convert_to_numpy(model(x))).max() < 1e-5)
        True

    Args:
        model: of :func:`kconv.keras.build`, or another functional or sequential model, fused or
            not, with one input and one output, all of whose layers are of classes that kconv knows.
        class_names: one name for each output; numbers by default.
        image_size: height and width to which image files are resized; by default the model's.
        interpolation: how, "bilinear" or "nearest".
        scale: what bytes are multiplied by, one number or one for each channel. The defaults are
            those of ``kconv train``.
        offset: what is added then.

    Returns:
        The network, which :meth:`~kconv.runtime.FrozenNetwork.save` writes.

    Raises:
        ValueError: a layer is none that can be frozen, or an option does not fit.
        TypeError: it is no functional or sequential model, or an option is of another type.
    """
    if not is_functional(model):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a functional or sequential keras.Model"
        )
    model = functional(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"the model has {len(model.inputs)} inputs and {len(model.outputs)} outputs, "
            "expected one of each"
        )
    calls = call_graph(model)
    found = graph.Graph(
        calls.graph.name,
        tuple(_known(layer, calls) for layer in calls.graph.layers),
        calls.graph.output,
    )
    height, width, _ = found.input_shape
    if image_size is None and height and width:
        image_size = height, width
    return frozen(
        found,
        _weights_of(found, calls),
        class_names=class_names,
        image_size=image_size,
        interpolation=interpolation,
        scale=scale,
        offset=offset,
    )


def _known(layer: graph.Layer, calls: CallGraph) -> graph.Layer:
    """A layer of a class that can be frozen."""
    if isinstance(layer, graph.Conv) and len(layer.shape) == 1:  # of vectors
        return dense_of(layer)
    if type(layer) is not graph.Layer:
        return layer
    own = calls.operations[layer.name]
    found = None
    if "call" not in vars(own) and getattr(own, "dtype", "float32") in ("float32", "float64"):
        common = {"name": layer.name, "inputs": layer.inputs, "shape": layer.shape}
        before = [calls.graph[name].shape for name in layer.inputs]
        found = _lift(own, common, before, calls.data_format)
    if found is None:
        raise ValueError(f"layer {layer.name!r}, a {type(own).__name__}, cannot be frozen as it is")
    return found


def _lift(
    own: Any, common: dict[str, Any], before: list[graph.Shape], data_format: str
) -> graph.Layer | None:
    """The layer for one that no fused operation stands for; None where there is none."""
    if len(before) != 1 or getattr(own, "data_format", data_format) != data_format:
        return None
    kind, shape = type(own), before[0]
    if kind in _NOTHING_IN_INFERENCE:
        return graph.Dropout(**common, rate=0.0)
    if kind is layers.Flatten:
        return graph.Flatten(**common) if shape[:2] == (1, 1) or len(shape) == 1 else None
    if kind is layers.Activation and own.activation is activations.softmax and len(shape) == 1:
        return graph.Activation(**common, kind="softmax")
    if kind is layers.Softmax and own.axis in (-1, 1) and len(shape) == 1:
        return graph.Activation(**common, kind="softmax")
    if kind is layers.Dense and len(shape) == 1:
        softmax = own.activation is activations.softmax
        if not softmax and own.activation is not activations.linear:
            return None
        if own.lora_enabled or getattr(own, "quantization_mode", None):
            return None
        return graph.Dense(
            **common,
            units=own.units,
            in_features=shape[0] or 0,
            activation="softmax" if softmax else None,
        )
    if kind is layers.GlobalMaxPooling2D:
        return graph.GlobalPool(**common, kind="max", keepdims=own.keepdims)
    return None


_NOTHING_IN_INFERENCE = (
    layers.Dropout,
    layers.SpatialDropout2D,
    layers.AlphaDropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
)


def _weights_of(found: graph.Graph, calls: CallGraph) -> dict[tuple[str, str], Array]:
    arrays = {}
    for layer, weight in expected_weights(found):
        own = calls.operations[layer]
        shape = found[layer].weights()[weight]
        variable = calls.variables.get((layer, weight))
        if variable is None:  # of a dense layer
            variable = getattr(own, weight)
        if variable is None:  # it has no bias
            arrays[layer, weight] = np.zeros(shape, np.float32)
            continue
        values = np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float32)
        values = values.reshape(shape)  # a dense layer's kernel may be a convolution's here
        kind = _CLASSES.get(type(found[layer])) or keras_class(own)
        arrays[layer, weight] = np.array(layout(kind, weight, shape).to_torch(values), order="C")
    return arrays


_CLASSES = {graph.Conv: "Conv2D", graph.DepthwiseConv: "DepthwiseConv2D"}
"""Of the parts of a separable convolution, too."""
