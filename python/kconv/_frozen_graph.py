"""A layer graph with fixed weights as a list of steps on NumPy arrays, (N, H, W, C) or (N, C).

Chains of layers are programs of :mod:`kconv.models.fusion`, a whole kEffNet with its classifier is
one; what these do not know (maximum pooling, the branches of an Inception block) runs by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv._kconv import FrozenProgram, FusedProgram
from kconv.models import graph
from kconv.models.fusion import Segment, UnfitError, partition
from kconv.weights._entries import Array

__all__ = ["Step", "compile_graph", "inference_graph"]

Values = NDArray[np.float32]
Weights = Mapping[tuple[str, str], Array]


class Step:
    """Something that computes one value of others.

    Attributes:
        name: of the value.
        inputs: names of those that it reads.
    """

    def __init__(self, name: str, inputs: tuple[str, ...], function: Callable[..., Values]) -> None:
        self.name, self.inputs, self._function = name, inputs, function

    def __call__(self, *values: Values) -> Values:
        """The value, of those that are read."""
        return self._function(*values)


def compile_graph(layers: graph.Graph, weights: Weights) -> list[Step]:
    """The steps that compute a graph, in their order.

    Args:
        layers: what :func:`inference_graph` gives.
        weights: by (layer, weight), in PyTorch's layouts.

    Raises:
        ValueError: if there is a layer that cannot be computed.
    """
    steps: list[Step] = []
    for part in _parts(layers):
        function: Callable[..., Values]
        function = _Fused(part, weights) if isinstance(part, Segment) else _alone(part)
        steps.append(Step(part.name, tuple(part.inputs), function))
    return steps


def inference_graph(layers: graph.Graph) -> graph.Graph:
    """The same without what does nothing in inference, and with convolutions for dense layers."""
    renamed: dict[str, str] = {}
    result: list[graph.Layer] = []
    for layer in layers.layers:
        inputs = tuple(renamed.get(name, name) for name in layer.inputs)
        layer = replace(layer, inputs=inputs)
        if isinstance(layer, graph.Dropout | graph.Identity):
            renamed[layer.name] = inputs[0]
        elif isinstance(layer, graph.Dense):
            result += _dense(layer)
            renamed[layer.name] = result[-1].name
        else:
            result.append(layer)
    return graph.Graph(layers.name, tuple(result), renamed.get(layers.output, layers.output))


def _dense(layer: graph.Dense) -> list[graph.Layer]:
    """A dense layer as a convolution of one pixel, which fused programs know."""
    pixel, flat = f"{layer.name}:pixel", f"{layer.name}:flat"
    result: list[graph.Layer] = [
        graph.Reshape(name=pixel, inputs=layer.inputs, shape=(1, 1, layer.in_features)),
        graph.Conv(
            name=layer.name,
            inputs=(pixel,),
            shape=(1, 1, layer.units),
            filters=layer.units,
            in_channels=layer.in_features,
            use_bias=True,
        ),
        graph.Flatten(name=flat, inputs=(layer.name,), shape=(layer.units,)),
    ]
    if layer.activation:
        result.append(
            graph.Activation(
                name=f"{layer.name}:{layer.activation}",
                inputs=(flat,),
                shape=(layer.units,),
                kind=layer.activation,
            )
        )
    return result


def _parts(layers: graph.Graph) -> list[graph.Layer | Segment]:
    """The graph's segments; of the layers between them, the chains as segments of their own."""
    readers = Counter(name for layer in layers.layers for name in layer.inputs)
    readers[layers.output] += 1
    shapes = {layer.name: layer for layer in layers.layers}
    parts: list[graph.Layer | Segment | list[graph.Layer]] = []
    chains: dict[str, list[graph.Layer]] = {}
    for part in partition(layers):
        if isinstance(part, Segment) or not isinstance(part, _CHAINED) or _is_softmax(part):
            parts.append(part)
            continue
        source = part.inputs[0]
        chain = chains.pop(source) if source in chains and readers[source] == 1 else []
        if not chain:
            parts.append(chain)
        chain.append(part)
        chains[part.name] = chain
    result: list[graph.Layer | Segment] = []
    for found in parts:
        result += _chain(found, shapes) if isinstance(found, list) else [found]
    return result


_CHAINED = (
    graph.Conv
    | graph.DepthwiseConv
    | graph.ZeroPad
    | graph.BatchNorm
    | graph.Activation
    | graph.Interleave
    | graph.CopyChannels
    | graph.FoldHalves
    | graph.WindowPool
)


def _is_softmax(layer: graph.Layer) -> bool:
    return isinstance(layer, graph.Activation) and layer.kind == "softmax"


def _chain(
    layers: list[graph.Layer], shapes: Mapping[str, graph.Layer]
) -> list[graph.Layer | Segment]:
    """Layers of which each reads the one before."""
    source = shapes[layers[0].inputs[0]]
    start = graph.Input(name=source.name, inputs=(), shape=source.shape)
    parts = partition(graph.Graph("", (start, *layers), layers[-1].name))
    result: list[graph.Layer | Segment] = []
    for part in parts:
        if isinstance(part, graph.Conv | graph.DepthwiseConv):
            raise ValueError(f"layer {part.name!r} is a convolution that fused programs lack")
        if isinstance(part, Segment | graph.ZeroPad):
            result.append(part)
        else:
            result.append(Segment((part,), part.inputs[0], shapes[part.inputs[0]].channels))
    return result


_SIZES_KEPT = 8


class _Fused:
    """Runs a segment, whose weights are packed once for each size of images."""

    def __init__(self, segment: Segment, weights: Weights) -> None:
        norms = [layer for layer in segment.layers if isinstance(layer, graph.BatchNorm)]
        self._segment = segment
        self._parameters = _row(weights[key] for key in segment.parameters)
        self._statistics = _row(
            weights[norm.name, name]
            for name in ("moving_mean", "moving_variance")
            for norm in norms
        )
        # Of the sizes seen last: packed weights take some three times the memory of those given.
        self._programs: dict[tuple[int, int], tuple[FrozenProgram, tuple[int, ...]]] = {}

    def __call__(self, x: Values) -> Values:
        if x.ndim == 2:
            x = x[:, None, None]
        size = x.shape[1], x.shape[2]
        program = self._programs.get(size)
        if program is None:  # threads that come here together make the same
            program = self._program(size)
            if len(self._programs) >= _SIZES_KEPT:
                self._programs.pop(next(iter(self._programs)), None)
            self._programs[size] = program
        if not len(x):
            return np.empty((0, *program[1]), np.float32)
        y: Values = program[0].infer(x, "NHWC")
        return y.reshape(len(y), *program[1])

    def _program(self, size: tuple[int, int]) -> tuple[FrozenProgram, tuple[int, ...]]:
        try:
            program = self._segment.program(size, "OI")
        except UnfitError as error:
            raise ValueError(str(error)) from None
        shape = program.output_shape("NHWC")
        frozen = FusedProgram(program.integers).freeze(self._parameters, self._statistics)
        return frozen, shape if self._segment.keeps_pixels else shape[2:]


def _row(arrays: Any) -> Values:
    """The values of all arrays, one after the other."""
    return np.concatenate([np.empty(0, np.float32), *(array.ravel() for array in arrays)])


def _alone(layer: graph.Layer) -> Callable[..., Values]:
    """What computes a layer by NumPy."""
    match layer:
        case graph.Activation(kind="softmax"):
            return _softmax
        case graph.Pool():
            return partial(_pool, layer)
        case graph.GlobalPool():
            reduce: Any = np.max if layer.kind == "max" else np.mean
            keepdims = layer.keepdims
            return lambda x: reduce(x, axis=(1, 2), keepdims=keepdims)
        case graph.Concat():
            return lambda *values: np.concatenate(values, axis=-1)
        case graph.Add():
            return lambda *values: sum(values[1:], start=values[0])
        case graph.Multiply():
            return lambda x, y: x * y
        case graph.ZeroPad():
            borders = ((0, 0), *layer.padding, (0, 0))
            return lambda x: np.pad(x, borders)
        case graph.Reshape():
            return lambda x: x.reshape(len(x), 1, 1, -1)
        case graph.Flatten():
            return lambda x: x.reshape(len(x), -1)
        case _:
            raise ValueError(
                f"layer {layer.name!r} is none that can be frozen ({type(layer).__name__})"
            )


def _softmax(x: Values) -> Values:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _pool(layer: graph.Pool, x: Values) -> Values:
    """Maxima or means of windows, of those pixels that are there."""
    size, stride = layer.pool_size, layer.strides
    sizes, borders = [], []
    for pixels in x.shape[1:3]:
        if layer.padding == "same":
            count = -(-pixels // stride)
            total = max((count - 1) * stride + size - pixels, 0)
        else:
            count, total = (pixels - size) // stride + 1, 0
        if count < 1:
            raise ValueError(f"layer {layer.name!r}: {size}x{size} do not fit into {x.shape[1:3]}")
        sizes.append(count)
        borders.append((total // 2, total - total // 2))

    def windows(values: Values, fill: float) -> Any:
        padded = np.pad(values, ((0, 0), *borders, (0, 0)), constant_values=fill)
        for row in range(size):
            for column in range(size):
                rows = slice(row, row + (sizes[0] - 1) * stride + 1, stride)
                columns = slice(column, column + (sizes[1] - 1) * stride + 1, stride)
                yield padded[:, rows, columns]

    if layer.kind == "max":
        first, *others = windows(x, -np.inf)
        result = first.copy()
        for other in others:
            np.maximum(result, other, out=result)
        return result
    counts = sum(windows(np.ones((1, *x.shape[1:3], 1), np.float32), 0.0))
    return sum(windows(x, 0.0)) / counts
