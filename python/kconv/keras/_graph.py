"""A Keras model's calls as a graph of :mod:`kconv.models`, from which fused segments are found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras

from kconv.keras._lift import (
    Call,
    KeptError,
    Product,
    Scalar,
    fingerprint,
    is_convolution,
    lift,
    same,
)
from kconv.keras._private import calls_of
from kconv.models import graph

__all__ = ["CallGraph", "call_graph"]


@dataclass(frozen=True)
class CallGraph:
    """A functional model's calls.

    Attributes:
        graph: a layer for each tensor of the model, and those inside of a call that is lifted as
            several; what fused segments do not know is a plain :class:`~kconv.models.graph.Layer`.
        nodes: Keras's nodes that a layer of the graph stands for, in their order, by its name. One
            inside of a call has none: the last one of the call has it.
        tensors: Keras's symbolic tensors, by the names in the graph.
        operations: Keras's layers that those of the graph stand for, by their names.
        variables: weights of lifted layers, by (layer, weight).
        dtypes: those of the lifted layers, by their names.
        reasons: why calls were not lifted, by their names.
        fingerprints: those of the model's layers when the graph was made.
        data_format: of the images.
    """

    graph: graph.Graph
    nodes: dict[str, tuple[Any, ...]]
    tensors: dict[str, keras.KerasTensor]
    operations: dict[str, Any]
    variables: dict[tuple[str, str], Any]
    dtypes: dict[str, str]
    reasons: dict[str, str]
    fingerprints: list[tuple[Any, list[Any]]]
    data_format: str

    @property
    def up_to_date(self) -> bool:
        """Whether the model's layers are what the graph was made of."""
        return all(same(values, fingerprint(layer)) for layer, values in self.fingerprints)


def call_graph(model: keras.Model) -> CallGraph:
    """The calls of a functional model, in the order in which Keras makes them."""
    nodes = calls_of(model)
    operations = {id(node.operation): node.operation for node in nodes}
    prints = {key: fingerprint(operation) for key, operation in operations.items()}
    builder = _Builder(prints, _data_format(operations.values()))
    for tensor in model.inputs:
        builder.layers.append(graph.Input(**builder.name(tensor.name, tensor), inputs=()))
    for node in nodes:
        builder.add(node)
    outputs = tuple(builder.names[id(tensor)] for tensor in model.outputs)
    builder.join(set(outputs))
    if len(outputs) > 1:  # somebody reads all of them when the rest is done
        builder.layers.append(graph.Layer(name="", inputs=outputs, shape=()))
    return CallGraph(
        graph.Graph(model.name, tuple(builder.layers), outputs[0]),
        builder.nodes,
        builder.tensors,
        builder.operations,
        builder.variables,
        builder.dtypes,
        builder.reasons,
        [(operation, prints[key]) for key, operation in operations.items()],
        builder.data_format,
    )


@dataclass
class _Builder:
    """A call graph in the making; its attributes are those of :class:`CallGraph`."""

    prints: dict[int, list[Any]]
    data_format: str
    layers: list[graph.Layer] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    nodes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: dict[str, keras.KerasTensor] = field(default_factory=dict)
    operations: dict[str, Any] = field(default_factory=dict)
    variables: dict[tuple[str, str], Any] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def name(self, name: str, tensor: keras.KerasTensor) -> dict[str, Any]:
        """Name and shape of a tensor's layer."""
        while name in self.tensors:  # a layer's second call
            name += "+"
        self.names[id(tensor)], self.tensors[name] = name, tensor
        return {"name": name, "shape": _shape(tensor.shape, self.data_format)}

    def add(self, node: Any) -> None:
        """A node's layers."""
        sources = [tensor for tensor in node.input_tensors if id(tensor) in self.names]
        inputs = tuple(self.names[id(tensor)] for tensor in sources)
        for tensor in node.outputs:
            common = {**self.name(node.operation.name, tensor), "inputs": inputs}
            name = common["name"]
            self.nodes[name], self.operations[name] = (node,), node.operation
            try:
                if len(node.outputs) > 1:
                    raise KeptError("it has several outputs")
                dtype = str(tensor.dtype)
                call = Call(common, _operands(node), dtype, self.data_format)
                lifted = lift(self.prints[id(node.operation)], call)
            except KeptError as reason:
                self.reasons[name] = str(reason)
                self.layers.append(graph.Layer(**common))
            else:
                self.layers += lifted.layers
                self.variables |= lifted.variables
                for layer in lifted.layers:
                    self.operations[layer.name] = node.operation
                    self.dtypes[layer.name] = lifted.dtype

    def join(self, outputs: set[str]) -> None:
        """Put one layer in the place of several calls that compute an activation together."""
        layers = {layer.name: layer for layer in self.layers}
        readers: dict[str, int] = dict.fromkeys(layers, 0)
        for name in (*outputs, *(name for layer in self.layers for name in layer.inputs)):
            readers[name] += 1
        for layer in self.layers:
            name = layer.name
            if isinstance(layer, Scalar):
                joined, inner = _hard_sigmoid(layer, layers)
            elif isinstance(layer, Product):
                joined, inner = _gated_by_itself(layer, layers)
            else:
                continue
            dtypes = {self.dtypes.get(part) for part in (*inner, name)}
            if joined and len(dtypes) == 1 and all(readers[part] == 1 for part in inner):
                layers[name] = joined
                nodes = [node for part in (*inner, name) for node in self.nodes.pop(part)]
                self.nodes[name] = tuple(nodes)
                for part in inner:
                    del layers[part]
        for name, layer in layers.items():
            if isinstance(layer, Scalar | Product):  # part of nothing
                layers[name] = graph.Layer(name=name, inputs=layer.inputs, shape=layer.shape)
                self.reasons[name] = "no fused operation has it"
        self.layers = list(layers.values())


Joined = tuple[graph.Layer | None, tuple[str, ...]]
"""What takes the place of a call and of those before it, whose names these are."""


def _hard_sigmoid(last: Scalar, layers: dict[str, graph.Layer]) -> Joined:
    """``relu6(x + 3) / 6``."""
    relu = layers[last.inputs[0]]
    if last.kind != "multiply" or last.value != 1 / 6 or not _is_activation(relu, "relu6"):
        return None, ()
    first = layers[relu.inputs[0]]
    if not isinstance(first, Scalar) or (first.kind, first.value) != ("add", 3):
        return None, ()
    return _activation("hard_sigmoid", last, first.inputs), (first.name, relu.name)


def _gated_by_itself(last: Product, layers: dict[str, graph.Layer]) -> Joined:
    """``x * sigmoid(x)`` or ``x * hard_sigmoid(x)``."""
    kinds = {"sigmoid": "swish", "hard_sigmoid": "hard_swish"}
    for x, gate in (last.inputs, last.inputs[::-1]):
        layer = layers[gate]
        if isinstance(layer, graph.Activation) and layer.kind in kinds and layer.inputs == (x,):
            return _activation(kinds[layer.kind], last, (x,)), (gate,)
    return None, ()


def _activation(kind: str, last: graph.Layer, inputs: tuple[str, ...]) -> graph.Activation:
    return graph.Activation(name=last.name, inputs=inputs, shape=last.shape, kind=kind)


def _is_activation(layer: graph.Layer, kind: str) -> bool:
    return isinstance(layer, graph.Activation) and layer.kind == kind


def _operands(node: Any) -> list[Any]:
    """What a layer or an operation is called with: tensors alone, or with an operation numbers.

    Keras writes down what it adds: no mask, and not to train, which a model's own call overrides.

    Raises:
        KeptError: if a layer is called with anything else.
    """
    args, kwargs = node.arguments.args, node.arguments.kwargs
    added = all(
        value is None or (name == "training" and value is False) for name, value in kwargs.items()
    )
    if isinstance(node.operation, keras.layers.Layer):
        operands = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
        alone = all(isinstance(x, keras.KerasTensor) for x in operands)
        if len(args) != 1 or not added or not alone:
            raise KeptError("it is called with more than tensors")
        return list(operands)
    if not added or not all(isinstance(x, keras.KerasTensor | float | int) for x in args):
        raise KeptError("it is called with more than tensors and numbers")
    return list(args)


def _data_format(operations: Iterable[Any]) -> str:
    """The first convolution's; Keras's setting may have changed since the layers were made."""
    for operation in operations:
        if is_convolution(operation):
            return str(operation.data_format)
    return str(keras.config.image_data_format())


def _shape(shape: tuple[int | None, ...], data_format: str) -> graph.Shape:
    """(H, W, C) or (C,) of a tensor's shape."""
    if len(shape) == 4 and data_format == "channels_first":
        return (*shape[2:], shape[1])
    return shape[1:]
