"""A Keras model's layers as a graph of :mod:`kconv.models`, from which fused segments are found."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from kconv.keras.layers import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.models import graph

ACTIVATIONS: dict[str, graph.ActivationName] = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "swish",
    "sigmoid": "sigmoid",
    "hard_sigmoid": "hard_sigmoid",
    "hard_silu": "hard_swish",
}
"""kconv's names of the activations by those of Keras's functions."""


def model_graph(model: keras.Model, data_format: str) -> graph.Graph | None:
    """The graph of a functional model that takes and gives one tensor, else None.

    Layers that fused segments do not know become plain :class:`~kconv.models.graph.Layer`. A
    model in which a layer is called twice, or something other than a layer, has no graph.
    """
    nodes = [node for depth in model._nodes_by_depth.values() for node in depth]
    calls = {node.operation.name: node for node in nodes}
    if len(calls) != len(nodes) or len(model.inputs) != 1 or len(model.outputs) != 1:
        return None
    found = []
    for layer in model.layers:
        node = calls.get(layer.name)
        if node is None or len(node.output_tensors) != 1 or not isinstance(layer, layers.Layer):
            return None
        sources = tuple(x._keras_history.operation.name for x in node.input_tensors)
        shape = _shape(node.output_tensors[0].shape, data_format)
        found.append(_layer(layer, layer.name, sources, shape, data_format, node))
    if {layer.name for layer in found} != set(calls):
        return None
    return graph.Graph(model.name, tuple(found), model.outputs[0]._keras_history.operation.name)


def _shape(shape: tuple[int | None, ...], data_format: str) -> graph.Shape:
    """(H, W, C) or (C,) of a tensor's shape."""
    if len(shape) == 4 and data_format == "channels_first":
        return (*shape[2:], shape[1])
    return shape[1:]


def _layer(
    layer: layers.Layer,
    name: str,
    inputs: tuple[str, ...],
    shape: graph.Shape,
    data_format: str,
    node: Any,
) -> graph.Layer:
    common: dict[str, Any] = {"name": name, "inputs": inputs, "shape": shape}
    plain = graph.Layer(**common)
    axis = 3 if data_format == "channels_last" else 1
    kind = type(layer)
    if getattr(layer, "data_format", data_format) != data_format:
        return plain
    if kind in (layers.Conv2D, PointwiseConv2D, layers.DepthwiseConv2D, DepthwiseConv2D):
        return _convolution(layer, common) or plain
    if kind is layers.BatchNormalization and layer.center and layer.axis in (axis, axis - 4):
        options = {"epsilon": layer.epsilon, "momentum": layer.momentum, "scale": layer.scale}
        return graph.BatchNorm(**common, **options)
    if kind is layers.Activation and layer.activation.__name__ in ACTIVATIONS:
        return graph.Activation(**common, kind=ACTIVATIONS[layer.activation.__name__])
    if kind is layers.ZeroPadding2D:
        return graph.ZeroPad(**common, padding=layer.padding)
    if kind is InterleaveChannels:
        return graph.Interleave(**common, step=max(layer.step_size, 1))
    if kind is CopyChannels:
        options = {"start": layer.channel_start, "count": layer.channel_count}
        return graph.CopyChannels(**common, **options)
    if kind is SumIntoHalfChannels:
        return graph.FoldHalves(**common)
    if kind is layers.Dropout and layer.noise_shape == (None, 1, 1, 1):
        return graph.Dropout(**common, rate=layer.rate, per_sample=True)
    if kind is layers.GlobalAveragePooling2D:
        return graph.GlobalPool(**common, keepdims=layer.keepdims)
    return _joining(layer, common, shape, axis, node) or plain


def _convolution(layer: Any, common: dict[str, Any]) -> graph.Layer | None:
    linear = layer.activation is None or layer.activation.__name__ == "linear"
    strides, kernel = layer.strides, layer.kernel_size
    if not linear or layer.dilation_rate != (1, 1) or strides[0] != strides[1]:
        return None
    options = {"padding": layer.padding, "use_bias": layer.use_bias}
    if isinstance(layer, layers.DepthwiseConv2D):
        if kernel[0] != kernel[1]:
            return None
        multiplier = layer.depth_multiplier
        options |= {"depth_multiplier": multiplier, "in_channels": layer.kernel.shape[2]}
        return graph.DepthwiseConv(**common, **options, kernel_size=kernel[0], strides=strides[0])
    if getattr(layer, "interleave", 1) != 1:
        return None
    in_channels = layer.kernel.shape[2] * layer.groups
    options |= {"groups": layer.groups, "filters": layer.filters, "in_channels": in_channels}
    return graph.Conv(**common, **options, kernel_size=kernel, strides=strides)


def _joining(
    layer: Any, common: dict[str, Any], shape: graph.Shape, axis: int, node: Any
) -> graph.Layer | None:
    """Layers of several inputs, and changes of shape."""
    sizes = [tuple(x.shape) for x in node.input_tensors]
    kind = type(layer)
    if kind is layers.Add and len(set(sizes)) == 1:
        return graph.Add(**common)
    if kind is layers.Concatenate and layer.axis in (axis, axis - 4):
        return graph.Concat(**common)
    if kind is layers.Multiply and len(sizes) == 2 and len(sizes[1]) == 4:
        pixels = [size for i, size in enumerate(sizes[1]) if i not in (0, axis)]
        return graph.Multiply(**common) if pixels == [1, 1] else None
    if kind is layers.Reshape and len(sizes[0]) == 2 and shape[:2] == (1, 1):
        return graph.Reshape(**common)
    return None
