"""Weights of models, from the original's checkpoints and from the frameworks' own files.

:func:`load_weights` fills a PyTorch or Keras model from any of these files, whichever framework
wrote it; what a file is shows from its contents, not from its name:

* the original's checkpoints: Keras 2 HDF5, whole models or weights alone;
* Keras 3's ``.keras`` and ``.weights.h5``;
* a PyTorch ``state_dict`` (nothing but tensors is unpickled);
* safetensors, which :func:`save_weights` writes.

Inside, all weights have PyTorch's names and layouts ("stem_conv.weight", a kernel as (O, I/groups,
k, k)), and "_" in the place of "/", which Keras 3 refuses. Every weight of the file must find its
place, and every weight of the model its value; layers that the original leaves to Keras's automatic
names ("conv2d_17") are matched by their order among those of the same weights and shapes.

Example:
    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> model, other = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(model, Path(folder) / "model.safetensors")
    ...     load_weights(other, Path(folder) / "model.safetensors")
    >>> bool((model[0].weight == other[0].weight).all())
    True
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kconv._files import replacing

__all__ = ["load_weights", "save_weights"]

Array = NDArray[Any]
StrPath = str | os.PathLike[str]

_TORCH_NAMES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")

# Keras's automatic names, of layers with weights and of activations.
_AUTO_WEIGHTED = r"(?:pointwise_|depthwise_)?conv2d|batch_normalization|dense"
_AUTO_LAYER = re.compile(rf"(?:{_AUTO_WEIGHTED})(?:_(\d+))?")
_AUTO_ACTIVATION = re.compile(
    rf"(?:activation|re_lu|(?:{_AUTO_WEIGHTED})(?:_\d+)?_activation)(?:_\d+)?"
)

_ACTIVATIONS = {
    "silu": "swish",
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "hard_silu": "hard_swish",
}


def load_weights(model: Any, path: StrPath) -> None:
    """Fill a model with the weights of a file; on any error the model stays as it is.

    Example:
        >>> load_weights(model, "kMobileNet.hdf5")  # doctest: +SKIP

    Args:
        model: a ``torch.nn.Module`` or a ``keras.Model`` (of any backend).
        path: the file; see :mod:`kconv.weights` for the formats.

    Raises:
        ValueError: if the file is damaged or none of these, if names or shapes do not agree, or
            if the file says which activations its model has and those are others.
        OSError: if the file cannot be read.
        TypeError: if the model is of no known framework.
        ImportError: if a library that reads the format is not installed.
    """
    target, path = _adapt(model), Path(path)
    checkpoint = _read(path)
    weights = _match(path, checkpoint.weights, target.shapes())
    activations = target.activations()  # none if a PyTorch module calls functions instead
    if activations and checkpoint.activations is not None:
        _check_activations(path, checkpoint.activations, activations)
    target.assign(weights)


def save_weights(model: Any, path: StrPath) -> None:
    """Write a model's weights as safetensors, in PyTorch's names and layouts.

    The file appears whole or not at all. bfloat16 weights are written as float32.

    Example:
        >>> save_weights(model, "model.safetensors")  # doctest: +SKIP

    Args:
        model: a ``torch.nn.Module`` or a ``keras.Model`` (of any backend).
        path: the file to write, whose name ends in ``.safetensors``.

    Raises:
        ValueError: if the name ends otherwise.
        OSError: if the file cannot be written; one that was there before is still there.
        TypeError: if the model is of no known framework.
    """
    from safetensors.numpy import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} does not end in .safetensors, the format that is written")
    arrays = {name: np.ascontiguousarray(array) for name, array in _adapt(model).arrays().items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={"format": "pt"}))


# Models of either framework.


class _Target(Protocol):
    """A model's weights by PyTorch's names, and its activations by layer."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def arrays(self) -> dict[str, Array]: ...

    def assign(self, arrays: Mapping[str, Array]) -> None: ...

    def activations(self) -> dict[str, str]: ...


def _adapt(model: Any) -> _Target:
    """The target for a model; a framework that nobody has imported cannot have made it."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras and isinstance(model, keras.Model):  # on Keras's PyTorch backend it is a Module too
        return _KerasTarget(model)
    if torch and isinstance(model, torch.nn.Module):
        return _TorchTarget(model)
    raise TypeError(f"model is a {type(model).__name__}, neither torch.nn.Module nor keras.Model")


class _TorchTarget:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._tensors = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {_plain(name): tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def arrays(self) -> dict[str, Array]:
        return {name: _numpy(tensor) for name, tensor in self._tensors.items()}

    def assign(self, arrays: Mapping[str, Array]) -> None:
        import torch

        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(torch.from_numpy(arrays[_plain(name)]))

    def activations(self) -> dict[str, str]:
        kinds = {
            "ReLU": "relu",
            "ReLU6": "relu6",
            "SiLU": "swish",
            "Sigmoid": "sigmoid",
            "Hardsigmoid": "hard_sigmoid",
            "Hardswish": "hard_swish",
        }
        return {
            _plain(name): kinds[type(module).__name__]
            for name, module in self._model.named_modules()
            if type(module).__name__ in kinds
        }


class _KerasTarget:
    def __init__(self, model: Any) -> None:
        self._layers = list(_keras_layers(model))

    def _variables(self) -> Iterator[tuple[str, Any, bool]]:
        """Each weight's name, its variable, and whether it is a depthwise kernel."""
        from keras.layers import DepthwiseConv2D

        for layer in self._layers:
            for variable in layer.weights:
                name = f"{layer.name}.{_TORCH_NAMES.get(variable.name, variable.name)}"
                depthwise = isinstance(layer, DepthwiseConv2D) and len(variable.shape) == 4
                yield name, variable, depthwise

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays().items()}

    def arrays(self) -> dict[str, Array]:
        from keras.ops import convert_to_numpy

        return {
            name: _from_keras(_float(convert_to_numpy(variable)), depthwise)
            for name, variable, depthwise in self._variables()
        }

    def assign(self, arrays: Mapping[str, Array]) -> None:
        for name, variable, _ in self._variables():
            variable.assign(_to_keras(arrays[name], tuple(variable.shape)))

    def activations(self) -> dict[str, str]:
        configs = ((type(layer).__name__, layer.get_config()) for layer in self._layers)
        return _activations(configs)


def _keras_layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _keras_layers(layer)
        else:
            yield layer


# Names and layouts.


def _plain(name: str) -> str:
    """A name as Keras allows it, without what torch.compile puts before."""
    return name.replace("/", "_").removeprefix("_orig_mod.")


def _from_keras(array: Array, depthwise: bool) -> Array:
    """(h, w, I, O) to (O, I, h, w); depthwise (h, w, C, m) to (C m, 1, h, w); (I, O) to (O, I)."""
    if depthwise:
        array = array.reshape(*array.shape[:2], 1, -1)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _to_keras(array: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of :func:`_from_keras`, for a variable of this shape."""
    return (array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T).reshape(shape)


def _numpy(tensor: Any) -> Array:
    """A PyTorch tensor as an array, of which NumPy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor if tensor.element_size() > 2 else tensor.float()).numpy()


def _float(array: Array) -> Array:
    known = (np.float16, np.float32, np.float64)
    return array if array.dtype in known else array.astype(np.float32)


# Files.


@dataclass
class _Checkpoint:
    """What a file holds: weights by PyTorch's names, and activations where it names them."""

    weights: dict[str, Array] = field(default_factory=dict)
    activations: dict[str, str] | None = None

    def add(self, name: str, array: Array) -> None:
        name = _plain(name)
        if name in self.weights:
            raise ValueError(f"it has two weights {name!r}")
        self.weights[name] = array

    def add_keras(self, layer: str, weight: str, array: Array, depthwise: bool) -> None:
        """A weight in Keras's name and layout."""
        array = _from_keras(array, depthwise and array.ndim == 4)
        self.add(f"{layer}.{_TORCH_NAMES.get(weight, weight)}", array)


def _read(path: Path) -> _Checkpoint:
    """Read a file by what its first bytes say it is."""
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head.startswith(b"\x89HDF\r\n\x1a\n"):
            return _read_hdf5(path)
        if head.startswith(b"PK"):
            return _read_keras(path) if "config.json" in _members(path) else _read_torch(path)
        if head.startswith(b"\x80"):
            return _read_torch(path)
        if head[8:] == b"{":
            return _read_safetensors(path)
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or holds no model's weights: {error}") from error
    raise ValueError(
        f"{path} is neither HDF5, .keras, a PyTorch state_dict nor safetensors: "
        f"it begins with {head!r}"
    )


def _members(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _read_safetensors(path: Path) -> _Checkpoint:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    checkpoint = _Checkpoint()
    try:
        arrays = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(error) from None
    for name, array in arrays.items():
        if not name.endswith("num_batches_tracked"):
            checkpoint.add(name, array)
    return checkpoint


def _read_torch(path: Path) -> _Checkpoint:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"it holds a {type(state).__name__}, not a state_dict of tensors")
    checkpoint = _Checkpoint()
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            checkpoint.add(name, _numpy(tensor))
    return checkpoint


def _read_keras(path: Path) -> _Checkpoint:
    """A ``.keras`` archive: the configuration and a ``.weights.h5``."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
        weights = BytesIO(archive.read("model.weights.h5"))
    return _read_hdf5(weights, config)


def _read_hdf5(file: Path | BytesIO, config: Any = None) -> _Checkpoint:
    """Any of Keras's HDF5 files."""
    import h5py

    with h5py.File(file, "r") as root:
        if "model_config" in root.attrs:
            config = json.loads(root.attrs["model_config"])
        layers = list(_config_layers(config)) if config else []
        checkpoint = _Checkpoint(activations=_activations(layers) if layers else None)
        legacy = root.get("model_weights", root)
        if "layer_names" in legacy.attrs or "layer_names0" in legacy.attrs:
            _read_by_name(checkpoint, legacy, layers)
        else:
            _read_by_path(checkpoint, root, layers)
    return checkpoint


def _read_by_name(
    checkpoint: _Checkpoint, root: Any, layers: list[tuple[str, dict[str, Any]]]
) -> None:
    """Keras 2: every layer is a group, which lists the names of its weights."""
    depthwise = {config["name"] for kind, config in layers if kind == "DepthwiseConv2D"}
    for layer in _texts(root, "layer_names"):
        for weight in _texts(root[layer], "weight_names"):
            name = weight.rpartition("/")[2].partition(":")[0]
            is_depthwise = name == "depthwise_kernel" or layer in depthwise
            checkpoint.add_keras(layer, name, root[layer][weight][()], is_depthwise)


def _texts(group: Any, name: str) -> list[str]:
    """A list of names among a group's attributes; Keras cuts a long one into ``name0``, ..."""
    parts = [group.attrs[name]] if name in group.attrs else []
    while f"{name}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{name}{len(parts)}"])
    return [
        text.decode() if isinstance(text, bytes) else str(text) for part in parts for text in part
    ]


def _read_by_path(
    checkpoint: _Checkpoint, root: Any, layers: list[tuple[str, dict[str, Any]]]
) -> None:
    """Keras 3: groups called after the layers' classes; weights are numbered.

    The layer's name is an attribute of its group, or else the model's configuration tells.
    """
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for kind, config in layers:
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", kind))
        snake = snake.lower()
        names[f"{snake}_{counts[snake]}" if counts[snake] else snake] = config["name"]
        counts[snake] += 1

    def visit(path: str, group: Any) -> None:
        owner, _, last = path.rpartition("/")
        if last != "vars" or not len(group) or path.startswith("optimizer"):
            return
        kind = owner.rpartition("/")[2]
        if kind == "seed_generator":  # of a dropout
            return
        name = group.attrs.get("name", names.get(kind))
        if name is None:
            raise ValueError(f"its weights of {owner!r} have no layer's name")
        arrays = [group[str(number)][()] for number in range(len(group))]
        if arrays[0].ndim > 1:
            weights: tuple[str, ...] = ("kernel", "bias")
        else:
            weights = _BATCH_NORM[-len(arrays) :]  # gamma may be absent
        if len(arrays) > len(weights):
            raise ValueError(f"its layer {name!r} has {len(arrays)} weights of unknown names")
        for weight, array in zip(weights, arrays, strict=False):
            checkpoint.add_keras(name, weight, array, kind.startswith("depthwise_conv2d"))

    root.visititems(visit)
    if not checkpoint.weights:
        raise ValueError("it has no layers with weights")


def _config_layers(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Class and configuration of every layer in a model's configuration."""
    for layer in config["config"]["layers"]:
        if "layers" in layer["config"]:
            yield from _config_layers(layer)
        else:
            yield layer["class_name"].rpartition(">")[2], layer["config"]


# Agreement of a file and a model.


def _activations(layers: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Activations by layer, but for the softmax, which PyTorch models leave to the loss.

    One inside another layer counts as a layer of its own, ``<name>_activation``.
    """
    activations = {}
    for kind, config in layers:
        name = _plain(config["name"])
        activation = config.get("activation")
        if kind == "ReLU":
            activation = "relu" if config["max_value"] is None else f"relu{config['max_value']:g}"
        elif kind != "Activation":
            name = f"{name}_activation"
        if isinstance(activation, dict):  # a function that is not Keras's own
            inner = activation["config"]
            activation = inner if isinstance(inner, str) else activation["class_name"]
        if activation is not None:
            activation = activation.rpartition(">")[2].lower()
            activations[name] = _ACTIVATIONS.get(activation, activation)
    return {n: kind for n, kind in activations.items() if kind not in ("linear", "softmax")}


def _check_activations(path: Path, file: dict[str, str], model: dict[str, str]) -> None:
    """Raise unless file and model have the same activations, the automatic names aside."""

    def split(activations: dict[str, str]) -> tuple[dict[str, str], Counter[str]]:
        auto = {name for name in activations if _AUTO_ACTIVATION.fullmatch(name)}
        named = {name: kind for name, kind in activations.items() if name not in auto}
        return named, Counter(activations[name] for name in auto)

    (named, unnamed), (model_named, model_unnamed) = split(file), split(model)
    differing = [
        f"{name} ({named.get(name, 'absent')} in the file, "
        f"{model_named.get(name, 'absent')} in the model)"
        for name in sorted({*named, *model_named})
        if named.get(name) != model_named.get(name)
    ]
    if unnamed != model_unnamed:
        differing.append(f"unnamed ones ({dict(unnamed)} in the file, {dict(model_unnamed)} here)")
    if differing:
        raise ValueError(f"{path} is of a model with other activations: {_listed(differing)}")


def _match(
    path: Path, source: Mapping[str, Array], target: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The file's weights by the model's names."""
    shapes = {name: array.shape for name, array in source.items()}
    layers = _unnamed_layers(shapes, target)

    def in_model(name: str) -> str:
        layer, _, weight = name.rpartition(".")
        return f"{layers.get(layer, layer)}.{weight}"

    found = {in_model(name): name for name in source}
    only_file = [
        f"{own} {shapes[own]}" for name, own in sorted(found.items()) if name not in target
    ]
    only_model = [f"{name} {shape}" for name, shape in target.items() if name not in found]
    differing = [
        f"{name} {shapes[found[name]]} in the file, {shape} in the model"
        for name, shape in target.items()
        if name in found and shapes[found[name]] != shape
    ]
    lists = {"only in the file": only_file, "only in the model": only_model, "": differing}
    if any(lists.values()):
        problems = "; ".join(
            f"{where}: {_listed(names)}".removeprefix(": ")
            for where, names in lists.items()
            if names
        )
        raise ValueError(f"the weights of {path} are not the model's: {problems}")
    return {name: source[own] for name, own in found.items()}


def _unnamed_layers(
    source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The model's automatic name for each of the file's, whose numbers started elsewhere.

    The first layer with certain weights and shapes in the file is the first such in the model, ...
    """

    def by_signature(shapes: Mapping[str, tuple[int, ...]]) -> dict[Any, list[str]]:
        layers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name, shape in shapes.items():
            layer, _, weight = name.rpartition(".")
            if _AUTO_LAYER.fullmatch(layer):
                layers.setdefault(layer, []).append((weight, shape))
        groups: dict[Any, list[str]] = {}
        for layer in sorted(layers, key=_number):
            groups.setdefault(frozenset(layers[layer]), []).append(layer)
        return groups

    in_target = by_signature(target)
    return {
        layer: other
        for signature, group in by_signature(source).items()
        for layer, other in zip(group, in_target.get(signature, []), strict=False)
    }


def _number(layer: str) -> int:
    match = _AUTO_LAYER.fullmatch(layer)
    return int(match[1] or 0) if match else 0


def _listed(items: list[str], most: int = 20) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
