"""The kernels on TensorFlow tensors, through ``tf.numpy_function``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

import kconv
from kconv._kconv import FusedProgram
from kconv.models.fusion import Program

Tensor = Any


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    groups: int,
    interleave: int,
    layout: str,
    weight_layout: str,
) -> Tensor:
    """x: (N, H, W, C_in), weight: (1, 1, C_in/groups, C_out) -> (N, H, W, C_out)."""
    shared = {"interleave": interleave, "layout": layout}
    arguments = {**shared, "groups": groups, "weight_layout": weight_layout}
    shape = x.shape.as_list()
    shape[layout.index("C")] = weight.shape[-1]

    def gradients(x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
        dx = _call(kconv.pointwise_conv_grad_input, x.shape, g, weight, **arguments)
        dw = _call(kconv.pointwise_conv_grad_weight, weight.shape[2:], x, g, **arguments)
        return [dx, tf.reshape(dw, weight.shape)]

    grad_bias = partial(_call, kconv.pointwise_conv_grad_bias, weight.shape[-1:], **shared)
    forward = partial(_call, kconv.pointwise_conv, shape, **arguments)
    return _differentiable(forward, gradients, grad_bias, x, weight, bias)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    padding: str,
    layout: str,
    weight_layout: str,
) -> Tensor:
    """x: (N, H, W, C), weight: (k, k, C, 1) -> (N, H_out, W_out, C)."""
    arguments = {
        "stride": stride,
        "padding": padding,
        "layout": layout,
        "weight_layout": weight_layout,
    }
    kernel_size = weight.shape[0]
    shape = x.shape.as_list()
    for axis in (layout.index("H"), layout.index("W")):
        if shape[axis] is not None:
            size = shape[axis] - (kernel_size - 1 if padding == "valid" else 0)
            shape[axis] = -(-size // stride)

    def gradients(x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
        height = layout.index("H")
        size = tf.shape(x)[height : height + 2]
        dx = _call(_depthwise_grad_input, x.shape, g, weight, size, **arguments)
        dw = _call(
            kconv.depthwise_conv_grad_weight, weight.shape[:3], x, g, kernel_size, **arguments
        )
        return [dx, tf.reshape(dw, weight.shape)]

    grad_bias = partial(_call, kconv.pointwise_conv_grad_bias, weight.shape[2:3], layout=layout)
    forward = partial(_call, kconv.depthwise_conv, shape, **arguments)
    return _differentiable(forward, gradients, grad_bias, x, weight, bias)


def interleave(x: Tensor, step: int, *, layout: str) -> Tensor:
    """x: (N, H, W, C) -> the same with its channels interleaved."""

    @tf.custom_gradient
    def permuted(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def gradient(g: Tensor) -> Tensor:
            return _call(kconv.deinterleave, x.shape, g, step, layout=layout)

        return _call(kconv.interleave, x.shape, x, step, layout=layout), gradient

    return permuted(x)


def fused(
    program: Program,
    layout: str,
    x: Tensor,
    parameters: Tensor,
    masks: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`kconv.torch.fused.fused`."""
    compiled = FusedProgram(program.integers)
    channels, height, width = program.output_size
    size = (channels, height, width) if layout == "NCHW" else (height, width, channels)
    none = tf.zeros((0,), x.dtype)
    masks = none if masks is None else masks
    given = none if statistics is None else statistics

    def forward(x: np.ndarray, parameters: np.ndarray, *optional: np.ndarray) -> Any:
        arrays = (array if array.size else None for array in optional)
        return compiled.forward(x, parameters, *arrays, layout)

    def backward(*operands: np.ndarray) -> Any:
        grad, parameters, masks, used, workspace, given = operands
        drop = masks if masks.size else None
        return compiled.backward(
            grad, parameters, drop, used, workspace, given.size > 0, layout
        )

    @tf.custom_gradient
    def run(x: Tensor, parameters: Tensor) -> tuple[Any, Callable[..., Any]]:
        types = [x.dtype] * 3
        operands = (x, parameters, masks, given)
        y, used, workspace = tf.numpy_function(forward, operands, types, stateful=False)
        y.set_shape((x.shape[0], *size))
        used.set_shape((2, sum(norm.channels for norm in program.norms)))

        def gradient(grad: Tensor, _: Tensor) -> list[Tensor]:
            operands = (grad, parameters, masks, used, workspace, given)
            grads = tf.numpy_function(backward, operands, types[:2], stateful=False)
            for gradient, like in zip(grads, (x, parameters), strict=True):
                gradient.set_shape(like.shape)
            return list(grads)

        return (y, used), gradient

    return run(x, parameters)  # type: ignore[no-any-return]


def _differentiable(
    forward: Callable[..., Tensor],
    gradients: Callable[..., list[Tensor]],
    grad_bias: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    @tf.custom_gradient
    def convolve(x: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        def gradient(g: Tensor) -> list[Tensor]:
            return gradients(x, weight, g) + [grad_bias(g) for _ in bias]

        return forward(x, weight, *bias), gradient

    tensors = (x, weight) if bias is None else (x, weight, bias)
    return convolve(*map(tf.convert_to_tensor, tensors))  # reads variables


def _call(function: Callable[..., np.ndarray], shape: Any, *args: Any, **keywords: Any) -> Tensor:
    """Call a function of :mod:`kconv`; ``shape`` is the result's, as far as it is known.

    The kernels have no bfloat16 and float16: such tensors are computed in float32.
    """
    dtype = args[0].dtype
    wide = dtype if dtype == tf.float64 else tf.float32
    args = tuple(
        tf.cast(a, wide) if isinstance(a, tf.Tensor) and a.dtype.is_floating else a for a in args
    )
    result = tf.numpy_function(partial(function, **keywords), args, wide, stateful=False)
    result.set_shape(shape)
    return tf.cast(result, dtype)


def _depthwise_grad_input(
    g: np.ndarray, weight: np.ndarray, size: np.ndarray, **arguments: Any
) -> np.ndarray:
    return kconv.depthwise_conv_grad_input(g, weight, tuple(size.tolist()), **arguments)
