"""Keras's files: HDF5 of Keras 2 and 3, alone, in a ``.keras`` archive, or in shards.

Weights are named by the path of their layers' names, and by their own name or, where the file has
only numbers, by that. They keep Keras's layouts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kconv.weights._entries import Array, Entry, decode
from kconv.weights._layouts import snake_case

__all__ = [
    "Config",
    "KerasFile",
    "Name",
    "Weight",
    "by_name",
    "config_layers",
    "read_hdf5",
    "squeeze",
    "variable_names",
]

Name = tuple[str, ...]
Config = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """One weight of a file.

    Attributes:
        place: where it is in the file.
        layers: the names of the layers that it is in, outermost first; None if the file lacks them.
        variable: its own name, or its number among its layer's.
        kind: the class of its layer, where the file says.
        entry: its header, and its values.
    """

    place: str
    layers: Name | None
    variable: str
    kind: str | None
    entry: Entry


@dataclass(frozen=True)
class KerasFile:
    """A file's weights by their places.

    Attributes:
        weights: all but those of optimizers, metrics and random generators.
        numbered: whether it is of Keras 3's own format, in which layers' weights are numbered, and
            places depend on the layers' classes and order alone.
        config: the model's configuration, where the file has it.
    """

    weights: dict[str, Weight]
    numbered: bool
    config: Config | None


# Configurations.


def config_layers(config: Config) -> Iterator[tuple[str, Config]]:
    """Class and configuration of every layer, those in models and wrappers included."""
    for layer in config.get("config", {}).get("layers", ()):
        inner = layer["config"]
        if "layers" in inner:
            yield from config_layers(layer)
        else:
            yield layer["class_name"].rpartition(">")[2], inner


def _config_places(layer: Config, place: str = "") -> Iterator[tuple[str, str, Config]]:
    """The place in a numbered file, class and configuration of every layer in a model."""
    counts: Counter[str] = Counter()
    for inner in layer.get("config", {}).get("layers", ()):
        kind = inner["class_name"].rpartition(">")[2]
        snake = snake_case(kind)
        own = f"{place}layers/{snake}" + (f"_{counts[snake]}" if counts[snake] else "")
        counts[snake] += 1
        yield own, kind, inner["config"]
        yield from _config_places(inner, f"{own}/")
        if isinstance(wrapped := inner["config"].get("layer"), dict) and "config" in wrapped:
            kind = wrapped["class_name"].rpartition(">")[2]
            yield f"{own}/layer", kind, wrapped["config"]
            yield from _config_places(wrapped, f"{own}/layer/")


def variable_names(kind: str | None, count: int, config: Config | None = None) -> list[str] | None:
    """The names of a Keras layer's weights in their order, or None where nobody knows.

    Args:
        kind: the layer's class.
        count: how many weights it has.
        config: its configuration; without it, absent ones among equals are not guessed.
    """
    base = kind or ""
    names: tuple[str, ...]
    if re.search("BatchNorm|LayerNorm|GroupNorm", base):
        names = ("gamma", "beta", "moving_mean", "moving_variance")[: 4 if "Batch" in base else 2]
        if count < len(names):
            if config is None:
                return None
            absent = {"gamma": "scale", "beta": "center"}
            names = tuple(n for n in names if n not in absent or config.get(absent[n], True))
    elif re.fullmatch(r"SeparableConv(olution)?[12]D", base):
        names = ("depthwise_kernel", "pointwise_kernel", "bias")[: max(count, 2)]
    elif re.search(r"Conv(olution)?[123]D(Transpose)?$|^Dense$|^EinsumDense$", base):
        names = ("kernel", "bias")[: max(count, 1)]
    elif base in ("LSTMCell", "GRUCell", "SimpleRNNCell"):
        names = ("kernel", "recurrent_kernel", "bias")[: max(count, 2)]
    else:
        single = {"PReLU": "alpha", "Embedding": "embeddings", "RMSNormalization": "scale"}
        names = (single[base],) if base in single else ()
        if base == "Normalization":
            names = ("mean", "variance", "count")
    return list(names) if len(names) == count else None


# HDF5.

_BUILT_IN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # HDF5's own and h5py's LZF: no plugins
_LARGEST_CHUNK = 1 << 26


def _check_links(group: Any, seen: set[int], place: str = "") -> None:
    """Raise unless everything is in the file itself: no links and no data elsewhere."""
    import h5py

    seen.add(h5py.h5o.get_info(group.id).addr)
    for name in group:
        own = f"{place}/{name}" if place else name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{own!r} is a link, perhaps to another file")
        item = group[name]
        if isinstance(item, h5py.Group):
            if h5py.h5o.get_info(item.id).addr not in seen:
                _check_links(item, seen, own)
        elif isinstance(item, h5py.Dataset):
            settings = item.id.get_create_plist()
            if item.is_virtual or settings.get_external_count():
                raise ValueError(f"the values of {own!r} are in another file")
            filters = {settings.get_filter(i)[0] for i in range(settings.get_nfilters())}
            if not filters <= _BUILT_IN_FILTERS:
                raise ValueError(f"{own!r} needs filters {sorted(filters)}, not all HDF5's own")


def _entry(dataset: Any, place: str) -> Entry:
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None:
        raise ValueError(f"{place!r} has no shape")
    item = math.prod(dataset.chunks or ()) * dtype.itemsize
    if item > max(math.prod(shape) * dtype.itemsize, _LARGEST_CHUNK):
        raise ValueError(f"{place!r} of shape {shape} has chunks of shape {dataset.chunks}")
    if dtype.kind == "V" and dtype.fields is None and dtype.itemsize == 2:
        name = "bfloat16"  # as Keras writes it, with or without an attribute that says so
    elif dtype.kind in "fiubc" and dtype.subdtype is None:
        name = dtype.name
    else:
        raise ValueError(f"{place!r} holds {dtype}, no numbers")

    def read() -> Array:
        array = np.asarray(dataset[()])
        if name == "bfloat16":
            return decode(array.tobytes(), shape, name)
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    return Entry(shape, name, read)


def _attribute(item: Any, name: str, limit: int) -> Any:
    """An attribute's value, or None; none that claims to be larger than the file is read."""
    import h5py

    if name not in item.attrs:
        return None
    attribute = h5py.h5a.open(item.id, name.encode())
    if math.prod(attribute.shape) * attribute.dtype.itemsize > limit:
        raise ValueError(f"its attribute {name!r} would be larger than the file")
    return item.attrs[name]


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _texts(group: Any, name: str, limit: int) -> list[str]:
    """A list of names among a group's attributes; Keras cuts a long one into ``name0``, ..."""
    parts = [] if (whole := _attribute(group, name, limit)) is None else [whole]
    while (part := _attribute(group, f"{name}{len(parts)}", limit)) is not None:
        parts.append(part)
    return [_text(text) for part in parts for text in part]


def read_hdf5(roots: Iterable[tuple[Any, int]], config: Config | None = None) -> KerasFile:
    """The weights of one of Keras's HDF5 files, or of all its shards.

    Args:
        roots: each file, opened by h5py, and its size in bytes.
        config: the model's configuration, from a file beside it.

    Raises:
        Exception: of any kind, if it is damaged.
    """
    weights: dict[str, Weight] = {}
    groups: list[tuple[str, Any, int]] = []
    for root, limit in roots:
        _check_links(root, set())
        if (text := _attribute(root, "model_config", limit)) is not None:
            config = json.loads(_text(text))
        legacy = root.get("model_weights", root)
        if "layer_names" in legacy.attrs or "layer_names0" in legacy.attrs:
            weights.update(_named_weights(legacy, config, limit))
        else:
            groups += [(place, group, limit) for place, group in _numbered_groups(root)]
    if not isinstance(config, dict | None):
        raise ValueError("its configuration is no JSON object")
    numbered = not weights
    if numbered:
        weights = _numbered_weights(groups, config)
    if not weights:
        raise ValueError("it has no layers with weights")
    return KerasFile(weights, numbered, config)


# The weights of layers that have no layers inside.
_SIMPLE = (
    {"kernel", "bias"},
    {"gamma", "beta", "moving_mean", "moving_variance"},
    {"depthwise_kernel", "pointwise_kernel", "bias"},
    {"embeddings"},
    {"alpha"},
    {"mean", "variance", "count"},
)


def _nested(config: Config) -> set[str]:
    """The layers of a model that have layers inside."""
    return {
        layer["config"].get("name", "")
        for layer in config.get("config", {}).get("layers", ())
        if layer["config"].keys() & {"layers", "layer"}
    }


def _named_weights(root: Any, config: Config | None, limit: int) -> dict[str, Weight]:
    """Keras 2, and Keras 3's ``.h5``: every layer is a group, which lists its weights' names."""
    kinds = {inner.get("name"): kind for kind, inner in config_layers(config)} if config else {}
    nested = set() if config is None else _nested(config)
    weights = {}
    layers = _texts(root, "layer_names", limit)
    if "top_level_model_weights" in root:
        layers.append("top_level_model_weights")
    for layer in layers:
        group = root[layer]
        listed = _texts(group, "weight_names", limit)
        variables = [weight.partition(":")[0].rpartition("/")[2] for weight in listed]
        simple = layer not in nested and len({*variables}) == len(variables)
        simple = simple and any({*variables} <= known for known in _SIMPLE)
        for weight in listed:
            place = f"{layer}/{weight}"
            if place in weights:
                raise ValueError(f"it has two weights {place!r}")
            own = layer.replace("/", "_")
            inner, _, variable = weight.replace(layer, own, 1).partition(":")[0].rpartition("/")
            path = [own, *(name for name in inner.split("/") if name)]
            if own in path[1:]:  # a model's name may come before the layer's
                path = path[path.index(own, 1) :]
            if simple:  # what comes between is the names' own
                path = [own]
            if layer == "top_level_model_weights":
                path = path[1:]
            kind = kinds.get(path[-1] if path else "", kinds.get(layer))
            separable = weight.replace("depthwise_kernel", "pointwise_kernel") in listed
            if variable == "depthwise_kernel" and not separable:  # Keras 3 has no name of its own
                variable, kind = "kernel", "DepthwiseConv2D"
            entry = _entry(group[weight], place)
            weights[place] = Weight(place, tuple(path), variable, kind, entry)
    return weights


# What a numbered file holds beside the weights.
_NO_WEIGHTS = re.compile(
    r"(?:_?optimizer|_?(?:compile_)?metrics|_?loss_tracker|_?trackers)(?:/|$)"
    r"|(?:^|/)(?:seed_generator(?:_\d+)?|random_generator)(?:/|$)"
)


def _numbered_groups(root: Any) -> list[tuple[str, Any]]:
    """The groups of weights in a file of Keras 3, with the places of their layers."""
    import h5py

    groups = []

    def visit(path: str, item: Any) -> None:
        owner, _, last = path.rpartition("/")
        if last == "vars" and isinstance(item, h5py.Group):
            groups.append((owner.replace("_layer_checkpoint_dependencies", "layers"), item))

    root.visititems(visit)
    return groups


def _numbered_weights(
    groups: list[tuple[str, Any, int]], config: Config | None
) -> dict[str, Weight]:
    """Keras 3: groups called after the layers' classes or attributes; weights are numbered.

    The layer's name is an attribute of its group, or else the model's configuration tells.
    """
    names: dict[str, str] = {}
    datasets: dict[str, dict[str, Any]] = {}
    for place, group, limit in groups:
        if (name := _attribute(group, "name", limit)) is not None:
            names[place] = _text(name)
        if not _NO_WEIGHTS.search(place):
            own = datasets.setdefault(place, {})  # shards may divide a layer's weights
            if twice := own.keys() & group.keys():
                raise ValueError(f"it has {place}/{min(twice)} twice")
            own.update((key, group[key]) for key in group)
    from_config = {place: (kind, inner) for place, kind, inner in _config_places(config or {})}
    for place, (_, inner) in from_config.items():
        if place not in names and isinstance(inner.get("name"), str):
            names[place] = inner["name"]

    def layer_names(place: str) -> Name | None:
        if place and place not in names:
            return None
        parts = place.split("/")
        prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))] if place else []
        return tuple(names[prefix] for prefix in prefixes if prefix in names)

    weights = {}
    for place, own in datasets.items():
        kind, settings = from_config.get(place, (None, None))
        keys = sorted(own, key=lambda key: (len(key), key))
        known = None
        if keys == [str(number) for number in range(len(keys))]:
            known = variable_names(kind, len(keys), settings)
        for number, key in enumerate(keys):
            full = f"{place}/{key}" if place else key
            entry = _entry(own[key], full)
            variable = known[number] if known else key
            weights[full] = Weight(full, layer_names(place), variable, kind, entry)
    return weights


def squeeze(names: Iterable[Name]) -> dict[Name, Name]:
    """Each path of names without those of layers that only wrap one of the same name.

    kconv's blocks are such: ``unit/unit/conv`` becomes ``unit/conv``.
    """
    groups: dict[str, list[Name]] = {}
    result: dict[Name, Name] = {}
    for name in names:
        if len(name) > 1:
            groups.setdefault(name[0], []).append(name[1:])
        else:
            result[name] = name
    for first, rest in groups.items():
        wraps = all(len(name) > 1 and name[0] == first for name in rest)
        for inner, short in squeeze(rest).items():
            result[(first, *inner)] = short if wraps else (first, *short)
    return result


def by_name(weights: Mapping[str, Weight]) -> dict[Name, Weight]:
    """Weights by their layers' and their own names.

    Raises:
        ValueError: if the file lacks a layer's name, or two weights have the same.
    """
    full: dict[Name, Weight] = {}
    for weight in weights.values():
        if weight.layers is None:
            raise ValueError(f"its weights of {weight.place!r} have no layer's name")
        path = *(layer.replace("/", "_") for layer in weight.layers), weight.variable
        if path in full:
            raise ValueError(f"it has two weights {'.'.join(path)!r}")
        full[path] = weight
    result: dict[Name, Weight] = {}
    for path, short in squeeze(full).items():
        if short in result:
            raise ValueError(f"it has two weights {'.'.join(short)!r}")
        result[short] = full[path]
    return result
