"""All that kconv uses of Keras beyond its public names, which may change with any release.

There with the same meaning in Keras 3.5 to 3.15, the versions of :mod:`kconv._versions`. For a new
release, look here first. (``_lift`` reads layers' own attributes besides, by name, and takes a
layer that lacks one for a stranger.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras.src.backend.common.variables import AutocastScope

__all__ = [
    "WALK",
    "AutocastScope",
    "all_layers",
    "calls_of",
    "inner_functional",
    "operation_of",
    "run_through_graph",
]

# Within ``AutocastScope(None)``, variables are read as they are stored, whatever policy the layer
# has that is called.

WALK = "_run_through_graph"
"""The method by which a functional model calls its layers, one after the other."""


def run_through_graph(model: Any, inputs: Any, operation_fn: Callable[[Any], Any]) -> Any:
    """The outputs of a functional model whose operations are exchanged by a function."""
    return getattr(model, WALK)(inputs, operation_fn=operation_fn)


def calls_of(model: Any) -> list[Any]:
    """The calls of a functional model's layers, in the order in which Keras makes them.

    Each has ``operation``, ``arguments``, ``input_tensors`` and ``outputs``.
    """
    depths = sorted(model._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in model._nodes_by_depth[depth]]
    return [node for node in nodes if node.operation and not node.is_input]


def inner_functional(model: keras.Sequential) -> Any:
    """The functional model inside a sequential one, None before it is built."""
    return model._functional


def all_layers(layer: Any) -> list[Any]:
    """A layer and all layers in it."""
    return list(layer._flatten_layers())


def operation_of(tensor: keras.KerasTensor) -> Any:
    """The operation that a symbolic tensor comes from."""
    return tensor._keras_history.operation
