"""The oracle: each kernel as float64 NumPy on (N, C, H, W) arrays, independent of the Rust."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Padding = str | int | tuple[tuple[int, int], tuple[int, int]]

DTYPES = ["float32", "float64", "bfloat16"]
# Largest error allowed: relative to the largest magnitude of the exact result (or 1), as sums have
# another order; and to each value, where that is rounded to fewer bits than the sum has.
TOLERANCE = {
    np.dtype(np.float32): (2e-5, 0.0),
    np.dtype(np.float64): (1e-13, 0.0),
    np.dtype(ml_dtypes.bfloat16): (2e-5, 2.0**-8),
}


def interleaved(channels: int, step: int) -> list[int]:
    """The source channel of each interleaved channel."""
    return [c for s in range(step) for c in range(s, channels, step)]


def interleave(x: Array, step: int) -> Array:
    return x[:, interleaved(x.shape[1], step)]


def deinterleave(x: Array, step: int) -> Array:
    y = np.empty_like(x)
    y[:, interleaved(x.shape[1], step)] = x
    return y


def _grouped(x: Array, groups: int) -> Array:
    n, c, h, w = x.shape
    return x.astype(np.float64).reshape(n, groups, c // groups, h * w)


def pointwise_conv(
    x: Array, weight: Array, bias: Array | None = None, *, groups: int = 1, interleave: int = 1
) -> Array:
    c_out, group_in = weight.shape
    w = weight.astype(np.float64).reshape(groups, c_out // groups, group_in)
    y = np.einsum("goi,ngip->ngop", w, _grouped(x, groups)).reshape(x.shape[0], c_out, *x.shape[2:])
    if bias is not None:
        y += bias.astype(np.float64)[:, None, None]
    return y[:, interleaved(c_out, interleave)]


def pointwise_conv_grads(
    x: Array, weight: Array, grad_output: Array, *, groups: int = 1, interleave: int = 1
) -> tuple[Array, Array, Array]:
    """Gradients by input, weight and bias."""
    c_out, group_in = weight.shape
    grad = deinterleave(grad_output.astype(np.float64), interleave)
    w = weight.astype(np.float64).reshape(groups, c_out // groups, group_in)
    g = _grouped(grad, groups)
    return (
        np.einsum("goi,ngop->ngip", w, g).reshape(x.shape),
        np.einsum("ngop,ngip->goi", g, _grouped(x, groups)).reshape(weight.shape),
        grad.sum((0, 2, 3)),
    )


def _padding(size: int, kernel: int, stride: int, padding: Padding, axis: int) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2
    if isinstance(padding, int):
        return padding, padding
    return padding[axis]  # type: ignore[index, return-value]


def depthwise_padding(
    size: tuple[int, int], kernel: int, stride: int, padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) for a padding by name."""
    vertical, horizontal = (_padding(size[a], kernel, stride, padding, a) for a in (0, 1))
    return vertical, horizontal


def depthwise_conv(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: Padding
) -> Array:
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    kernel = weight.shape[1]
    pads = depthwise_padding(x.shape[2:], kernel, stride, padding)
    padded = np.pad(x, ((0, 0), (0, 0), *pads))
    height, width = ((s - kernel) // stride + 1 for s in padded.shape[2:])
    y = np.zeros((*x.shape[:2], height, width))
    for i in range(kernel):
        for j in range(kernel):
            seen = padded[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            y += weight[:, i, j, None, None] * seen[:, :, :height, :width]
    return y if bias is None else y + bias.astype(np.float64)[:, None, None]


def depthwise_conv_grads(
    x: Array, weight: Array, grad_output: Array, *, stride: int = 1, padding: Padding
) -> tuple[Array, Array]:
    """Gradients by input and weight."""
    x, weight, grad_output = (a.astype(np.float64) for a in (x, weight, grad_output))
    kernel = weight.shape[1]
    pads = depthwise_padding(x.shape[2:], kernel, stride, padding)
    padded = np.pad(x, ((0, 0), (0, 0), *pads))
    height, width = grad_output.shape[2:]
    grad_padded, grad_weight = np.zeros_like(padded), np.zeros(weight.shape)
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            if height and width:
                grad_padded[:, :, rows, columns] += weight[:, i, j, None, None] * grad_output
                grad_weight[:, i, j] = (padded[:, :, rows, columns] * grad_output).sum((0, 2, 3))
    (top, _), (left, _) = pads
    return grad_padded[:, :, top : top + x.shape[2], left : left + x.shape[3]], grad_weight


def assert_close(actual: Array, expected: Array, what: str = "") -> None:
    """Fails unless shapes match and errors stay below the tolerance of the dtype."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {actual.shape}, expected {expected.shape}"
    )
    if actual.size:
        scale = max(1.0, float(np.abs(expected).max()))
        relative, rounding = TOLERANCE[actual.dtype]
        error = np.abs(actual.astype(np.float64) - expected) - rounding * np.abs(expected)
        # "not <=" so that NaN fails.
        assert error.max() <= relative * scale, f"{what}: error {error.max()}, scale {scale}"
