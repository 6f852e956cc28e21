"""From a layer graph to a Keras model."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from kconv.keras._initialize import call_new_layer
from kconv.keras.layers import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.keras.network import Network
from kconv.models import graph
from kconv.models.activations import ACTIVATIONS

Tensor = Any


def model_of(layers: graph.Graph, *, fused: bool) -> keras.Model:
    """The functional model of a layer graph, on kconv's kernels."""
    tensors: dict[str, Tensor] = {}
    for layer in layers.layers:
        inputs = [tensors[source] for source in layer.inputs]
        tensors[layer.name] = _apply(layer, inputs)
    kind = Network if fused else keras.Model
    return kind(tensors[layers.layers[0].name], tensors[layers.output], name=layers.name)


def _keras_name(layer: graph.Layer) -> str:
    return layer.name.replace("/", "_")


def channel_axis() -> int:
    """The axis of an image's channels in Keras's setting of the data format."""
    return 3 if keras.config.image_data_format() == "channels_last" else 1


def _image_shape(shape: graph.Shape) -> graph.Shape:
    """(H, W, C) in the order of Keras's setting."""
    return shape if channel_axis() == 3 else (shape[-1], *shape[:-1])


def _initializer(name: graph.Initializer) -> keras.initializers.Initializer:
    match name:
        case "conv_normal":
            return keras.initializers.VarianceScaling(2.0, "fan_out", "truncated_normal")
        case "dense_uniform":
            return keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform")
        case "glorot_uniform":
            return keras.initializers.GlorotUniform()


def _apply(layer: graph.Layer, inputs: list[Tensor]) -> Tensor:
    """The output of the Keras layer that stands for a layer of the graph."""
    name = _keras_name(layer)
    match layer:
        case graph.Input():
            return keras.Input(_image_shape(layer.shape), name=name)
        case graph.Concat():
            return layers.Concatenate(axis=channel_axis(), name=name)(inputs)
        case graph.Add():
            return layers.Add(name=name)(inputs)
        case graph.Multiply():
            return layers.Multiply(name=name)(inputs)
        case graph.Conv() | graph.DepthwiseConv():
            return call_new_layer(_convolution(layer, name), inputs[0])
        case _:
            return call_new_layer(_layer(layer, name), inputs[0])


def _convolution(layer: graph.Conv | graph.DepthwiseConv, name: str) -> keras.layers.Layer:
    if isinstance(layer, graph.DepthwiseConv):
        return DepthwiseConv2D(
            layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            depth_multiplier=layer.depth_multiplier,
            use_bias=layer.use_bias,
            depthwise_initializer=_initializer(layer.initializer),
            name=name,
        )
    if layer.is_pointwise:
        return PointwiseConv2D(
            layer.filters,
            groups=layer.groups,
            use_bias=layer.use_bias,
            kernel_initializer=_initializer(layer.initializer),
            name=name,
        )
    return layers.Conv2D(
        layer.filters,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        groups=layer.groups,
        use_bias=layer.use_bias,
        kernel_initializer=_initializer(layer.initializer),
        name=name,
    )


def _layer(layer: graph.Layer, name: str) -> keras.layers.Layer:
    match layer:
        case graph.Interleave():
            return InterleaveChannels(layer.step, name=name)
        case graph.CopyChannels():
            return CopyChannels(layer.start, layer.count, name=name)
        case graph.FoldHalves():
            return SumIntoHalfChannels(name=name)
        case graph.ZeroPad():
            return layers.ZeroPadding2D(layer.padding, name=name)
        case graph.BatchNorm():
            return layers.BatchNormalization(
                axis=channel_axis(),
                epsilon=layer.epsilon,
                momentum=layer.momentum,
                scale=layer.scale,
                name=name,
            )
        case graph.Activation():
            return layers.Activation(ACTIVATIONS[layer.kind].keras, name=name)
        case graph.Pool():
            pool = layers.MaxPooling2D if layer.kind == "max" else layers.AveragePooling2D
            return pool(layer.pool_size, layer.strides, layer.padding, name=name)
        case graph.GlobalPool():
            pools = {"max": layers.GlobalMaxPooling2D, "avg": layers.GlobalAveragePooling2D}
            return pools[layer.kind](keepdims=layer.keepdims, name=name)
        case graph.Reshape():
            return layers.Reshape(_image_shape(layer.shape), name=name)
        case graph.Flatten():
            return layers.Flatten(name=name)
        case graph.Dropout():
            noise_shape = (None, 1, 1, 1) if layer.per_sample else None
            return layers.Dropout(layer.rate, noise_shape=noise_shape, name=name)
        case graph.Dense():
            return layers.Dense(
                layer.units,
                activation=layer.activation,
                kernel_initializer=_initializer(layer.initializer),
                name=name,
            )
        case _:
            raise TypeError(f"no Keras layer for {layer}")
