"""Layer graphs as JSON, and back: each field is checked against its type before it is believed.

Example:
    >>> from kconv.models import create
    >>> graph = create("kmobilenet", classes=10, input_shape=(32, 32, 3)).graph()
    >>> graph_from_json(graph_to_json(graph)) == graph
    True
"""

from __future__ import annotations

import dataclasses
import math
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kconv.models import graph as layers
from kconv.models.activations import ACTIVATIONS
from kconv.models.graph import Activation, Graph, Input, Layer

__all__ = ["graph_from_json", "graph_to_json"]

_KINDS = {cls.__name__: cls for cls in Layer.__subclasses__() if cls.__module__ == layers.__name__}
_LARGEST = 2**31 - 1


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """A graph as what JSON holds.

    Args:
        graph: of layers of the classes of :mod:`kconv.models.graph`.

    Returns:
        The name, the output's name, and the layers with their fields; those with defaults are left
        out where they are these.

    Raises:
        ValueError: if one of the layers is of no such class.
    """
    return {
        "name": graph.name,
        "output": graph.output,
        "layers": [_layer_to_json(layer) for layer in graph.layers],
    }


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    if _KINDS.get(type(layer).__name__) is not type(layer):
        raise ValueError(f"layer {layer.name!r} is none of those that kconv knows")
    values = {
        field.name: getattr(layer, field.name)
        for field in dataclasses.fields(layer)
        if getattr(layer, field.name) != field.default
    }
    return {"type": type(layer).__name__, **values}


def graph_from_json(value: Any) -> Graph:
    """The graph that :func:`graph_to_json` wrote.

    Args:
        value: what was read.

    Returns:
        The graph; its layers are in an order in which they can be computed.

    Raises:
        ValueError: if it is no such graph.
    """
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        raise ValueError("the graph has no list of layers")
    name, output = (_checked(str, value.get(key), f"the graph's {key}") for key in _NAMES)
    known: dict[str, Layer] = {}
    for number, entry in enumerate(value["layers"]):
        layer = _layer_from_json(entry, number)
        if layer.name in known:
            raise ValueError(f"the graph has two layers {layer.name!r}")
        for source in layer.inputs:
            if source not in known:
                raise ValueError(f"layer {layer.name!r} reads {source!r}, no layer before it")
        if isinstance(layer, Input) != (number == 0) or bool(layer.inputs) == (number == 0):
            raise ValueError(f"layer {layer.name!r}: the first layer and no other is an Input")
        known[layer.name] = layer
    if output not in known:
        raise ValueError(f"the graph's output {output!r} is no layer")
    return Graph(name, tuple(known.values()), output)


_NAMES = ("name", "output")


@cache
def _hints(kind: str) -> dict[str, Any]:
    return get_type_hints(_KINDS[kind])


def _layer_from_json(entry: Any, number: int) -> Layer:
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise ValueError(f"layer {number} of the graph has no type")
    kind = _KINDS.get(entry["type"])
    if kind is None:
        raise ValueError(f"layer {number} of the graph is a {entry['type']!r}, which is unknown")
    hints = _hints(entry["type"])
    given = {name: value for name, value in entry.items() if name != "type"}
    where = f"layer {given.get('name', number)!r}"
    for name in given:
        if name not in hints:
            raise ValueError(f"{where} of the graph has an unknown {name!r}")
    values = {name: _checked(hints[name], x, f"{where}: {name}") for name, x in given.items()}
    try:
        layer = kind(**values)
    except TypeError:
        raise ValueError(f"{where} of the graph lacks some of {', '.join(hints)}") from None
    _check(layer, where)
    return layer


def _check(layer: Layer, where: str) -> None:
    """What a type does not tell of a layer's values."""
    if len(layer.shape) not in (1, 3) or layer.shape[-1] is None:
        raise ValueError(f"{where}: shape is {layer.shape!r}, which it cannot be")
    for name in _COUNTS & vars(layer).keys():
        value = vars(layer)[name]
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError(f"{where}: {name} is {value!r}, which it cannot be")
    if isinstance(layer, Activation) and layer.kind not in ACTIVATIONS:
        raise ValueError(f"{where}: kind is {layer.kind!r}, which it cannot be")


_COUNTS = {"strides", "groups", "dilation", "kernel_size", "pool_size", "interleave"}
_COUNTS |= {"filters", "in_channels", "units", "in_features"}
"""Attributes of which none is below 1."""


def _checked(hint: Any, value: Any, where: str) -> Any:
    """A value in the type that a field has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return _checked(choice, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple) and (
            arguments[-1] is Ellipsis or len(arguments) == len(value)
        ):
            inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            pairs = zip(inner, value, strict=True)
            return tuple(_checked(one, item, where) for one, item in pairs)
    elif hint is int:
        if type(value) is int and 0 <= value <= _LARGEST:
            return value
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:  # str, bool, None
        return value
    raise ValueError(f"{where} is {value!r}, which it cannot be")
