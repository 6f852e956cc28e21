"""Models of any framework: their weights by name, and setting them all or not at all."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kconv.weights._activations import activation_kinds
from kconv.weights._entries import Array, cast
from kconv.weights._keras_file import (
    Config,
    KerasFile,
    Name,
    Weight,
    by_name,
    config_layers,
    read_hdf5,
    squeeze,
    variable_names,
)
from kconv.weights._layouts import (
    Layout,
    Shape,
    class_of_name,
    keras_class,
    layout,
    snake_case,
    torch_class,
)
from kconv.weights._matching import MismatchError, Pairs, automatic_stem, listed, match, match_names
from kconv.weights._torch_file import Unreadable

__all__ = ["METADATA", "Source", "Target", "adapt", "in_torch_terms", "is_state", "read_weight"]


@dataclass(frozen=True)
class Source:
    """A weight on its way into a model.

    Attributes:
        shape: None for a state that is no array.
        read: gives the array, or the state.
    """

    shape: Shape | None
    read: Callable[[], Any]


class Target(Protocol):
    """A model to be filled, or written."""

    exact_activations: bool  # whether all are layers, none a function that a module calls
    nbytes: int  # of all weights

    def arrays(self) -> tuple[dict[str, Array], dict[str, str]]:
        """All weights by PyTorch's names and in its layouts, and what else a file shall say."""
        ...

    def fill(self, sources: Mapping[str, Source]) -> Pairs:
        """Set all weights from PyTorch's names and layouts."""
        ...

    def fit(self, sources: Mapping[str, Source]) -> Pairs:
        """The pairs that :meth:`fill` would make, without reading anything."""
        ...

    def fill_keras(self, file: KerasFile) -> int:
        """Set all weights from a file of Keras's; return how many."""
        ...

    def activations(self) -> dict[str, str]:
        """The kinds of activations by their layers' names."""
        ...


def adapt(model: Any) -> Target:
    """The target for a model; a framework that nobody has imported cannot have made it."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras and isinstance(model, keras.Model):  # on Keras's PyTorch backend it is a Module too
        return _KerasTarget(model)
    if torch and isinstance(model, torch.nn.Module):
        return _TorchTarget(model)
    flax = sys.modules.get("kconv.jax._nnx_networks")
    if flax and isinstance(model, flax.Network):
        from kconv.weights._flax import FlaxTarget

        return FlaxTarget(model)
    raise TypeError(
        f"model is a {type(model).__name__}, expected a torch.nn.Module, a keras.Model or a "
        "Network of kconv.jax.nnx"
    )


def read_weight(name: str, source: Source, dtype: str) -> Array:
    """A weight's values in a model's type, or an error that names it."""
    try:
        array = source.read()
        if not isinstance(array, np.ndarray) or array.shape != source.shape:
            raise ValueError("it is no array of the shape that its header says")
        return cast(array, dtype)
    except Exception as error:  # whatever a library says of a damaged file
        raise ValueError(
            f"{name!r} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


# PyTorch.

_EXTRA_STATE = "_extra_state"
METADATA = "kconv.extra_state"  # states that JSON can hold, in a safetensors file's metadata


def is_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


class _TorchTarget:
    exact_activations = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state: dict[str, Any] = dict(model.state_dict())
        tensors = [v for v in self._state.values() if hasattr(v, "element_size")]
        self.nbytes = sum(0 if _is_lazy(v) else v.numel() * v.element_size() for v in tensors)

    def _shapes(self) -> dict[str, Shape | None]:
        return {
            name: None if is_state(name) or _is_lazy(value) else tuple(value.shape)
            for name, value in self._state.items()
        }

    def _ties(self) -> list[frozenset[str]]:
        """Names of the same tensor."""
        names: dict[Any, list[str]] = {}
        for name, value in self._model.state_dict(keep_vars=True).items():
            names.setdefault(id(value), []).append(name)
        return [frozenset(tied) for tied in names.values() if len(tied) > 1]

    def arrays(self) -> tuple[dict[str, Array], dict[str, str]]:
        arrays, states = {}, {}
        for name, value in self._state.items():
            own = ".".join(part for part in name.split(".") if part != "_orig_mod")
            if own in arrays or own in states:
                raise ValueError(f"the model has two weights {own!r}")
            if is_state(name) and not hasattr(value, "detach"):
                if not _survives_json(value):
                    raise ValueError(
                        f"{name!r} is a {type(value).__name__}, which a safetensors file cannot "
                        "hold; torch.save(model.state_dict(), path) can"
                    )
                states[own] = value
            else:
                arrays[own] = _torch_array(name, value)
        return arrays, {METADATA: json.dumps(states)} if states else {}

    def fit(self, sources: Mapping[str, Source]) -> Pairs:
        shapes = {name: source.shape for name, source in sources.items()}
        return match(shapes, self._shapes(), self._ties())

    def fill(self, sources: Mapping[str, Source]) -> Pairs:
        import torch

        pairs = self.fit(sources)
        state = dict(self._state)
        for name, own in pairs.names.items():
            if is_state(name):
                state[name] = _torch_state(own, sources[own].read())
            else:
                dtype = str(self._state[name].dtype).removeprefix("torch.")
                state[name] = torch.from_numpy(_writable(read_weight(own, sources[own], dtype)))
        for tie in self._ties():
            values = [state[name] for name in sorted(tie) if name in pairs.names]
            if any(not torch.equal(value, values[0]) for value in values[1:]):
                raise ValueError(f"it has different values for one weight: {sorted(tie)}")
        before = {name: _copy(value) for name, value in self._state.items()}
        try:
            self._model.load_state_dict(state)
        except BaseException:
            self._model.load_state_dict(before)
            raise
        return pairs

    def fill_keras(self, file: KerasFile) -> int:
        modules = {_plain_name(name): module for name, module in self._model.named_modules()}
        names = {".".join(_plain_name(name).split(".")) for name in self._state}

        def kind(layers: Name, shape: Shape) -> str | None:
            module = modules.get(".".join(layers))
            return None if module is None else torch_class(module, shape)

        return len(self.fill(in_torch_terms(file, kind, names)).names)

    def activations(self) -> dict[str, str]:
        return {
            _plain_name(name): kind
            for name, module in self._model.named_modules()
            if (kind := activation_kinds.get(type(module).__name__)) is not None
        }


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.replace("/", "_").split(".") if part != "_orig_mod")


def _writable(array: Array) -> Array:
    array = np.require(array, requirements=["C"]).reshape(array.shape)
    return array if array.flags.writeable else array.copy()


def _copy(value: Any) -> Any:
    from torch import is_tensor

    if is_tensor(value):
        return value if _is_lazy(value) else value.detach().clone()
    return copy.deepcopy(value)


def _is_lazy(tensor: Any) -> bool:
    """Whether a tensor has no shape before its module's first call."""
    from torch.nn.parameter import is_lazy

    return bool(is_lazy(tensor))


def _torch_array(name: str, tensor: Any) -> Array:
    """A PyTorch tensor as an array; float32 for types that NumPy lacks."""
    import torch

    if tensor.is_complex():
        raise ValueError(f"{name!r} is complex, which weights' files are not")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{name!r} is a sparse, quantized or empty tensor, which cannot be saved")
    if tensor.is_floating_point() and tensor.dtype not in (
        torch.float16,
        torch.float32,
        torch.float64,
    ):
        tensor = tensor.float()
    return tensor.detach().resolve_neg().cpu().numpy()


def _torch_state(name: str, value: Any) -> Any:
    """A state of :meth:`torch.nn.Module.get_extra_state`, with tensors in the place of arrays."""
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(_writable(value))
    if isinstance(value, Unreadable):
        raise ValueError(
            f"{name!r} holds an object of {value.described}, which only running code could make"
        )
    if isinstance(value, dict):
        return {key: _torch_state(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_torch_state(name, item) for item in value)
    return value


def _survives_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


# From Keras's files to PyTorch's names.


def in_torch_terms(
    file: KerasFile, kind_of: Callable[[Name, Shape], str | None], names: set[str]
) -> dict[str, Source]:
    """A Keras file's weights by PyTorch's names and in its layouts.

    Args:
        file: the file.
        kind_of: Keras's class for the model's layer at a path, for a kernel of a shape, if known.
        names: the model's names, which tell which weights of a layer are absent.
    """
    layers: dict[Name, list[tuple[str, Weight]]] = {}
    for name, weight in by_name(file.weights).items():
        layers.setdefault(name[:-1], []).append((name[-1], weight))
    sources: dict[str, Source] = {}
    for path, weights in layers.items():
        kernel = weights[0][1].entry.shape
        hint = kind_of(path, kernel)
        kind = weights[0][1].kind or hint or (class_of_name(path[-1]) if path else None)
        kind = kind or class_of_name(f"/{weights[0][1].place}".split("/")[-2])
        if hint and kind and hint.endswith("Transpose") != kind.endswith("Transpose"):
            raise ValueError(f"its layer {'.'.join(path)!r} is a {kind}, the model's a {hint}")
        if all(variable.isdigit() for variable, _ in weights):
            known = variable_names(kind, len(weights)) or _partial_norm(path, len(weights), names)
            if known:
                weights = [
                    (variable, weight) for variable, (_, weight) in zip(known, weights, strict=True)
                ]
        for variable, weight in weights:
            entry = weight.entry
            how = layout(kind, variable, entry.shape)
            torch_name = ".".join((*path, how.name))
            if torch_name in sources:
                raise ValueError(f"it has two weights {torch_name!r}")
            sources[torch_name] = Source(how.shape(entry.shape), _converted(how, entry.read))
    return sources


def _converted(how: Layout, read: Callable[[], Array]) -> Callable[[], Array]:
    return lambda: how.to_torch(read())


def _partial_norm(path: Name, count: int, names: set[str]) -> list[str] | None:
    """The names of a batch norm's weights, of which the model's says which are absent."""
    owner = ".".join(path)
    known = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean"}
    known["moving_variance"] = "running_var"
    present = [own for own, name in known.items() if f"{owner}.{name}" in names]
    return present if len(present) == count and "moving_mean" in present else None


# Keras.


@dataclass(frozen=True)
class _Variable:
    layers: Name
    name: str
    number: int  # among its layer's own
    kind: str | None
    variable: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.variable.shape)

    @property
    def dtype(self) -> str:
        return str(self.variable.dtype)


class _KerasTarget:
    exact_activations = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self._variables = list(_variables(model, (), set()))
        if not model.built:
            raise ValueError(f"{model.name!r} is not built yet: call it once, or build it")
        self.nbytes = sum(8 * math.prod(variable.shape) for variable in self._variables)
        self._stems = frozenset(snake_case(type(layer).__name__) for layer in _all_layers(model))

    def _by_name(self, numbered: bool = False) -> dict[Name, _Variable]:
        full: dict[Name, _Variable] = {}
        for variable in self._variables:
            last = str(variable.number) if numbered else variable.name
            path = *(layer.replace("/", "_") for layer in variable.layers), last
            if path in full:
                raise ValueError(f"the model has two weights {'.'.join(path)!r}")
            full[path] = variable
        result: dict[Name, _Variable] = {}
        for path, short in squeeze(full).items():
            if short in result:
                raise ValueError(f"the model has two weights {'.'.join(short)!r}")
            result[short] = full[path]
        return result

    def _in_torch_terms(self) -> dict[str, tuple[_Variable, Layout]]:
        result: dict[str, tuple[_Variable, Layout]] = {}
        for path, variable in self._by_name().items():
            how = layout(variable.kind, variable.name, variable.shape)
            name = ".".join((*path[:-1], how.name))
            if name in result:
                raise ValueError(f"the model has two weights {name!r}")
            result[name] = variable, how
        return result

    def arrays(self) -> tuple[dict[str, Array], dict[str, str]]:
        result = {}
        for name, (variable, how) in self._in_torch_terms().items():
            array = _keras_array(variable.variable)
            if array.dtype.kind == "c":
                raise ValueError(f"{name!r} is complex, which weights' files are not")
            result[name] = how.to_torch(array)
        return result, {}

    def fit(self, sources: Mapping[str, Source]) -> Pairs:
        shapes = {name: source.shape for name, source in sources.items()}
        own = self._in_torch_terms()
        wanted = {name: how.shape(variable.shape) for name, (variable, how) in own.items()}
        return match(shapes, wanted, stems=self._stems)

    def fill(self, sources: Mapping[str, Source]) -> Pairs:
        pairs, own = self.fit(sources), self._in_torch_terms()
        values = []
        for name, file_name in pairs.names.items():
            variable, how = own[name]
            array = read_weight(file_name, sources[file_name], variable.dtype)
            values.append((variable.variable, how.to_keras(array, variable.shape)))
        self._assign(values)
        return pairs

    def _assign(self, values: list[tuple[Any, Array]]) -> None:
        before = [(variable, _keras_array(variable)) for variable, _ in values]
        try:
            _set(values)
            self._finalize()
        except BaseException:
            _set(before)
            self._finalize()
            raise

    def _finalize(self) -> None:
        for layer in _all_layers(self._model):
            if hasattr(layer, "finalize_state"):  # Normalization computes with copies
                layer.finalize_state()

    def fill_keras(self, file: KerasFile) -> int:
        if file.numbered and self._load_numbered(file):
            return len(file.weights)
        try:
            pairs = self._pair_by_name(file)
        except MismatchError:
            if file.numbered or (in_order := self._pair_by_order(file)) is None:
                raise
            pairs = in_order
        values = [
            (
                variable.variable,
                read_weight(weight.place, _source(weight), variable.dtype).reshape(variable.shape),
            )
            for variable, weight in pairs
        ]
        self._assign(values)
        return len(values)

    def _pair_by_name(self, file: KerasFile) -> list[tuple[_Variable, Weight]]:
        """The model's variables and the file's weights, by the names of both."""
        named = by_name(file.weights)
        if file.numbered:
            named = {
                (*path[:-1], weight.place.rpartition("/")[2]): weight
                for path, weight in named.items()
            }
        own = self._by_name(file.numbered)
        shapes = {path: weight.entry.shape for path, weight in named.items()}
        wanted = {path: variable.shape for path, variable in own.items()}
        order = match_names(shapes, wanted, self._stems)
        found = {order[path]: weight for path, weight in named.items()}
        only_file = [
            f"{'.'.join(path)} {named[path].entry.shape}"
            for path in named
            if order[path] not in own
        ]
        only_model = [
            f"{'.'.join(path)} {variable.shape}"
            for path, variable in own.items()
            if path not in found
        ]
        differing = [
            f"{'.'.join(path)} {found[path].entry.shape} in the file, {variable.shape} in the model"
            for path, variable in own.items()
            if path in found and not _fits(found[path], variable)
        ]
        lists = {"only in the file: ": only_file, "only in the model: ": only_model, "": differing}
        problems = "; ".join(f"{where}{listed(names)}" for where, names in lists.items() if names)
        if problems or len(found) < len(named):
            raise MismatchError(problems or "two weights have one name", len(only_file))
        for path, variable in own.items():
            _check_variable(found[path], variable)
        return [(variable, found[path]) for path, variable in own.items()]

    def _pair_by_order(self, file: KerasFile) -> list[tuple[_Variable, Weight]] | None:
        """The same for a file of Keras 2 whose inner layers have other names than the model's.

        Layers of the model itself are found by their names, and what is in them by its order.
        """
        theirs: dict[Name, Weight] = {}
        counts: Counter[str] = Counter()
        for weight in file.weights.values():
            layer = (weight.layers or ("",))[0]
            theirs[layer, f"{counts[layer]} {weight.variable}"] = weight
            counts[layer] += 1
        variables = {id(variable.variable): variable for variable in self._variables}
        ours: dict[Name, _Variable] = {}
        for layer in self._model.layers:
            ordered = [*layer.trainable_weights, *layer.non_trainable_weights]
            for number, own in enumerate(ordered):
                variable = variables[id(own)]
                ours[layer.name.replace("/", "_"), f"{number} {variable.name}"] = variable
        order = match_names(
            {name: weight.entry.shape for name, weight in theirs.items()},
            {name: variable.shape for name, variable in ours.items()},
            self._stems,
        )
        pairs = {order[name]: weight for name, weight in theirs.items()}
        if not len(pairs) == len(theirs) == len(ours) == len(self._variables) or any(
            name not in ours or not _fits(weight, ours[name]) for name, weight in pairs.items()
        ):
            return None
        return [(ours[name], weight) for name, weight in pairs.items()]

    def _load_numbered(self, file: KerasFile) -> bool:
        """Let Keras load a file of a model with the same layers, as its own format wants it.

        What Keras gets is a file that this very model has written, with the values exchanged: so it
        is given nothing but what has been checked, and the optimizer's state stays as it is.
        """
        import h5py

        config = _config(self._model)
        with tempfile.TemporaryDirectory() as folder:
            before, after = (Path(folder) / f"{name}.weights.h5" for name in ("before", "after"))
            self._model.save_weights(before)
            with h5py.File(before, "r") as root:
                own = read_hdf5([(root, before.stat().st_size)], config) if len(root) else None
                places = None if own is None else self._same_places(file, own)
                if own is None or places is None:
                    return False
                values = {
                    places[place]: read_weight(
                        place, _source(weight), own.weights[places[place]].entry.dtype
                    )
                    for place, weight in file.weights.items()
                }
            shutil.copyfile(before, after)
            with h5py.File(after, "r+") as root:
                for place, array in values.items():
                    group, _, key = place.rpartition("/")
                    _write(root[f"{group}/vars/{key}" if group else f"vars/{key}"], array)
            try:
                self._model.load_weights(after)
            except BaseException:
                self._model.load_weights(before)
                raise
        return True

    def _same_places(self, file: KerasFile, own: KerasFile) -> dict[str, str] | None:
        """For each place in a file, that in the model's own file.

        None unless the same weights are in the same places, of layers of the same names. Attributes
        of layers count without the underscores that a version of Keras may have begun them with.
        """
        ours = {place.replace("/_", "/"): place for place in own.weights}
        places = {place: ours.get(place.replace("/_", "/"), "") for place in file.weights}
        if sorted(places.values()) != sorted(own.weights):
            return None
        for place, weight in file.weights.items():
            mine = own.weights[places[place]]
            if weight.entry.shape != mine.entry.shape:
                return None
            if weight.kind and mine.kind and weight.variable != mine.variable:
                return None
            if weight.layers is None or mine.layers is None:
                continue
            if len(weight.layers) != len(mine.layers):
                return None
            for name, other in zip(weight.layers, mine.layers, strict=True):
                stem = automatic_stem(name, self._stems)
                if name.replace("/", "_") != other and (
                    stem is None or stem != automatic_stem(other, self._stems)
                ):
                    return None
        return places

    def activations(self) -> dict[str, str]:
        from kconv.weights._activations import activations

        config = _config(self._model)
        return activations(config_layers(config)) if config else {}


def _source(weight: Weight) -> Source:
    return Source(weight.entry.shape, weight.entry.read)


def _fits(weight: Weight, variable: _Variable) -> bool:
    return weight.entry.shape == variable.shape


def _check_variable(weight: Weight, variable: _Variable) -> None:
    if weight.variable.isdigit() or weight.variable == variable.name:
        return
    stem = automatic_stem(variable.name, frozenset())
    if stem is None or stem != automatic_stem(weight.variable, frozenset()):
        raise MismatchError(
            f"{weight.place!r} is a {weight.variable}, which is a {variable.name} in the model", 1
        )


def _config(model: Any) -> Config | None:
    """The configuration as a ``.keras`` file has it; None for a subclassed model."""
    try:
        config = model.get_config()
    except Exception:  # whatever a user's class raises
        return None
    return {"config": config} if isinstance(config, dict) else None


def _children(layer: Any) -> list[Any]:
    if hasattr(layer, "layers"):
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _all_layers(layer: Any, seen: set[int] | None = None) -> Iterator[Any]:
    seen = set() if seen is None else seen
    if id(layer) not in seen:
        seen.add(id(layer))
        yield layer
        for child in _children(layer):
            yield from _all_layers(child, seen)


def _variables(layer: Any, path: Name, seen: set[int]) -> Iterator[_Variable]:
    """The weights of a layer and of all in it, each once."""
    children = _children(layer)
    inner = {id(variable) for child in children for variable in child.weights}
    own = [variable for variable in layer.weights if id(variable) not in inner]
    for number, variable in enumerate(own):
        if id(variable) not in seen:
            seen.add(id(variable))
            yield _Variable(path, variable.name, number, keras_class(layer), variable)
    for child in children:
        yield from _variables(child, (*path, child.name), seen)


def _keras_array(variable: Any) -> Array:
    """A variable as an array; float32 for types that NumPy lacks."""
    from keras.ops import convert_to_numpy

    array = np.asarray(convert_to_numpy(variable))
    known = array.dtype.kind in "iubc" or array.dtype in (np.float16, np.float32, np.float64)
    return array if known else array.astype(np.float32)


def _set(values: list[tuple[Any, Array]]) -> None:
    for variable, array in values:
        variable.assign(array)


def _write(dataset: Any, array: Array) -> None:
    """Fill a dataset that Keras has made; one of bfloat16 holds two bytes for each value."""
    if dataset.dtype.kind == "V":
        import ml_dtypes  # Keras needs it

        array = array.astype(ml_dtypes.bfloat16).view(dataset.dtype)
    dataset[...] = array
