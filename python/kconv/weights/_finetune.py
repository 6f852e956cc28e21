"""Weights to go on from: a file's, with a new classifier where the classes differ."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kconv._model_folder import weight_layouts
from kconv.models import graph
from kconv.weights._entries import Array, Entry
from kconv.weights._keras_file import KerasFile
from kconv.weights._layouts import Layout
from kconv.weights._models import Source, adapt
from kconv.weights._reading import TorchFile, read

__all__ = ["load_pretrained"]


def load_pretrained(model: Any, path: Path, layers: graph.Graph) -> bool:
    """Fill a model of a graph from a file; its last layer keeps its own weights if shapes differ.

    Args:
        model: of any front end, built of ``layers``.
        path: whatever :func:`kconv.load_weights` reads: a file, or the folder of a run.
        layers: the model's.

    Returns:
        Whether the last layer has been filled, too.

    Raises:
        ValueError, OSError, ImportError: as for :func:`kconv.load_weights`.
    """
    from kconv.weights import fill

    target = adapt(model)
    head = next(layer for layer in reversed(layers.layers) if layer.weights())
    own = {name.replace("/", "_"): values for name, values in target.arrays()[0].items()}
    named, replaced = weight_layouts(layers), []
    with ExitStack() as stack:
        file = read(path, stack, room=16 * target.nbytes + (1 << 26))
        for weight in head.weights():
            name, how, shape = named[head.name, weight]
            values = own[name]
            if isinstance(file, KerasFile):
                file, found = _in_keras_file(file, head.name, weight, shape, how, values)
            else:
                file, found = _in_torch_file(file, name, values)
            replaced.append(found)
        fill(target, file, path)
    return not any(replaced)


def _in_torch_file(file: TorchFile, name: str, values: Array) -> tuple[TorchFile, bool]:
    """The file with these values for its own of that name, which are of another shape."""
    candidates, found = [], False
    for candidate in file.candidates:
        sources = dict(candidate.sources)
        for key, source in candidate.sources.items():
            same = key.replace("/", "_") == name or key.endswith(f".{name}")
            if same and source.shape != values.shape:
                sources[key], found = Source(values.shape, lambda: values), True
        candidates.append(replace(candidate, sources=sources))
    return replace(file, candidates=candidates), found


def _in_keras_file(
    file: KerasFile, layer: str, weight: str, shape: tuple[int, ...], how: Layout, values: Array
) -> tuple[KerasFile, bool]:
    weights, found = dict(file.weights), False
    for place, one in file.weights.items():
        names = one.layers or ("",)
        same = names[-1].replace("/", "_") == layer.replace("/", "_")
        if same and one.entry.shape != shape and len(one.entry.shape) == len(shape):
            entry = Entry(shape, "float32", lambda: how.to_keras(values, shape))
            weights[place], found = replace(one, entry=entry), True
    return replace(file, weights=weights), found
