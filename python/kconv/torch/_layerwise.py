"""A fused program's layers one by one, by PyTorch's own operators.

They are differentiable any number of times, where a fused operation is only once: gradients that
are to be differentiated again come from here.
"""

from __future__ import annotations

import math
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kconv._geometry import same_padding
from kconv.models import graph
from kconv.models.activations import ACTIVATIONS
from kconv.models.fusion import Program
from kconv.models.wire import weight_layout
from kconv.torch._functions import add, concatenate, fold_halves
from kconv.torch._scriptable import interleave_by_index, pad_explicit

__all__ = ["layerwise"]


def layerwise(
    program: Program,
    layout: str,
    x: Tensor,
    parameters: Tensor,
    masks: Tensor | None,
    statistics: Tensor | None,
) -> Tensor:
    """The output of a program.

    Args:
        program: of a segment.
        layout: "NCHW" or "NHWC".
        x: (N, C, H, W) or (N, H, W, C).
        parameters: all of them in a row.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``.
    """
    weights = _weights(program, parameters)
    norms = {norm.name: i for i, norm in enumerate(program.norms)}
    rows = None
    if statistics is not None:
        rows = statistics.split([norm.channels for norm in program.norms], 1)
    drops = {drop.name: i for i, drop in enumerate(program.masks)}
    segment = program.segment
    values = {segment.input: x if layout == "NCHW" else x.permute(0, 3, 1, 2)}
    for layer in segment.layers:
        inputs = [values[name] for name in layer.inputs]
        own = weights.get(layer.name, {})
        match layer:
            case graph.BatchNorm():
                mean, variance = (None, None) if rows is None else rows[norms[layer.name]]
                y = F.batch_norm(
                    inputs[0],
                    mean,
                    variance,
                    own.get("gamma"),
                    own["beta"],
                    training=rows is None,
                    eps=layer.epsilon,
                )
            case graph.Dropout():
                y = inputs[0]
                if masks is not None:
                    y = y * masks[drops[layer.name]][:, None, None, None]
            case _:
                y = _layer(layer, inputs, own)
        values[layer.name] = y
    y = values[segment.name]
    return y if layout == "NCHW" else y.permute(0, 2, 3, 1)


def _weights(program: Program, parameters: Tensor) -> dict[str, dict[str, Tensor]]:
    """The parameters by layer and name, kernels as PyTorch's."""
    shapes = {layer.name: layer.weights() for layer in program.segment.layers}
    sizes = [prod(shapes[layer][name]) for layer, name in program.parameters]
    transposed = weight_layout(program.integers) == "IO"  # Keras's kernels are (k, k, C_in, C_out)
    weights: dict[str, dict[str, Tensor]] = {}
    for (layer, name), piece in zip(program.parameters, parameters.split(sizes), strict=True):
        shape = shapes[layer][name]
        if len(shape) == 4:
            height, width, inputs, outputs = shape
            depthwise = name == "depthwise_kernel"
            if transposed:
                piece = piece.view(shape).permute((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
            shape = (
                (inputs * outputs, 1, height, width)
                if depthwise
                else (outputs, inputs, height, width)
            )
        weights.setdefault(layer, {})[name] = piece.reshape(shape)
    return weights


def _layer(layer: graph.Layer, inputs: list[Tensor], weights: dict[str, Tensor]) -> Tensor:
    """A layer without state. Vectors are images of one pixel."""
    x = inputs[0]
    match layer:
        case graph.Conv():
            y = _convolve(layer, x, weights["kernel"], weights.get("bias"), layer.groups)
            return interleave_by_index(y, layer.interleave)
        case graph.DepthwiseConv():
            weight, bias = weights["depthwise_kernel"], weights.get("bias")
            return _convolve(layer, x, weight, bias, layer.in_channels)
        case graph.ZeroPad():
            return pad_explicit(x, layer.padding, "zeros")
        case graph.Activation():
            return ACTIVATIONS[layer.kind].call_torch(F, x, layer.parameters)
        case graph.Interleave():
            return interleave_by_index(x, layer.step)
        case graph.CopyChannels():
            return x.narrow(1, layer.start, layer.count)
        case graph.FoldHalves():
            return fold_halves(x)
        case graph.Concat():
            return concatenate(*inputs)
        case graph.Add():
            return add(*inputs)
        case graph.Multiply():
            return x * inputs[1]
        case graph.GlobalPool():
            return x.mean((2, 3), keepdim=True)
        case graph.Pool():
            return _pool(layer, x)
        case graph.WindowPool():
            return _window_pool(layer, x)
        case graph.ChannelScale():
            return x * weights["scale"][:, None, None]
        case graph.PReLU():
            return F.prelu(x, weights["alpha"])
        case graph.Identity() | graph.Reshape() | graph.Flatten():
            return x
    raise TypeError(f"layer {layer.name!r}: a {type(layer).__name__} is in no fused program")


def _pool(layer: graph.Pool, x: Tensor) -> Tensor:
    size, strides = layer.pool_size, layer.strides
    borders: graph.Borders = ((0, 0), (0, 0))
    if layer.padding == "same":
        rows, columns = (same_padding(n, size, strides) for n in x.shape[2:])
        borders = rows, columns
    window = graph.WindowPool(
        name=layer.name,
        inputs=layer.inputs,
        shape=layer.shape,
        kind=layer.kind,
        kernel_size=(size, size),
        strides=(strides, strides),
        padding=borders,
        count_include_pad=False,
    )
    return _window_pool(window, x)


def _window_pool(layer: graph.WindowPool, x: Tensor) -> Tensor:
    (top, bottom), (left, right) = layer.padding
    height, width = layer.size((x.shape[2], x.shape[3]))
    # What the windows see: borders up to the last tap.
    ends = [
        (out - 1) * stride + (k - 1) * dilation + 1
        for out, stride, k, dilation in zip(
            (height, width), layer.strides, layer.kernel_size, layer.dilation, strict=True
        )
    ]
    sides = (left, ends[1] - x.shape[3] - left, top, ends[0] - x.shape[2] - top)
    if layer.kind == "max":
        x = F.pad(x, sides, value=-math.inf)
        return F.max_pool2d(x, layer.kernel_size, layer.strides, 0, layer.dilation)
    ones = torch.ones_like(x[:1, :1])
    if layer.count_include_pad:
        ones = F.pad(ones, (left, right, top, bottom), value=1.0)
        counted = (0, ends[1] - ones.shape[3], 0, ends[0] - ones.shape[2])
    else:
        counted = sides
    sums, counts = (
        F.avg_pool2d(F.pad(image, around), layer.kernel_size, layer.strides, divisor_override=1)
        for image, around in ((x, sides), (ones, counted))
    )
    return sums / counts


def _convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    strides = layer.strides if isinstance(layer.strides, tuple) else (layer.strides,) * 2
    dilation = layer.dilation if isinstance(layer, graph.Conv) else (1, 1)
    borders = layer.padding
    if borders == "same":
        sizes = zip(x.shape[2:], weight.shape[2:], strides, strict=True)
        borders = [
            same_padding(size, (kernel - 1) * d + 1, stride)
            for (size, kernel, stride), d in zip(sizes, dilation, strict=True)
        ]
    if borders != "valid":
        x = pad_explicit(x, borders, "zeros")
    return F.conv2d(x, weight, bias, strides, dilation=dilation, groups=groups)
