"""A Keras model's calls as a graph of :mod:`kconv.models`, from which fused segments are found.

:func:`lift` makes one graph layer of one call of a Keras layer. All that it reads of the layer it
reads through :func:`fingerprint`, so two equal fingerprints mean that the graph layer still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import keras
from keras import activations, layers

from kconv.keras.layers import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.models import graph
from kconv.models.activations import ACTIVATIONS, FUSED_ACTIVATIONS, ActivationName

__all__ = ["ACTIVATION_NAMES", "CallGraph", "call_graph", "fingerprint", "lift", "same"]

ACTIVATION_NAMES: dict[Any, ActivationName] = {
    getattr(activations, ACTIVATIONS[name].keras): name for name in FUSED_ACTIVATIONS
}
"""kconv's names of Keras's activations, which are themselves meant and not their names."""

Read = Any
"""What a fingerprint holds, by its names."""


@dataclass(frozen=True)
class _Call:
    """How a layer was called: by what a graph layer has whatever its kind, and the tensors."""

    common: dict[str, Any]
    shapes: list[tuple[int | None, ...]]
    data_format: str

    @property
    def shape(self) -> graph.Shape:
        shape: graph.Shape = self.common["shape"]
        return shape

    @property
    def axis(self) -> int:
        """The axis of an image's channels."""
        return 3 if self.data_format == "channels_last" else 1

    def is_channels(self, axis: Any) -> bool:
        return axis in (self.axis, self.axis - 4)


def _conv(read: Read, call: _Call) -> graph.Layer | None:
    kernel = _conv_kernel(read)
    if kernel is None:
        return None
    return graph.Conv(
        **call.common,
        kernel_size=read.kernel_size,
        strides=read.strides,
        padding=read.padding,
        use_bias=read.use_bias,
        groups=read.groups,
        filters=read.filters,
        in_channels=kernel[2] * read.groups,
        interleave=getattr(read, "interleave", 1),
    )


def _depthwise(read: Read, call: _Call) -> graph.Layer | None:
    kernel = _conv_kernel(read)
    if kernel is None or read.kernel_size[0] != read.kernel_size[1]:
        return None
    return graph.DepthwiseConv(
        **call.common,
        kernel_size=read.kernel_size[0],
        strides=read.strides[0],
        padding=read.padding,
        use_bias=read.use_bias,
        depth_multiplier=read.depth_multiplier,
        in_channels=kernel[2],
    )


def _conv_kernel(read: Read) -> tuple[int, ...] | None:
    """The shape of a convolution's kernel, where nothing but a convolution happens."""
    linear = read.activation is None or read.activation is activations.linear
    if not linear or getattr(read, "lora_enabled", False) or read.dilation_rate != (1, 1):
        return None
    if read.strides[0] != read.strides[1] or read.padding not in ("same", "valid"):
        return None
    return tuple((read.kernel if read._kernel is None else read._kernel).shape)


def _norm(read: Read, call: _Call) -> graph.Layer | None:
    if not read.center or read.renorm or read.synchronized or not call.is_channels(read.axis):
        return None
    options = {"epsilon": read.epsilon, "momentum": read.momentum, "scale": bool(read.scale)}
    return graph.BatchNorm(**call.common, **options)


def _activation(read: Read, call: _Call) -> graph.Layer | None:
    known = [name for function, name in ACTIVATION_NAMES.items() if function is read.activation]
    return graph.Activation(**call.common, kind=known[0]) if known else None


def _zero_pad(read: Read, call: _Call) -> graph.Layer | None:
    return graph.ZeroPad(**call.common, padding=read.padding)


def _interleave(read: Read, call: _Call) -> graph.Layer | None:
    return graph.Interleave(**call.common, step=max(read.step_size, 1))


def _copy_channels(read: Read, call: _Call) -> graph.Layer | None:
    if read.channel_count != call.shape[-1]:
        return None
    return graph.CopyChannels(**call.common, start=read.channel_start, count=read.channel_count)


def _fold_halves(read: Read, call: _Call) -> graph.Layer | None:
    return graph.FoldHalves(**call.common)


def _dropout(read: Read, call: _Call) -> graph.Layer | None:
    if read.noise_shape != (None, 1, 1, 1):
        return None
    return graph.Dropout(**call.common, rate=read.rate, per_sample=True)


def _mean(read: Read, call: _Call) -> graph.Layer | None:
    return graph.GlobalPool(**call.common, keepdims=bool(read.keepdims))


def _reshape(read: Read, call: _Call) -> graph.Layer | None:
    pixel = [1, 1, 1]
    pixel[call.axis - 1] = call.shape[-1] or -1
    vector = len(call.shapes[0]) == 2 and call.shapes[0][1] == call.shape[-1]
    return graph.Reshape(**call.common) if vector and read.target_shape == tuple(pixel) else None


def _add(read: Read, call: _Call) -> graph.Layer | None:
    return graph.Add(**call.common) if len(set(call.shapes)) == 1 else None


def _concatenate(read: Read, call: _Call) -> graph.Layer | None:
    return graph.Concat(**call.common) if call.is_channels(read.axis) else None


def _multiply(read: Read, call: _Call) -> graph.Layer | None:
    if len(call.shapes) != 2 or any(len(shape) != 4 for shape in call.shapes):
        return None
    x, gate = call.shapes
    pixels = [size for axis, size in enumerate(gate) if axis not in (0, call.axis)]
    same_channels = x[call.axis] == gate[call.axis]
    return graph.Multiply(**call.common) if pixels == [1, 1] and same_channels else None


# Only what all of a class's layers have: PyTorch's modules take long to say that they lack a name.
_DEPTHWISE = (
    *("kernel_size", "strides", "padding", "dilation_rate", "use_bias", "activation"),
    *("data_format", "depth_multiplier"),
)
_CONV = (*_DEPTHWISE[:-1], "groups", "filters", "lora_enabled", "convolution_op")
_NORM = ("axis", "epsilon", "momentum", "center", "scale", "renorm", "synchronized")
_KERNEL, _DEPTHWISE_KERNEL = ("_kernel", "bias"), ("kernel", "bias")
_STATISTICS = ("gamma", "beta", "moving_mean", "moving_variance")


@dataclass(frozen=True)
class _Kind:
    """What is read of the layers of a class, subclasses not counted, and what is made of it."""

    lift: Callable[[Read, _Call], graph.Layer | None]
    names: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


_KINDS = {
    layers.Conv2D: _Kind(_conv, _CONV, _KERNEL),
    PointwiseConv2D: _Kind(_conv, (*_CONV, "interleave"), _KERNEL),
    layers.DepthwiseConv2D: _Kind(_depthwise, _DEPTHWISE, _DEPTHWISE_KERNEL),
    DepthwiseConv2D: _Kind(_depthwise, _DEPTHWISE, _DEPTHWISE_KERNEL),
    layers.BatchNormalization: _Kind(_norm, _NORM, _STATISTICS),
    layers.Activation: _Kind(_activation, ("activation",)),
    layers.ZeroPadding2D: _Kind(_zero_pad, ("padding", "data_format")),
    InterleaveChannels: _Kind(_interleave, ("step_size", "data_format")),
    CopyChannels: _Kind(_copy_channels, ("channel_start", "channel_count", "data_format")),
    SumIntoHalfChannels: _Kind(_fold_halves, ("data_format",)),
    layers.Dropout: _Kind(_dropout, ("noise_shape", "rate")),
    layers.GlobalAveragePooling2D: _Kind(_mean, ("keepdims", "data_format")),
    layers.Reshape: _Kind(_reshape, ("target_shape",)),
    layers.Add: _Kind(_add),
    layers.Concatenate: _Kind(_concatenate, ("axis",)),
    layers.Multiply: _Kind(_multiply),
}

# Where a layer's computation can be exchanged, in an instance or in its class. (PyTorch's modules,
# which Keras's layers are on that backend, have a `forward`.)
_METHODS = ("__call__", "call", "forward", "convolution_op")
_ORIGINALS = {
    kind: {name: getattr(kind, name) for name in _METHODS if hasattr(kind, name)} for kind in _KINDS
}
_FORWARD = ("forward",) if hasattr(layers.Layer, "forward") else ()
_OF_ALL = ("__call__", "call", *_FORWARD, "activity_regularizer", "dtype_policy", "autocast")
_NAMES = {kind: (*_OF_ALL, *entry.names, *entry.weights) for kind, entry in _KINDS.items()}


def fingerprint(layer: Any) -> list[Any]:
    """All that :func:`lift` reads of a layer."""
    names = _NAMES.get(kind := type(layer))
    if names is None:
        return [kind]
    return [kind, _hooked(layer), *[getattr(layer, name, None) for name in names]]


def _no_hooks(layer: Any) -> bool:
    return False


def _torch_hooks(layer: Any) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


_hooked = _torch_hooks if keras.backend.backend() == "torch" else _no_hooks


def same(before: list[Any], after: list[Any]) -> bool:
    """Whether two fingerprints are equal; what cannot be compared is not."""
    try:
        return before == after
    except Exception:  # an array's equality has no truth
        return False


def lift(values: list[Any], call: _Call) -> tuple[graph.Layer, str] | None:
    """The graph layer that stands for a call of a layer, and its dtype; None where there is none.

    Args:
        values: the layer's fingerprint.
        call: how it is called.
    """
    kind, *rest = values
    if kind not in _KINDS or rest.pop(0):  # with hooks
        return None
    entry = _KINDS[kind]
    read = SimpleNamespace(**{"_kernel": None, **dict(zip(_NAMES[kind], rest, strict=True))})
    for name, original in _ORIGINALS[kind].items():
        if getattr(getattr(read, name), "__func__", None) is not original:
            return None
    policy = read.dtype_policy
    dtype = str(policy.name)
    if type(policy) is not keras.DTypePolicy or dtype not in ("float32", "float64"):
        return None
    if read.activity_regularizer is not None or not read.autocast:
        return None
    if getattr(read, "data_format", call.data_format) != call.data_format:
        return None
    try:
        hash(tuple(getattr(read, name) for name in entry.names))  # a list could change unnoticed
        layer = entry.lift(read, call)
        if layer is None:
            return None
        weights = {name: getattr(read, name) for name in entry.weights}
        for name, shape in layer.weights().items():
            weight = weights[name if name in weights else entry.weights[0]]
            if (
                tuple(weight.shape) != shape
                or keras.backend.standardize_dtype(weight.dtype) != dtype
            ):
                return None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None  # attributes of other types than Keras's layers set
    return layer, dtype


@dataclass(frozen=True)
class CallGraph:
    """A functional model's calls.

    Attributes:
        graph: a layer for each tensor of the model; those that fused segments do not know are plain
            :class:`~kconv.models.graph.Layer`.
        nodes: Keras's nodes, by the names in the graph.
        tensors: Keras's symbolic tensors, by the names in the graph.
        dtypes: those of the layers that are not plain, by their names in the graph.
        fingerprints: those of the model's layers when the graph was made.
        data_format: of the images.
    """

    graph: graph.Graph
    nodes: dict[str, Any]
    tensors: dict[str, keras.KerasTensor]
    dtypes: dict[str, str]
    fingerprints: list[tuple[Any, list[Any]]]
    data_format: str

    @property
    def up_to_date(self) -> bool:
        """Whether the model's layers are what the graph was made of."""
        return all(same(values, fingerprint(layer)) for layer, values in self.fingerprints)


def call_graph(model: keras.Model) -> CallGraph:
    """The calls of a functional model, in the order in which Keras makes them."""
    depths = sorted(model._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in model._nodes_by_depth[depth]]
    nodes = [node for node in nodes if node.operation and not node.is_input]
    operations = {id(node.operation): node.operation for node in nodes}
    prints = {key: fingerprint(operation) for key, operation in operations.items()}
    data_format = _data_format(operations.values())
    found: list[graph.Layer] = []
    names: dict[int, str] = {}
    tensors: dict[str, keras.KerasTensor] = {}
    by_name: dict[str, Any] = {}
    dtypes: dict[str, str] = {}

    def add(name: str, tensor: keras.KerasTensor) -> dict[str, Any]:
        while name in tensors:  # a layer's second call
            name += "+"
        names[id(tensor)], tensors[name] = name, tensor
        return {"name": name, "shape": _shape(tensor.shape, data_format)}

    for tensor in model.inputs:
        found.append(graph.Input(**add(tensor.name, tensor), inputs=()))
    for node in nodes:
        sources = [tensor for tensor in node.input_tensors if id(tensor) in names]
        inputs = tuple(names[id(tensor)] for tensor in sources)
        for tensor in node.outputs:
            common = {**add(node.operation.name, tensor), "inputs": inputs}
            by_name[common["name"]] = node
            shapes = [tuple(source.shape) for source in sources]
            lifted = None
            if _takes_tensors_alone(node) and len(node.outputs) == 1:
                call = _Call(common, shapes, data_format)
                lifted = lift(prints[id(node.operation)], call)
            if lifted is None:
                found.append(graph.Layer(**common))
            else:
                found.append(lifted[0])
                dtypes[common["name"]] = lifted[1]
    outputs = tuple(names[id(tensor)] for tensor in model.outputs)
    if len(outputs) > 1:  # somebody reads all of them when the rest is done
        found.append(graph.Layer(name="", inputs=outputs, shape=()))
    return CallGraph(
        graph.Graph(model.name, tuple(found), outputs[0]),
        by_name,
        tensors,
        dtypes,
        [(operation, prints[key]) for key, operation in operations.items()],
        data_format,
    )


def _takes_tensors_alone(node: Any) -> bool:
    """Whether a layer is called with one tensor or one list of tensors, and nothing else.

    Keras writes down what it adds: no mask, and not to train, which a model's own call overrides.
    """
    args, kwargs = node.arguments.args, node.arguments.kwargs
    added = all(
        value is None or (name == "training" and value is False) for name, value in kwargs.items()
    )
    if len(args) != 1 or not added:
        return False
    tensors = args[0] if isinstance(args[0], list | tuple) else args
    return all(isinstance(tensor, keras.KerasTensor) for tensor in tensors)


def _data_format(operations: Iterable[Any]) -> str:
    """The first convolution's; Keras's setting may have changed since the layers were made."""
    for operation in operations:
        if type(operation) in _KINDS and isinstance(
            operation, layers.Conv2D | layers.DepthwiseConv2D
        ):
            return str(operation.data_format)
    return str(keras.config.image_data_format())


def _shape(shape: tuple[int | None, ...], data_format: str) -> graph.Shape:
    """(H, W, C) or (C,) of a tensor's shape."""
    if len(shape) == 4 and data_format == "channels_first":
        return (*shape[2:], shape[1])
    return shape[1:]
