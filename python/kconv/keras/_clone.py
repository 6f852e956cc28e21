"""Copies of functional models, some of whose layers are exchanged for others.

A copy must compute what the model computes, so it takes over more than Keras's ``clone_model``: the
state that is no weight (adapted statistics, seeds, what is frozen), and functions that a
configuration knows by name only. A layer that cannot be copied faithfully is not: the copy of the
model then uses the same layer as the model itself.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers

from kconv.keras._initialize import call_new_layer
from kconv.keras._private import (
    WALK,
    all_layers,
    calls_of,
    inner_functional,
    operation_of,
    run_through_graph,
)

Tensor = Any
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial)
_SET_BY_KERAS = ("build", "quantize", "loss")  # in a layer, or in a model that is compiled
_INCOMPLETE = "its configuration does not make a copy"
_SIMPLE = (  # their initializers are attributes that serve for nothing else
    layers.BatchNormalization,
    layers.Conv1D,
    layers.Conv2D,
    layers.Dense,
    layers.DepthwiseConv2D,
    layers.LayerNormalization,
)


@dataclass(frozen=True)
class Exchange:
    """What takes a layer's place.

    Attributes:
        call: takes the layer's arguments.
        kind: what a report calls it.
        heirs: pairs of a layer of the model and the new one that takes over its state.
    """

    call: Callable[..., Tensor]
    kind: str
    heirs: tuple[tuple[Any, Any], ...] = ()


Plan = Callable[["Graph"], dict[int, Exchange | str]]
"""From a model to exchanges, or reasons why a layer that matters stays, by the layers' ids."""


@dataclass
class Graph:
    """A functional model, and what a plan may have to know of it.

    Attributes:
        model: the functional model.
        calls: how often each layer is called, by ids, in all models that are converted at once.
        bound: why a layer has to stay the layer that it is, by ids.
    """

    model: Any
    calls: Counter[int]
    bound: dict[int, str]

    @property
    def nodes(self) -> list[Any]:
        """The calls of layers, each with ``operation``, ``input_tensors`` and ``outputs``."""
        return calls_of(self.model)


@dataclass
class Changes:
    """What a conversion did, by the names of the layers."""

    changed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def clone(model: Any, plan: Plan, changes: Changes, *, plain: type | None = None) -> keras.Model:
    """A functional copy of a model with exchanged layers, and the state of all others.

    Args:
        model: functional or sequential, built.
        plan: called with the model and every model inside.
        changes: is filled in.
        plain: a class whose instances become ordinary models.

    Returns:
        The copy, of the same class where that is made as a functional model is.

    Raises:
        TypeError: if this is no functional or sequential model.
        ValueError: if it is a sequential model that has not been built.
    """
    bound = _bound_layers(functional(model))
    while True:
        run = _Run(plan, bound, plain)
        copy = run.rebuild(model, "")
        failed = run.hand_over()
        if not failed:
            changes.changed |= run.changed
            changes.kept |= run.kept
            return copy
        bound |= failed


def functional(model: Any) -> Any:
    """The functional model that a model is, or that a sequential model has inside."""
    if isinstance(model, keras.Sequential):
        inner = inner_functional(model)
        if inner is None:
            raise ValueError(
                f"the sequential model {model.name!r} has not been built: give it an Input"
            )
        return inner
    if not is_functional(model):
        raise TypeError(
            f"expected a functional or sequential model without a call of its own, got {model!r}"
        )
    return model


def is_functional(layer: Any) -> bool:
    """Whether this is a functional or sequential model, whose layers can be exchanged."""
    if not isinstance(layer, keras.Model) or own_methods(layer):
        return False
    if isinstance(layer, keras.Sequential):
        return type(layer).call is keras.Sequential.call
    return hasattr(layer, "_nodes_by_depth") and (
        type(layer).call.__module__.startswith(("keras.", "kconv."))
    )


def own_methods(layer: Any) -> list[str]:
    """The names of methods that were replaced in this instance alone."""
    return [
        name
        for name, value in vars(layer).items()
        if callable(value)
        and callable(getattr(type(layer), name, None))
        and name not in (*_SET_BY_KERAS, WALK)  # the latter by `fuse`, which copies are without
    ]


def copied(layer: Any) -> Any:
    """A new layer of the same configuration."""
    return from_config(type(layer), layer)


def from_config(kind: type, layer: Any, **changes: Any) -> Any:
    """A new layer of the configuration of another, with changes; None leaves an entry out."""
    config = {**layer.get_config(), **changes}
    config = {
        key: value for key, value in config.items() if key not in changes or value is not None
    }
    functions = {
        key: value
        for key, value in vars(layer).items()
        if key in config and key not in changes and isinstance(value, _FUNCTIONS)
    }
    try:
        # A configuration has only the names of functions, by which others may be found.
        new = kind.from_config({**config, **functions})  # type: ignore[attr-defined]
    except Exception:  # layers whose from_config wants functions by name
        new = kind.from_config(config)  # type: ignore[attr-defined]
    for key, value in functions.items():
        setattr(new, key, value)
    return new


def _bound_layers(model: Any) -> dict[int, str]:
    """Why layers cannot be copied, by their ids."""
    leaves = {id(layer): layer for layer in _leaves(model)}
    owners = Counter(id(v) for layer in leaves.values() for v in layer.variables)
    reasons = {}
    for key, layer in leaves.items():
        parts = all_layers(layer)
        methods = [name for part in parts for name in own_methods(part)]
        if methods:
            reasons[key] = f"it has a {methods[0]} of its own"
        elif any(getattr(part, "_forward_hooks", None) for part in parts):
            reasons[key] = "it has hooks"
        elif any(owners[id(v)] > 1 for v in layer.variables):
            reasons[key] = "it shares weights with another layer"
        elif hasattr(layer, "adapt") and type(layer) is not layers.Normalization:
            reasons[key] = "it has been adapted"
        elif not _has_configuration(layer):
            reasons[key] = _INCOMPLETE
    return reasons


def _has_configuration(layer: Any) -> bool:
    try:
        layer.get_config()
    except Exception:  # whatever users' layers, or arguments that cannot be serialized, raise
        return False
    return True


def _leaves(model: Any) -> Iterator[Any]:
    """The layers of a model and of the models inside."""
    for layer in functional(model).layers:
        if is_functional(layer):
            yield from _leaves(layer)
        else:
            yield layer


def _graphs(model: Any, seen: set[int]) -> Iterator[Any]:
    """A model and the models inside, each once."""
    if id(model) not in seen:
        seen.add(id(model))
        yield functional(model)
        for layer in functional(model).layers:
            if is_functional(layer):
                yield from _graphs(layer, seen)


class _Run:
    """One attempt to copy a model."""

    def __init__(self, plan: Plan, bound: dict[int, str], plain: type | None) -> None:
        self.plan, self.bound, self.plain = plan, bound, plain
        self.calls: Counter[int] | None = None
        self.stand_ins: dict[int, Callable[..., Any]] = {}
        self.heirs: list[tuple[Any, Any]] = []
        self.models: list[tuple[Any, Any]] = []
        self.changed: dict[str, str] = {}
        self.kept: dict[str, str] = {}

    def rebuild(self, model: Any, path: str) -> Any:
        """The copy of a model, whose layers do not have the model's state yet."""
        source = functional(model)
        if self.calls is None:
            graphs = [Graph(graph, Counter(), {}) for graph in _graphs(model, set())]
            self.calls = Counter(id(node.operation) for graph in graphs for node in graph.nodes)
        exchanges = self.plan(Graph(source, self.calls, self.bound))
        for layer in source.layers:
            found = exchanges.get(id(layer))
            if isinstance(found, Exchange):
                self.stand_ins[id(layer)] = _without_nones(found.call)
                self.heirs += found.heirs
                self.changed[path + layer.name] = found.kind
            elif id(layer) in self.bound:
                self.kept[path + layer.name] = self.bound[id(layer)]
            elif found is not None:
                self.kept[path + layer.name] = found
        inputs = keras.tree.map_structure(_input_like, source.input)
        _keep_names(source)
        outputs = run_through_graph(
            source, inputs, lambda operation: self._stand_in(operation, path)
        )
        kind = type(model)
        to_be_plain = self.plain is not None and issubclass(kind, self.plain)
        sequential = isinstance(model, keras.Sequential)
        if to_be_plain or sequential or not _is_made_as_functional(kind):
            kind = keras.Model
        copy = kind(inputs, outputs, name=model.name)
        self.models.append((model, copy))
        return copy

    def _stand_in(self, operation: Any, path: str) -> Callable[..., Any]:
        """What is called in a layer's place, or in that of an operation without weights."""
        key = id(operation)
        if key not in self.stand_ins:
            self.stand_ins[key] = self._new_stand_in(operation, path)
        return self.stand_ins[key]

    def _new_stand_in(self, operation: Any, path: str) -> Callable[..., Any]:
        if is_functional(operation):
            return self.rebuild(operation, f"{path}{operation.name}/")
        if id(operation) in self.bound:
            return operation
        try:
            copy = copied(operation)
        except Exception:  # whatever the configurations of users' own layers raise
            self.kept[path + operation.name] = _INCOMPLETE
            return operation
        if isinstance(operation, keras.layers.Layer):
            self.heirs.append((operation, copy))
            if type(operation) in _SIMPLE:  # values that are replaced need no costly start
                return functools.partial(call_new_layer, copy)
        return copy

    def hand_over(self) -> dict[int, str]:
        """Give all copies the state of the layers that they are copies of.

        Returns:
            Why some cannot have it, by the ids of the layers.
        """
        for model, copy in self.models:
            if not model.trainable:
                copy.trainable = False
        failed = {}
        for layer, copy in self.heirs:
            if not _hand_over(layer, copy):
                failed[id(layer)] = _INCOMPLETE
        return failed


def _hand_over(layer: Any, copy: Any) -> bool:
    """Give a copy the state of a layer; False if they differ inside."""
    parts = list(zip(all_layers(layer), all_layers(copy), strict=False))
    variables = list(zip(layer.variables, copy.variables, strict=False))
    if (
        len(parts) != len(all_layers(layer))
        or len(variables) != len(layer.variables)
        or len(variables) != len(copy.variables)
        or any(type(a) is not type(b) for a, b in parts[1:])
        or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in variables)
    ):
        return False
    for a, b in parts:
        if a.trainable != b.trainable:
            b.trainable = a.trainable
        for name, value in vars(a).items() if type(a) is type(b) else ():
            same = vars(b).get(name) is value
            if isinstance(value, _FUNCTIONS) and name not in _SET_BY_KERAS and not same:
                setattr(b, name, value)
    for a, b in variables:
        b.assign(np.array(keras.ops.convert_to_numpy(a)))  # JAX's trainer deletes what it had
        if a.trainable != b.trainable:
            b.trainable = a.trainable
        b.regularizer, b.constraint = a.regularizer, a.constraint
    for a, b in parts:
        if _loads_in_its_own_way(type(a)):
            store: dict[str, Any] = {}
            a.save_own_variables(store)
            b.load_own_variables({key: np.asarray(value) for key, value in store.items()})
        elif hasattr(a, "finalize_state"):
            b.finalize_state()
    return True


def _loads_in_its_own_way(kind: type) -> bool:
    """Whether a user's class has more state to save than its weights."""
    return not kind.load_own_variables.__module__.startswith("keras.")  # type: ignore[attr-defined]


def _without_nones(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call without the arguments, such as a mask, that Keras passes to say that there is none."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **{key: value for key, value in kwargs.items() if value is not None})

    return called


def _input_like(x: Any) -> Any:
    layer = operation_of(x)
    return type(layer).from_config(layer.get_config()).output


def _keep_names(model: Any) -> None:
    """See that Keras gives no new operation a name that one of the model has.

    It counts what it has named itself, not what was called "concatenate_3" by somebody else.
    """
    taken: dict[str, int] = {}
    for node in calls_of(model):
        name = node.operation.name
        numbered = re.fullmatch(r"(.*)_(\d{1,5})", name, re.DOTALL)
        stem, number = (numbered[1], int(numbered[2])) if numbered else (name, 0)
        taken[stem] = max(taken.get(stem, 0), number)
    for stem, number in taken.items():
        while keras.backend.get_uid(stem) <= number:
            pass


def _is_made_as_functional(kind: type) -> bool:
    """Whether a class of models takes inputs and outputs, as ``keras.Model`` does."""
    spec = inspect.getfullargspec(kind.__init__)  # type: ignore[misc]
    anything = spec.varargs is not None and spec.varkw is not None
    return anything or spec.args[1:] == ["inputs", "outputs", "name"]
