"""Networks of ``kconv.jax.nnx``, whose graph tells what their weights are called elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kconv._model_folder import layer_class, weight_layouts
from kconv.jax._nnx_networks import graph_and_weights
from kconv.models import graph
from kconv.weights._entries import Array
from kconv.weights._keras_file import KerasFile, Name
from kconv.weights._layouts import Layout, Shape
from kconv.weights._matching import Pairs, match
from kconv.weights._models import Source, in_torch_terms, read_weight

__all__ = ["FlaxTarget"]


class FlaxTarget:
    """See :class:`kconv.weights._models.Target`."""

    exact_activations = False

    def __init__(self, network: Any) -> None:
        self._graph, variables = graph_and_weights(network)
        self._own: dict[str, tuple[Any, Layout, Shape]] = {
            name: (variables[key], how, shape)
            for key, (name, how, shape) in weight_layouts(self._graph).items()
        }
        self.nbytes = sum(8 * variable[...].size for variable, _, _ in self._own.values())

    def arrays(self) -> tuple[dict[str, Array], dict[str, str]]:
        """All weights by PyTorch's names and in its layouts."""
        result = {}
        for name, (variable, how, shape) in self._own.items():
            array = np.asarray(variable[...])
            known = array.dtype in (np.float16, np.float32, np.float64)
            array = array if known else array.astype(np.float32)
            result[name] = how.to_torch(array.reshape(shape))
        return result, {}

    def fit(self, sources: Mapping[str, Source]) -> Pairs:
        """The pairs that :meth:`fill` would make."""
        shapes = {name: source.shape for name, source in sources.items()}
        return match(
            shapes, {name: how.shape(shape) for name, (_, how, shape) in self._own.items()}
        )

    def fill(self, sources: Mapping[str, Source]) -> Pairs:
        """Set all weights, once all have been read."""
        pairs = self.fit(sources)
        values = []
        for name, file_name in pairs.names.items():
            variable, how, shape = self._own[name]
            before = variable[...]
            array = read_weight(file_name, sources[file_name], str(before.dtype))
            array = how.to_keras(array, shape).reshape(before.shape)
            values.append((variable, jnp.asarray(array, before.dtype)))
        for variable, value in values:
            variable[...] = value
        return pairs

    def fill_keras(self, file: KerasFile) -> int:
        """Set all weights from a file of Keras's; return how many."""
        classes = {layer.name.replace("/", "_"): layer_class(layer) for layer in self._graph.layers}

        def kind(layers: Name, shape: Shape) -> str | None:
            return classes.get(".".join(layers))

        return len(self.fill(in_torch_terms(file, kind, set(self._own))).names)

    def activations(self) -> dict[str, str]:
        """The kinds of activations by their layers' names."""
        return {
            layer.name.replace("/", "_"): layer.kind
            for layer in self._graph.layers
            if isinstance(layer, graph.Activation) and layer.kind != "softmax"
        }
