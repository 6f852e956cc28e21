"""Existing Keras models onto kconv's kernels, and kconv's models back onto Keras's own layers."""

from __future__ import annotations

from collections.abc import Callable
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
from kconv.ktypes import interleave_index

Tensor = Any


def accelerate(model: keras.Model) -> keras.Model:
    """A copy of a model with its pointwise and depthwise convolutions on kconv's kernels.

    Every ``Conv2D`` with a 1x1 kernel and no stride, and every ``DepthwiseConv2D``, becomes kconv's
    layer of the same name, configuration and weights. Subclasses of these layers stay.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> model = keras.Model(x, layers.Conv2D(24, 1, groups=4, name="mix")(x))
        >>> type(accelerate(model).get_layer("mix")).__name__
        'PointwiseConv2D'

    Args:
        model: a functional or sequential model, built.

    Returns:
        A new model with the same weights, not compiled.
    """

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if type(layer) is layers.DepthwiseConv2D:
            return DepthwiseConv2D.from_config(layer.get_config())
        if type(layer) is layers.Conv2D and _is_pointwise(layer):
            fixed = ("kernel_size", "strides", "padding", "dilation_rate")
            config = layer.get_config()
            return PointwiseConv2D.from_config({k: config[k] for k in config if k not in fixed})
        return layer.__class__.from_config(layer.get_config())

    return _clone(model, replace, call_new_layer)


def to_native(model: keras.Model) -> keras.Model:
    """A copy of a model in Keras's own layers and operations, for export or another device.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> y = PointwiseConv2D(24, groups=4, interleave=6, name="mix")(x)
        >>> type(to_native(keras.Model(x, y)).get_layer("mix")).__name__
        'Conv2D'

    Args:
        model: a functional or sequential model, built.

    Returns:
        A new model with the same weights, not compiled; it can be loaded without kconv.
    """
    steps = {la.name: la.interleave for la in model.layers if isinstance(la, PointwiseConv2D)}

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if isinstance(layer, PointwiseConv2D):
            config.pop("interleave")
            return layers.Conv2D.from_config({**config, "kernel_size": 1})
        if isinstance(layer, DepthwiseConv2D):
            return layers.DepthwiseConv2D.from_config(config)
        return layer.__class__.from_config(config)

    def call(layer: keras.layers.Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        match layer:
            case InterleaveChannels():
                return _interleave(x, layer.step_size, layer.axis)
            case CopyChannels():
                return _channels(x, layer.channel_start, layer.channel_count, layer.axis)
            case SumIntoHalfChannels():
                half = x.shape[layer.axis] // 2
                return _channels(x, 0, half, layer.axis) + _channels(x, half, half, layer.axis)
        y = call_new_layer(layer, x, *args, **kwargs)
        if steps.get(layer.name, 1) == 1:
            return y
        return _interleave(y, steps[layer.name], 3 if layer.data_format == "channels_last" else 1)

    return _clone(model, replace, call)


def _is_pointwise(layer: layers.Conv2D) -> bool:
    return layer.kernel_size == (1, 1) and layer.strides == (1, 1)


def _clone(
    model: keras.Model,
    replace: Callable[[keras.layers.Layer], keras.layers.Layer],
    call: Callable[..., Tensor],
) -> keras.Model:
    if isinstance(model, keras.Sequential):
        clone = keras.models.clone_model(model, clone_function=replace)
        clone.build(model.input_shape)
    else:
        clone = keras.models.clone_model(model, clone_function=replace, call_function=call)
    clone.set_weights(model.get_weights())
    return clone


def _interleave(x: Tensor, step: int, axis: int) -> Tensor:
    if step < 2:
        return x
    return keras.ops.take(x, interleave_index(x.shape[axis], step), axis=axis)


def _channels(x: Tensor, start: int, count: int, axis: int) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, start + count),)]
