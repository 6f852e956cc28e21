"""A network's layers as other programs know them: no dropout, no fused interleave or softmax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from kconv.models import graph

__all__ = ["plain_graph", "renamed"]


def renamed(layers: graph.Graph, name_of: Callable[[str], str]) -> graph.Graph:
    """The same layers under other names, which differ where theirs do."""
    return graph.Graph(
        layers.name,
        tuple(
            replace(layer, name=name_of(layer.name), inputs=tuple(map(name_of, layer.inputs)))
            for layer in layers.layers
        ),
        name_of(layers.output),
    )


def plain_graph(layers: graph.Graph, *, pads: bool = True) -> graph.Graph:
    """The same computation with fewer kinds of layers.

    Dropouts and identities are left out. A convolution's interleave and a dense layer's softmax
    become layers of their own, and windows that :class:`~kconv.models.graph.Pool` has become one.

    Args:
        layers: the network's.
        pads: whether the target's convolutions take any padding, so that what pads for one of them
            alone becomes part of it; else what a convolution pads becomes a layer of its own.
    """
    renamed: dict[str, str] = {}
    result: dict[str, graph.Layer] = {}
    readers = Counter(name for layer in layers.layers for name in layer.inputs)
    for layer in layers.layers:
        inputs = tuple(renamed.get(name, name) for name in layer.inputs)
        layer = replace(layer, inputs=inputs)
        if not pads and isinstance(layer, graph.Conv) and not isinstance(layer.padding, str):
            if any(map(any, layer.padding)):
                result |= {f"{layer.name}_pad": _pad_of(layer)}
                layer = replace(layer, inputs=(f"{layer.name}_pad",))
            layer = replace(layer, padding="valid")
        match layer:
            case graph.Dropout() | graph.Identity():
                renamed[layer.name] = inputs[0]
                continue
            case graph.WindowPool():
                layer = _plain_pool(layer)
            case graph.Reshape():
                mean = result[inputs[0]]
                if isinstance(mean, graph.GlobalPool) and readers[mean.name] == 1:
                    del result[mean.name]
                    layer = replace(mean, name=layer.name, shape=layer.shape, keepdims=True)
            case graph.Conv() if layer.interleave > 1:
                raw = replace(layer, name=f"{layer.name}_raw", interleave=1)
                result[raw.name] = raw
                layer = graph.Interleave(
                    name=layer.name, inputs=(raw.name,), shape=layer.shape, step=layer.interleave
                )
            case graph.Dense() if layer.activation:
                result[layer.name] = replace(layer, activation=None)
                layer = graph.Activation(
                    name=f"{layer.name}_{layer.activation}",
                    inputs=(layer.name,),
                    shape=layer.shape,
                    kind=layer.activation,
                )
                renamed[layer.inputs[0]] = layer.name
            case graph.Conv(padding="valid" | ((0, 0), (0, 0))) if pads and inputs[0] in result:
                pad = result[inputs[0]]
                if isinstance(pad, graph.ZeroPad) and readers[pad.name] == 1:
                    del result[pad.name]
                    layer = replace(layer, inputs=pad.inputs, padding=pad.padding)
        result[layer.name] = layer
    output = renamed.get(layers.output, layers.output)
    return graph.Graph(layers.name, tuple(result.values()), output)


def _plain_pool(layer: graph.WindowPool) -> graph.Layer:
    """The pool of square windows and no padding, or "same" at stride 1, if it is one."""
    size, stride = layer.kernel_size[0], layer.strides[0]
    square = layer.kernel_size == (size, size) and layer.strides == (stride, stride)
    if not square or layer.dilation != (1, 1) or layer.ceil_mode:
        return layer
    padding: graph.Padding
    if layer.padding == ((0, 0), (0, 0)):
        padding = "valid"
    elif (
        stride == size % 2 == 1
        and layer.padding == ((size // 2, size // 2),) * 2
        and (layer.kind == "max" or not layer.count_include_pad)
    ):
        padding = "same"
    else:
        return layer
    return graph.Pool(
        name=layer.name,
        inputs=layer.inputs,
        shape=layer.shape,
        kind=layer.kind,
        pool_size=size,
        strides=stride,
        padding=padding,
    )


def _pad_of(layer: graph.Conv) -> graph.ZeroPad:
    """The layer that pads for a convolution."""
    assert not isinstance(layer.padding, str)
    shape = (None, None, layer.in_channels)
    return graph.ZeroPad(
        name=f"{layer.name}_pad", inputs=layer.inputs, shape=shape, padding=layer.padding
    )
