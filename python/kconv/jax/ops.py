"""Differentiable convolutions of JAX arrays on kconv's kernels.

Without its bias a convolution is bilinear in image and weight, so output, input gradient and weight
gradient form a triangle: the derivatives of each are the other two. Written down once for all
kernels, that gives derivatives of every order::

    y  = output(x, w)         dx = input_gradient(g, w)    dw = weight_gradient(x, g)
    dx = input_gradient(g, w)     dg = output(c, w)            dw = weight_gradient(c, g)
    dw = weight_gradient(x, g)    dx = input_gradient(g, c)    dg = output(x, c)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

import kconv
from kconv.jax import _kernels

Layout = Literal["NCHW", "NHWC"]
WeightLayout = Literal["OI", "IO"]
Padding = Literal["same", "valid"] | int | tuple[tuple[int, int], tuple[int, int]]
Shape = tuple[int, ...]


def pointwise_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: Layout = "NCHW",
    weight_layout: WeightLayout = "OI",
) -> jax.Array:
    """Grouped pointwise (1x1) convolution, its output interleaved.

    Example:
        >>> x, weight = jnp.ones((2, 8, 5, 5)), jnp.ones((6, 4))
        >>> pointwise_conv(x, weight, groups=2, interleave=3).shape
        (2, 6, 5, 5)

    Args:
        x: (N, C_in, H, W), or (N, H, W, C_in) with ``layout="NHWC"``.
        weight: (C_out, C_in/groups[, 1, 1]), or ([1, 1,] C_in/groups, C_out) with
            ``weight_layout="IO"``.
        bias: (C_out,) or None; added before the interleave.
        groups: number of groups; divides C_in and C_out.
        interleave: step by which the output's channels are interleaved; 1 leaves them.
        layout: "NCHW" or "NHWC"; of ``x`` and of the result.
        weight_layout: "OI" (PyTorch's order) or "IO" (Keras's).

    Returns:
        Like ``x`` with C_out channels. bfloat16 is summed in float32, float16 computed in it.

    Raises:
        ValueError: shapes, groups or step that do not fit together.
        TypeError: dtypes other than floating point, or float64 mixed with a narrower one.
    """
    return _convolve(
        "pointwise_conv",
        x,
        weight,
        bias,
        groups=groups,
        interleave=interleave,
        layout=layout,
        weight_layout=weight_layout,
    )


def depthwise_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    layout: Layout = "NCHW",
    weight_layout: WeightLayout = "OI",
) -> jax.Array:
    """Depthwise convolution: each channel with a k x k kernel of its own.

    Example:
        >>> x, weight = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4))
        >>> depthwise_conv(x, weight, stride=2, layout="NHWC", weight_layout="IO").shape
        (2, 5, 5, 4)

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``.
        weight: (C, k, k) or (C, 1, k, k), or (k, k, C[, 1]) with ``weight_layout="IO"``; k is 3, 5
            or 7.
        bias: (C,) or None.
        stride: 1 or 2.
        padding: "same" (TensorFlow's: ceil(size / stride) outputs, an odd pixel of padding at the
            bottom and right), "valid" (none), an integer, or ((top, bottom), (left, right)); each
            less than k.
        layout: "NCHW" or "NHWC"; of ``x`` and of the result.
        weight_layout: "OI" or "IO".

    Returns:
        (N, C, H_out, W_out), or (N, H_out, W_out, C). bfloat16 is summed in float32, float16
        computed in it.

    Raises:
        ValueError: shapes, stride or padding that do not fit together.
        TypeError: dtypes other than floating point, or float64 mixed with a narrower one.
    """
    if not isinstance(padding, (str, int)):
        (top, bottom), (left, right) = padding
        padding = ((top, bottom), (left, right))
    return _convolve(
        "depthwise_conv",
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        layout=layout,
        weight_layout=weight_layout,
    )


def interleave(x: jax.Array, step: int, *, layout: Layout = "NCHW") -> jax.Array:
    """Channels s, s + step, s + 2 step, ... for s = 0 .. step - 1 in turn (V1).

    Example:
        >>> interleave(jnp.arange(6.0).reshape(1, 6, 1, 1), 3).ravel()
        Array([0., 3., 1., 4., 2., 5.], dtype=float32)

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``.
        step: at least 1; 1 leaves the channels where they are. It need not divide C.
        layout: "NCHW" or "NHWC".

    Returns:
        Like ``x``.

    Raises:
        ValueError: a step below 1, or not four axes.
        TypeError: a dtype other than floating point.
    """
    return _permute("interleave", x, step, layout)


def deinterleave(x: jax.Array, step: int, *, layout: Layout = "NCHW") -> jax.Array:
    """Undoes :func:`interleave` (and is its gradient).

    Example:
        >>> deinterleave(jnp.array([0.0, 3, 1, 4, 2, 5]).reshape(1, 6, 1, 1), 3).ravel()
        Array([0., 1., 2., 3., 4., 5.], dtype=float32)

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``.
        step: at least 1; that of the interleave to undo.
        layout: "NCHW" or "NHWC".

    Returns:
        Like ``x``.

    Raises:
        ValueError: a step below 1, or not four axes.
        TypeError: a dtype other than floating point.
    """
    return _permute("deinterleave", x, step, layout)


@dataclass(frozen=True)
class _Convolution:
    """The static side of a convolution: its kernel, that kernel's arguments, and the shapes."""

    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    input: Shape  # of one image
    weight: Shape
    output: Shape  # of one image

    @property
    def layout(self) -> Layout:
        return dict(self.arguments)["layout"]

    @property
    def interleave(self) -> int:
        return dict(self.arguments).get("interleave", 1)


def _convolve(
    kernel: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None, **arguments: Any
) -> jax.Array:
    dtype = _compute_dtype(x, weight, bias)
    # The kernel itself, on an empty batch, checks the arguments and tells the output's shape.
    empty = None if bias is None else np.empty(np.shape(bias), dtype)
    output = getattr(kconv, kernel)(
        np.empty((0, *np.shape(x)[1:]), dtype),
        np.empty(np.shape(weight), dtype),
        empty,
        **arguments,
    )
    operands = [jnp.asarray(array) for array in (x, weight, bias) if array is not None]
    x, w, *b = _kernels.aligned((True, False, False)[: len(operands)], *operands)
    w = w.reshape(_without_unit_axes(kernel, w.shape, arguments["weight_layout"]))
    static = _Convolution(kernel, tuple(arguments.items()), x.shape[1:], w.shape, output.shape[1:])
    y = _output(static, x.astype(dtype), w.astype(dtype), b[0].astype(dtype) if b else None)
    return y.astype(x.dtype)


def _without_unit_axes(kernel: str, weight: Shape, weight_layout: WeightLayout) -> Shape:
    """The shape that the weight's gradient has: (O, I) or (I, O); (C, k, k) or (k, k, C)."""
    if kernel == "pointwise_conv":
        return weight[:2] if weight_layout == "OI" else weight[-2:]
    return (weight[0], *weight[-2:]) if weight_layout == "OI" else weight[:3]


def _compute_dtype(*arrays: jax.Array | None) -> np.dtype[Any]:
    """float64 or bfloat16 if all are, else float32, or TypeError."""
    dtypes = [jnp.result_type(array) for array in arrays if array is not None]
    for dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"expected a floating-point dtype, got {dtype}")
    wide = [dtype == np.float64 for dtype in dtypes]
    if any(wide) and not all(wide):
        raise TypeError(f"cannot mix the dtypes {', '.join(map(str, dtypes))}: cast one of them")
    native = wide[0] or all(dtype == jnp.bfloat16 for dtype in dtypes)
    return dtypes[0] if native else np.dtype(np.float32)


# Differentiation: the triangle of the module's docstring, plus the bias, which only adds.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _output(conv: _Convolution, x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """x: (N, *conv.input), w: conv.weight, b: (C_out,) -> (N, *conv.output)."""
    return _call(conv.kernel, (x,), (w,) if b is None else (w, b), conv.output, conv.arguments)


def _output_vjp(conv: _Convolution, residuals: Any, g: jax.Array) -> Any:
    x, w, b = residuals
    db = None if b is None else _bias_gradient(conv, g)
    return _input_gradient(conv, g, w), _weight_gradient(conv, x, g), db


_output.defvjp(lambda conv, x, w, b: (_output(conv, x, w, b), (x, w, b)), _output_vjp)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(conv: _Convolution, g: jax.Array, w: jax.Array) -> jax.Array:
    """g: (N, *conv.output), w: conv.weight -> (N, *conv.input)."""
    arguments = conv.arguments
    if conv.kernel == "depthwise_conv":
        size = conv.input[1:] if conv.layout == "NCHW" else conv.input[:2]
        arguments += (("input_size", size),)
    return _call(f"{conv.kernel}_grad_input", (g,), (w,), conv.input, arguments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_gradient(conv: _Convolution, x: jax.Array, g: jax.Array) -> jax.Array:
    """x: (N, *conv.input), g: (N, *conv.output) -> conv.weight."""
    arguments = conv.arguments
    if conv.kernel == "depthwise_conv":
        arguments += (("kernel_size", conv.weight[1]),)
    return _call(f"{conv.kernel}_grad_weight", (), (x, g), conv.weight, arguments)


_input_gradient.defvjp(
    lambda conv, g, w: (_input_gradient(conv, g, w), (g, w)),
    lambda conv, gw, c: (_output(conv, c, gw[1], None), _weight_gradient(conv, c, gw[0])),
)
_weight_gradient.defvjp(
    lambda conv, x, g: (_weight_gradient(conv, x, g), (x, g)),
    lambda conv, xg, c: (_input_gradient(conv, xg[1], c), _output(conv, xg[0], c, None)),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bias_gradient(conv: _Convolution, g: jax.Array) -> jax.Array:
    """g: (N, *conv.output) -> (C_out,), the sums over batch and pixels."""
    channels = conv.output[0 if conv.layout == "NCHW" else 2]
    arguments = (("layout", conv.layout), ("interleave", conv.interleave))
    return _call("pointwise_conv_grad_bias", (), (g,), (channels,), arguments)


def _bias_gradient_vjp(conv: _Convolution, g: jax.Array, c: jax.Array) -> tuple[jax.Array]:
    pixel = c.reshape((1, -1, 1, 1) if conv.layout == "NCHW" else (1, 1, 1, -1))
    pixel = _permute("interleave", pixel, conv.interleave, conv.layout)
    return (jnp.zeros_like(g) + pixel,)  # which is split over devices as g is


_bias_gradient.defvjp(lambda conv, g: (_bias_gradient(conv, g), g), _bias_gradient_vjp)


_INVERSE = {"interleave": "deinterleave", "deinterleave": "interleave"}


@partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def _permuted(kernel: str, x: jax.Array, step: int, layout: Layout) -> jax.Array:
    """x: (N, C, H, W) or (N, H, W, C) -> the same with its channels permuted."""
    return _call(kernel, (x,), (), x.shape[1:], (("step", step), ("layout", layout)))


_permuted.defvjp(
    lambda kernel, x, step, layout: (_permuted(kernel, x, step, layout), None),
    lambda kernel, step, layout, _, g: (_permuted(_INVERSE[kernel], g, step, layout),),
)


def _permute(kernel: str, x: jax.Array, step: int, layout: Layout) -> jax.Array:
    (x,) = _kernels.aligned((True,), jnp.asarray(x))
    dtype = _compute_dtype(x)
    getattr(kconv, kernel)(np.empty((0, *x.shape[1:]), dtype), step, layout=layout)  # checks
    return _permuted(kernel, x.astype(dtype), step, layout).astype(x.dtype)


def _call(
    kernel: str,
    images: tuple[jax.Array, ...],
    others: tuple[jax.Array, ...],
    shape: Shape,
    arguments: tuple[tuple[str, Any], ...],
) -> jax.Array:
    """Call a kernel on ``images`` and ``others``, in this order, and give it a rule for vmap.

    With ``images``, the result is a batch of as many images, of ``shape`` each, and an axis mapped
    over the images alone is folded into their batch. Any other mapped axis is a loop.
    """
    summed = not images  # over the batch of the others
    batched = (*[True] * len(images), *[summed] * len(others))
    function = _kernels.Kernel(kernel, batched, shape, summed, arguments)

    @custom_vmap
    def run(images: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> jax.Array:
        return _kernels.parallel(function, *images, *others)

    @run.def_vmap
    def _(size: int, mapped: Any, images: Any, others: Any) -> tuple[jax.Array, bool]:
        if images and all(mapped[0]) and not any(mapped[1]):
            folded = tuple(i.reshape(size * i.shape[1], *i.shape[2:]) for i in images)
            result = _call(kernel, folded, others, shape, arguments)
            return result.reshape(size, images[0].shape[1], *shape), True
        operands, is_mapped = (*images, *others), (*mapped[0], *mapped[1])

        def one(slices: tuple[jax.Array, ...]) -> jax.Array:
            remaining = iter(slices)
            merged = [next(remaining) if m else o for o, m in zip(operands, is_mapped, strict=True)]
            split = len(images)
            return _call(kernel, tuple(merged[:split]), tuple(merged[split:]), shape, arguments)

        slices = tuple(o for o, m in zip(operands, is_mapped, strict=True) if m)
        return jax.lax.map(one, slices), True

    return run(images, others)
