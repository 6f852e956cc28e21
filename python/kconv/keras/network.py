"""A Keras model whose chains of layers run as one operation each."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import keras
from keras import ops

from kconv.keras._graph import model_graph
from kconv.keras._native import LAYOUTS, fused, runs_on_cpu
from kconv.models import graph
from kconv.models.fusion import Segment, partition

Tensor = Any


@keras.saving.register_keras_serializable(package="kconv")
class Network(keras.Model):
    """A functional model whose chains of convolutions, batch norms and the like run fused.

    It is made, saved, loaded and trained as every functional model, and has the same layers with
    the same weights. When it is called on numbers, the longest chains of layers that
    :mod:`kconv.models.fusion` knows run as one operation each, on their layers' weights. They run
    layer by layer where it cannot stand for them: in mixed precision, on other devices than the
    CPU, and where some of a chain's batch norms are frozen and others are not.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> y = keras.layers.BatchNormalization()(keras.layers.Conv2D(24, 1, groups=4)(x))
        >>> model = Network(x, keras.layers.Activation("silu")(y))
        >>> model(keras.ops.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 24)
    """

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor = None) -> Tensor:
        """(N, H, W, C), or (N, C, H, W), to the output of the last layer."""
        parts = _parts(self)
        x = inputs[0] if isinstance(inputs, list | tuple) and len(inputs) == 1 else inputs
        if not parts or mask is not None or not _supported(x):
            return super().call(inputs, training=training, mask=mask)
        x = ops.convert_to_tensor(x, self.inputs[0].dtype)
        layers = {layer.name: layer for layer in self.layers}
        values = {self.inputs[0]._keras_history.operation.name: x}
        for part in parts:
            if isinstance(part, Segment):
                values[part.name] = _run(part, layers, values[part.input], bool(training))
            else:
                values[part.name] = _call(layers[part.name], part, values, training)
        return values[self.outputs[0]._keras_history.operation.name]


_PARTS: WeakKeyDictionary[Network, list[graph.Layer | Segment]] = WeakKeyDictionary()


def _parts(model: Network) -> list[graph.Layer | Segment]:
    """A model's parts in their order; none where it must run layer by layer."""
    if model not in _PARTS:
        layers = model_graph(model, keras.config.image_data_format())
        parts = [] if layers is None else partition(layers)
        found = any(isinstance(part, Segment) for part in parts)
        policies = {layer.dtype_policy.name for layer in model.layers if layer.weights}
        single = len(policies) == 1 and policies <= {"float32", "float64"}
        _PARTS[model] = parts if found and single else []
    return _PARTS[model]


def _supported(x: Tensor) -> bool:
    """Whether a tensor is one that the native operation takes."""
    if isinstance(x, keras.KerasTensor) or not hasattr(x, "shape") or len(x.shape) != 4:
        return False
    if any(size is None for size in x.shape[1:]):
        return False
    if getattr(getattr(x, "device", None), "type", "cpu") != "cpu" or not runs_on_cpu():
        return False
    return keras.backend.standardize_dtype(x.dtype) in ("float32", "float64")


def _run(segment: Segment, layers: dict[str, Any], x: Tensor, training: bool) -> Tensor:
    data_format = keras.config.image_data_format()
    height = 1 if data_format == "channels_last" else 2
    program = segment.program((x.shape[height], x.shape[height + 1]), "IO")
    norms = [layers[norm.name] for norm in program.norms]
    own = [training and norm.trainable for norm in norms]
    if len(set(own)) > 1:
        return _layer_by_layer(segment, layers, x, training)
    parameters = [getattr(layers[layer], _attribute(name)) for layer, name in program.parameters]
    flat = ops.concatenate([ops.reshape(weight, (-1,)) for weight in parameters])
    x = ops.cast(x, flat.dtype)  # as the layers do: a model's input is float32 by default
    masks = None
    if training and program.masks:
        ones = ops.ones((ops.shape(x)[0], 1, 1, 1), x.dtype)
        drops = [layers[drop.name](ones, training=True) for drop in program.masks]
        masks = ops.stack([ops.reshape(drop, (-1,)) for drop in drops])
    statistics = None
    if norms and not any(own):
        means = ops.concatenate([ops.convert_to_tensor(norm.moving_mean) for norm in norms])
        variances = [ops.convert_to_tensor(norm.moving_variance) for norm in norms]
        statistics = ops.stack([means, ops.concatenate(variances)])
    y, used = fused(program, LAYOUTS[data_format], x, flat, masks, statistics)
    if any(own):
        _update_statistics(norms, used)
    return y if segment.keeps_pixels else ops.reshape(y, (-1, program.output_size[0]))


def _attribute(weight: str) -> str:
    return "kernel" if weight == "depthwise_kernel" else weight


def _update_statistics(norms: list[Any], used: Tensor) -> None:
    """The moving statistics, as keras.layers.BatchNormalization updates them."""
    start = 0
    for norm in norms:
        end = start + norm.moving_mean.shape[0]
        for moving, values in zip((norm.moving_mean, norm.moving_variance), used, strict=True):
            moving.assign(moving * norm.momentum + values[start:end] * (1 - norm.momentum))
        start = end


def _layer_by_layer(segment: Segment, layers: dict[str, Any], x: Tensor, training: bool) -> Tensor:
    values = {segment.input: x}
    for part in segment.layers:
        values[part.name] = _call(layers[part.name], part, values, training)
    return values[segment.name]


def _call(
    layer: Any, part: graph.Layer, values: dict[str, Tensor], training: bool | None
) -> Tensor:
    """The output of the Keras layer that stands for a layer of the graph."""
    arguments = [values[name] for name in part.inputs]
    options = {"training": training} if layer._call_has_training_arg else {}
    return layer(arguments if len(arguments) > 1 else arguments[0], **options)
