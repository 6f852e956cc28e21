"""Models of Keras 2, from its HDF5 files, as models of Keras 3.

Keras 3's own loader refuses many of these files, for arguments that its layers no longer have or
for models inside of models, and opens others as something else: "hard_sigmoid" is another function
now. So layers are made from their configurations and called one by one here, and every weight goes
to the layer that it names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import keras
from keras import ops

Config = dict[str, Any]
Tensor = Any

_MODELS = ("Functional", "Model", "Sequential")

# Arguments of Keras 2's layers that change nothing in what a loaded model computes.
_OF_NO_EFFECT = {
    "batch_input_shape",
    "build_config",
    "fused",
    "implementation",
    "input_length",
    "key_shape",
    "optional",
    "query_shape",
    "ragged",
    "softmax_robust_masking",
    "sparse",
    "value_shape",
}
# What depthwise and separable layers inherited from Keras 2's Conv2D, and do not use.
_OF_CONVOLUTIONS = {
    "filters",
    "groups",
    "kernel_constraint",
    "kernel_initializer",
    "kernel_regularizer",
}
_OF_WINDOWS = {"dilation_rate", "kernel_size", "padding", "strides"}


@keras.saving.register_keras_serializable(package="kconv", name="Keras2HardSigmoid")
def keras2_hard_sigmoid(x: Tensor) -> Tensor:
    """Keras 2's "hard_sigmoid"; Keras 3's has a slope of 1 / 6."""
    return ops.clip(x * 0.2 + 0.5, 0.0, 1.0)


def model_from_config(config: Config) -> keras.Model:
    """The model of a configuration ``{"class_name": ..., "config": ...}`` of Keras 2.

    Layers' names have "_" for each "/", which Keras 3 refuses. Classes beyond Keras's are looked up
    among the custom objects.

    Raises:
        ValueError: if Keras 3 has no such layer, or it has not this argument.
        Exception: what Keras raises for arguments that it does not understand.
    """
    if config["class_name"] == "Sequential":
        return _sequential(config["config"])
    return _functional(config["config"])


def _sequential(config: Config | list[Config]) -> keras.Model:
    config = {"layers": config} if isinstance(config, list) else config  # of Keras 2.2 and before
    layers = config["layers"]
    first = layers[0]["config"]
    shape = first.get("batch_input_shape") or config.get("build_input_shape")
    made = [_layer(layer) for layer in layers if layer["class_name"] != "InputLayer"]
    if layers[0]["class_name"] in _MODELS and shape is None:
        shape = made[0].input_shape
    if shape is None:
        raise ValueError("the Sequential model was saved before it knew the shape of its input")
    inputs = keras.Input(batch_shape=shape, dtype=_dtype(first.get("dtype")))
    return _frozen(keras.Sequential([inputs, *made], name=_plain(config.get("name"))), config)


def _functional(config: Config) -> keras.Model:
    """The model of a graph, by calling its layers once for each of their nodes."""
    layers: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = []  # a layer's name, and the inputs of a call
    outputs: dict[str, list[Any]] = {}  # of a layer's calls so far
    for item in config["layers"]:
        name, kind = item["name"], item["class_name"]
        if kind == "InputLayer":
            inner = item["config"]
            outputs[name] = [
                keras.Input(
                    batch_shape=inner["batch_input_shape"],
                    dtype=_dtype(inner.get("dtype")),
                    name=_plain(name),
                )
            ]
            continue
        layers[name] = _layer(item)
        # A model inside a model counts its own graph as its first call.
        outputs[name] = [None] if kind in _MODELS else []
        waiting += [(name, node) for node in item["inbound_nodes"]]

    def known(reference: Any) -> bool:
        return len(outputs[reference[0]]) > reference[1]

    def tensor(reference: Any) -> Tensor:
        found = keras.tree.flatten(outputs[reference[0]][reference[1]])
        return found[reference[2]]

    def is_reference(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) in (3, 4)
            and isinstance(value[0], str)
            and value[0] in outputs
        )

    def references(value: Any) -> Iterator[Any]:
        if is_reference(value):
            yield value
            value = value[3:]
        if isinstance(value, list | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from references(item)

    def filled(value: Any) -> Any:
        if is_reference(value):
            return tensor(value)
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return value

    while waiting:
        delayed: list[tuple[str, Any]] = []
        for name, node in waiting:
            # A layer's calls are numbered: none may overtake another that still waits.
            if name in {other for other, _ in delayed} or not all(map(known, references(node))):
                delayed.append((name, node))
                continue
            inputs, arguments = _call_of(name, node, is_reference)
            outputs[name].append(_called(layers[name], filled(inputs), filled(arguments)))
        if len(delayed) == len(waiting):
            raise ValueError(f"the layer {delayed[0][0]!r} has inputs that no other layer gives")
        waiting = delayed

    ends = [config["input_layers"], config["output_layers"]]
    # One tensor in a list would make a model that expects, and gives, lists of one.
    ends = [end[0] if isinstance(end, list) and len(end) == 1 else end for end in ends]
    return _frozen(keras.Model(*map(filled, ends), name=_plain(config.get("name"))), config)


def _frozen(model: keras.Model, config: Config) -> keras.Model:
    """The model, made untrainable if it was; its layers may be so of their own."""
    if not config.get("trainable", True):
        model.trainable = False
    return model


def _called(layer: Any, inputs: Any, arguments: Config) -> Any:
    recurrent = isinstance(layer, keras.layers.RNN | keras.layers.Bidirectional)
    if recurrent and isinstance(inputs, list):  # Keras 2 lists the state behind the input
        inputs, *arguments["initial_state"] = inputs
    return layer(inputs, **arguments)


def _call_of(name: str, node: Any, is_reference: Any) -> tuple[Any, Config]:
    """The inputs of a call, a reference or a list of such, and its other arguments."""
    inputs = [node] if is_reference(node) else node
    if not (isinstance(inputs, list) and inputs and all(map(is_reference, inputs))):
        raise ValueError(f"the layer {name!r} is called in a way that is not understood: {node!r}")
    arguments = inputs[0][3] if len(inputs[0]) == 4 else {}
    references = [reference[:3] for reference in inputs]
    return references[0] if len(references) == 1 else references, arguments


def _layer(item: Config) -> Any:
    """The layer, or model, of a configuration."""
    kind, config = item["class_name"], item["config"]
    if kind in _MODELS:
        return model_from_config(item)
    kind = kind if keras.saving.get_registered_object(kind) else kind.rpartition(">")[2]
    if kind == "Lambda":
        raise ValueError(f"the Lambda layer {config['name']!r} is a program, which is not run")
    if kind == "Conv2D" and config["kernel_size"] == config["strides"] == [1, 1]:
        kind = "PointwiseConv2D"
    cls: Any = keras.saving.get_registered_object(kind) or getattr(keras.layers, kind, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ValueError(f"the layer {config['name']!r} is a {kind}, which Keras 3 does not have")
    if not cls.__module__.startswith(("keras.", "kconv.")):
        return cls.from_config({**config, "name": _plain(config["name"])})
    config = {key: _value(key, value) for key, value in config.items()}
    if kind == "LeakyReLU" and "alpha" in config:
        config["negative_slope"] = config.pop("alpha")
    return cls(**_accepted(cls, kind, config))


def _accepted(cls: Any, kind: str, config: Config) -> Config:
    """The arguments that a class has; those that it has not must be of no effect."""
    known = _arguments_of(cls)
    of_no_effect = _OF_NO_EFFECT
    if kind.startswith(("Depthwise", "Separable")):
        of_no_effect = of_no_effect | _OF_CONVOLUTIONS
    if kind == "PointwiseConv2D":  # the kernel is 1x1, and its stride 1
        of_no_effect = of_no_effect | _OF_WINDOWS
        known = known - _OF_WINDOWS
    for key, value in config.items():
        neutral = value in (None, False) or (key, value) == ("groups", 1)
        if key not in known and key not in of_no_effect and not neutral:
            raise ValueError(
                f"the layer {config['name']!r} has {key}={value!r}, which {kind} of Keras 3 has not"
            )
    return {key: value for key, value in config.items() if key in known}


@cache
def _arguments_of(cls: Any) -> frozenset[str]:
    """The names of a class's arguments, and of those that it hands on to its bases."""
    functions = (base.__init__ for base in cls.__mro__[:-1])
    return frozenset(
        name for function in functions for name in inspect.signature(function).parameters
    )


def _value(key: str, value: Any) -> Any:
    """An argument of a layer in the terms of Keras 3."""
    match key, value:
        case "name", _:
            return _plain(value)
        case "dtype", _:
            return _dtype(value)
        case "axis", [axis]:
            return axis
        case "activation" | "recurrent_activation", "hard_sigmoid":
            return keras2_hard_sigmoid
        case "activation" | "recurrent_activation", str():
            return keras.saving.get_registered_object(value) or value
        case "layer" | "backward_layer" | "cell", {"class_name": _}:
            return _layer(value)
        case "cells", [*cells]:
            return [_layer(cell) for cell in cells]
        case _, {"class_name": _, "config": {"dtype": _, **others}} if key != "dtype":
            return {**value, "config": others}  # of an initializer
        case _:
            return value


def _dtype(value: Any) -> str | None:
    return value["config"]["name"] if isinstance(value, dict) else value


def _plain(name: str | None) -> str | None:
    return name and name.replace("/", "_")


# Weights.


def fill(model: keras.Model, root: Any) -> None:
    """Give a model the weights in the group ``model_weights`` of its file.

    Raises:
        ValueError: if a weight of the file finds no place, or one of the model no value.
    """
    layers = {layer.name: layer for layer in model.layers}
    datasets: dict[str, Any] = {}
    root.visititems(lambda path, item: datasets.update({path: item}))  # not of other files
    values: list[tuple[Any, Any]] = []
    for group in _texts(root, "layer_names"):
        names = _texts(root[group], "weight_names")
        missing = [name for name in names if f"{group}/{name}" not in datasets]
        if missing or (names and _plain(group) not in layers):
            raise ValueError(f"its layer {group!r} lacks {', '.join(missing) or 'a place'}")
        if names:
            entries = [(name, datasets[f"{group}/{name}"]) for name in names]
            values += _pairs(group, layers[_plain(group)], entries)
    for variable, value in values:
        if value.external or value.is_virtual:
            raise ValueError(f"its weight for {variable.path!r} lies in another file")
        if tuple(variable.shape) != value.shape:
            raise ValueError(
                f"its weight for {variable.path!r} has shape {value.shape}, expected "
                f"{tuple(variable.shape)}"
            )
    given = {id(variable) for variable, _ in values}
    without = [variable.path for variable in model.weights if id(variable) not in given]
    if without:
        raise ValueError(f"it has no weights for {', '.join(without)}")
    for variable, value in values:
        variable.assign(value[()])
    for layer in _leaves(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def _pairs(group: str, layer: Any, entries: list[tuple[str, Any]]) -> list[tuple[Any, Any]]:
    """The variables of a layer, or of a model in its place, with a file's values."""
    leaves = {leaf.name: leaf for leaf in _leaves(layer)}
    buckets: dict[str, list[tuple[str, Any]]] = {}
    for name, value in entries:
        owner = name.rpartition("/")[0]
        while owner and _plain(owner) not in leaves:  # "lstm/lstm_cell" is a part of "lstm"
            owner = owner.rpartition("/")[0]
        buckets.setdefault(_plain(owner) or "", []).append((_last(name), value))
    rest = leaves.keys() - buckets.keys()
    if "" in buckets:  # these name no layer, as those of Normalization
        if len(rest) != 1:
            raise ValueError(f"its weights of {group!r} do not name their layers")
        buckets[rest.pop()] = buckets.pop("")
    pairs = []
    for owner, found in buckets.items():
        pairs += _in_leaf(leaves[owner], found)
    return pairs


def _in_leaf(leaf: Any, entries: list[tuple[str, Any]]) -> list[tuple[Any, Any]]:
    """The variables of one layer: by name, or where names repeat, by their order, too."""
    variables = list(leaf.weights)
    names = [_last(variable.name) for variable in variables]
    if "depthwise_kernel" not in names:
        entries = [(name.replace("depthwise_kernel", "kernel"), value) for name, value in entries]
    found = [name for name, _ in entries]
    if sorted(names) != sorted(found):
        raise ValueError(
            f"its layer {leaf.name!r} has the weights {', '.join(found)}, expected "
            f"{', '.join(names)}"
        )
    if len(set(names)) == len(names):
        values = dict(entries)
        return [(variable, values[name]) for name, variable in zip(names, variables, strict=True)]
    if names != found:
        raise ValueError(f"its layer {leaf.name!r} has its weights in an order that is not known")
    return [(variable, value) for variable, (_, value) in zip(variables, entries, strict=True)]


def _leaves(layer: Any) -> Iterator[Any]:
    """The layers with weights in a model, or in a layer that wraps a model."""
    inner = getattr(layer, "layer", None)
    if isinstance(layer, keras.Model):
        for part in layer.layers:
            yield from _leaves(part)
    elif isinstance(inner, keras.Model):
        yield from _leaves(inner)
    elif layer.weights:
        yield layer


def _last(name: str) -> str:
    """What "conv2d/kernel:0" ends in, "kernel"; TensorFlow 1 made it "kernel_1:0" at times."""
    return re.sub(r"_\d+$", "", name.rpartition("/")[2].partition(":")[0])


def _texts(group: Any, name: str) -> list[str]:
    """A list of names among a group's attributes; Keras cuts a long one into ``name0``, ..."""
    parts = [group.attrs[name]] if name in group.attrs else []
    while f"{name}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{name}{len(parts)}"])
    return [
        text.decode() if isinstance(text, bytes) else str(text) for part in parts for text in part
    ]
