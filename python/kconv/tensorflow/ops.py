"""Differentiable convolutions of TensorFlow's tensors on kconv's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import tensorflow as tf

import kconv
from kconv._geometry import interleave_order
from kconv.tensorflow._library import kernels
from kconv.tensorflow._private import in_xla_context

__all__ = ["deinterleave", "depthwise_conv", "interleave", "pointwise_conv"]

Layout = Literal["NCHW", "NHWC"]
WeightLayout = Literal["OI", "IO"]
Padding = Literal["same", "valid"] | int | tuple[tuple[int, int], tuple[int, int]]
Tensor = Any


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: Layout = "NCHW",
    weight_layout: WeightLayout = "OI",
) -> Tensor:
    """Grouped pointwise (1x1) convolution, its output interleaved.

    Example:
        >>> x, weight = tf.ones((2, 8, 5, 5)), tf.ones((6, 4))
        >>> pointwise_conv(x, weight, groups=2, interleave=3).shape
        TensorShape([2, 6, 5, 5])

    Args:
        x: (N, C_in, H, W), or (N, H, W, C_in) with ``layout="NHWC"``; any size may be unknown.
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
        ValueError: an unknown layout.
        TypeError: dtypes other than floating point.
        tf.errors.InvalidArgumentError: shapes, groups or step that do not fit together, or float64
            mixed with a narrower dtype.
    """
    _check_layouts(layout, weight_layout)

    def native(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        y = kernels.kconv_pointwise_conv(
            x,
            weight,
            bias,
            groups=groups,
            interleave=interleave,
            layout=layout,
            weight_layout=weight_layout,
        )
        channels = weight.shape[0 if weight_layout == "OI" else -1]
        return _with_shape(y, x, {"C": channels}, layout)

    def plain(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        kernel = weight
        if weight_layout == "OI":
            kernel = tf.transpose(tf.reshape(weight, weight.shape[:2]))
        kernel = tf.reshape(kernel, (1, 1, *kernel.shape[-2:]))
        y = tf.nn.conv2d(x, kernel, 1, "VALID", layout)
        return _by_index(_add_bias(y, bias, layout), interleave, layout)

    check = partial(
        kconv.pointwise_conv,
        groups=groups,
        interleave=interleave,
        layout=layout,
        weight_layout=weight_layout,
    )
    return _apply(native, plain, check, x, weight, bias)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    layout: Layout = "NCHW",
    weight_layout: WeightLayout = "OI",
) -> Tensor:
    """Depthwise convolution: each channel with a k x k kernel of its own.

    Example:
        >>> x, weight = tf.ones((2, 9, 9, 4)), tf.ones((3, 3, 4))
        >>> depthwise_conv(x, weight, stride=2, layout="NHWC", weight_layout="IO").shape
        TensorShape([2, 5, 5, 4])

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``; any size may be unknown.
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
        ValueError: an unknown layout or padding.
        TypeError: dtypes other than floating point.
        tf.errors.InvalidArgumentError: shapes, stride or padding that do not fit together, or
            float64 mixed with a narrower dtype.
    """
    _check_layouts(layout, weight_layout)
    borders = _borders(padding)

    def native(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        y = kernels.kconv_depthwise_conv(
            x,
            weight,
            bias,
            stride=stride,
            padding=borders,
            layout=layout,
            weight_layout=weight_layout,
        )
        kernel_size = weight.shape[-1 if weight_layout == "OI" else 0]
        sizes = {}
        for axis, pads in (("H", borders[:2]), ("W", borders[2:])):
            size = None if x.shape.rank is None else x.shape[layout.index(axis)]
            if size is not None and borders:
                size += sum(pads) - kernel_size + 1
            sizes[axis] = None if size is None else -(-size // stride)
        return _with_shape(y, x, sizes, layout)

    def plain(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        kernel = weight
        if weight_layout == "OI":
            kernel = tf.transpose(tf.reshape(weight, (-1, *weight.shape[-2:])), (1, 2, 0))
        kernel = tf.reshape(kernel, (*kernel.shape[:3], 1))
        if any(borders):
            pads = {"N": (0, 0), "C": (0, 0), "H": borders[:2], "W": borders[2:]}
            x = tf.pad(x, [pads[axis] for axis in layout])
        strides = [stride if axis in "HW" else 1 for axis in layout]
        y = tf.nn.depthwise_conv2d(x, kernel, strides, "VALID" if borders else "SAME", layout)
        return _add_bias(y, bias, layout)

    check = partial(
        kconv.depthwise_conv,
        stride=stride,
        padding=padding,
        layout=layout,
        weight_layout=weight_layout,
    )
    return _apply(native, plain, check, x, weight, bias)


def interleave(x: Tensor, step: int, *, layout: Layout = "NCHW") -> Tensor:
    """Channels s, s + step, s + 2 step, ... for s = 0 .. step - 1 in turn (V1).

    Example:
        >>> tf.reshape(interleave(tf.reshape(tf.range(6.0), (1, 6, 1, 1)), 3), -1).numpy()
        array([0., 3., 1., 4., 2., 5.], dtype=float32)

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``.
        step: at least 1; 1 leaves the channels where they are. It need not divide C.
        layout: "NCHW" or "NHWC".

    Returns:
        Like ``x``.

    Raises:
        ValueError: an unknown layout.
        TypeError: a dtype other than floating point.
        tf.errors.InvalidArgumentError: a step below 1, or not four axes.
    """
    return _permute(kernels.kconv_interleave, x, step, layout, inverse=False)


def deinterleave(x: Tensor, step: int, *, layout: Layout = "NCHW") -> Tensor:
    """Undoes :func:`interleave` (and is its gradient).

    Example:
        >>> x = tf.reshape(tf.constant([0.0, 3, 1, 4, 2, 5]), (1, 6, 1, 1))
        >>> tf.reshape(deinterleave(x, 3), -1).numpy()
        array([0., 1., 2., 3., 4., 5.], dtype=float32)

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``.
        step: at least 1; that of the interleave to undo.
        layout: "NCHW" or "NHWC".

    Returns:
        Like ``x``.

    Raises:
        ValueError: an unknown layout.
        TypeError: a dtype other than floating point.
        tf.errors.InvalidArgumentError: a step below 1, or not four axes.
    """
    return _permute(kernels.kconv_deinterleave, x, step, layout, inverse=True)


def _permute(
    kernel: Callable[..., Tensor], x: Tensor, step: int, layout: Layout, *, inverse: bool
) -> Tensor:
    _check_layouts(layout, "OI")
    return _apply(
        lambda x: kernel(x, step=step, layout=layout),
        lambda x: _by_index(x, step, layout, inverse=inverse),
        lambda x: kconv.interleave(x, step, layout=layout),
        x,
    )


def _apply(
    native: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    check: Callable[..., Any],
    *tensors: Tensor | None,
) -> Tensor:
    """Calls the kernel; or what ``jit_compile=True`` can compile, where that will happen.

    Both get tensors of one dtype: float64 or bfloat16 if all are, else float32; but compiled sums
    are never in bfloat16. What the kernel would refuse when it runs, ``check`` refuses now.
    """
    present = [tf.convert_to_tensor(tensor) for tensor in tensors if tensor is not None]
    dtypes = [tensor.dtype for tensor in present]
    for dtype in dtypes:
        if not dtype.is_floating:
            raise TypeError(f"expected a floating-point dtype, got {dtype.name}")
    compute = dtypes[0] if len(set(dtypes)) == 1 else tf.float32
    if compute != tf.float64 and tf.float64 in dtypes:
        names = ", ".join(dtype.name for dtype in dtypes)
        raise _invalid(f"cannot mix the dtypes {names}: cast one of them")
    compiled = inside_xla()
    if compute not in (tf.float32, tf.float64) and (compiled or compute != tf.bfloat16):
        compute = tf.float32
    operands = [tf.cast(tensor, compute) for tensor in present]
    if not compiled:
        return tf.cast(native(*operands), dtypes[0])
    shapes = [tensor.shape for tensor in present]
    if all(shape.rank is not None for shape in shapes):
        # Images of none are enough for the checks, and of some size where it is unknown.
        sizes = [[0, *(size or 8 for size in shapes[0][1:])], *shapes[1:]]
        if all(None not in shape for shape in sizes):
            try:
                check(*(np.empty(shape, np.float32) for shape in sizes))
            except ValueError as error:
                raise _invalid(str(error)) from None
    return tf.cast(plain(*operands), dtypes[0])


def _invalid(message: str) -> Exception:
    """The error that the kernels raise as operations of TensorFlow."""
    return tf.errors.InvalidArgumentError(None, None, message)


def inside_xla() -> bool:
    """Whether TensorFlow is to compile what is called now, as for ``jit_compile=True``."""
    return not tf.executing_eagerly() and in_xla_context()


def _check_layouts(layout: str, weight_layout: str) -> None:
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"layout={layout!r}, expected 'NCHW' or 'NHWC'")
    if weight_layout not in ("OI", "IO"):
        raise ValueError(f"weight_layout={weight_layout!r}, expected 'OI' or 'IO'")


def _borders(padding: Padding) -> list[int]:
    """[top, bottom, left, right]; empty for "same"."""
    match padding:
        case "same":
            return []
        case "valid":
            return [0] * 4
        case int():
            return [padding] * 4
        case ((int(top), int(bottom)), (int(left), int(right))):
            return [top, bottom, left, right]
    raise ValueError(
        f"padding={padding!r}, expected 'same', 'valid', the pixels of every side, or "
        "((top, bottom), (left, right))"
    )


def _with_shape(y: Tensor, x: Tensor, sizes: dict[str, int | None], layout: Layout) -> Tensor:
    """Tells a graph the shape of a result: that of ``x`` with other sizes of these axes."""
    if not tf.executing_eagerly() and x.shape.rank is not None:
        known = dict(zip(layout, x.shape, strict=True))
        y.set_shape([{**known, **sizes}[axis] for axis in layout])
    return y


def _add_bias(y: Tensor, bias: tuple[Tensor, ...], layout: Layout) -> Tensor:
    return tf.nn.bias_add(y, bias[0], layout) if bias else y


def _by_index(x: Tensor, step: int, layout: Layout, *, inverse: bool = False) -> Tensor:
    if step == 1:
        return x
    axis = layout.index("C")
    index = np.array(interleave_order(x.shape[axis], step))
    return tf.gather(x, np.argsort(index) if inverse else index, axis=axis)
