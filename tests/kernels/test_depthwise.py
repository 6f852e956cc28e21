"""Depthwise convolution and its gradients against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kconv

from . import reference
from .test_pointwise import channels_last, nan_like, nhwc

# (N, C, H, W): nothing, one pixel, narrower than a kernel, odd, wider than a band of a plane,
# vectors of channels and one more, four images and one more of planes wider than two vectors, many
# channels, several windows of NHWC pixels and pairs of vectors in each direction.
SHAPES = [
    (0, 4, 5, 5),
    (2, 4, 0, 5),
    (2, 33, 1, 1),
    (2, 16, 2, 3),
    (1, 1, 8, 8),
    (2, 5, 7, 9),
    (3, 17, 14, 14),
    (1, 40, 6, 31),
    (1, 2, 112, 110),
    (5, 3, 9, 77),
    (2, 1024, 5, 6),
    (1, 70, 40, 39),
]
PADDINGS = ["same", "valid", 1, ((0, 1), (2, 0))]


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_and_gradients(
    shape: tuple[int, int, int, int], stride: int, kernel: int, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype)
    weight = rng.standard_normal((shape[1], kernel, kernel)).astype(dtype)
    bias = rng.standard_normal(shape[1]).astype(dtype)
    size = shape[2:]
    for padding in PADDINGS:
        pads = reference.depthwise_padding(size, kernel, stride, padding)
        if any(s and s + sum(p) < kernel for s, p in zip(size, pads, strict=True)):
            continue
        kw = {"stride": stride, "padding": padding}
        if 0 in size:
            assert kconv.depthwise_conv(x, weight, **kw).size == 0
            continue
        y = reference.depthwise_conv(x, weight, bias, **kw)
        g = rng.standard_normal(y.shape).astype(dtype)
        gx, gw = reference.depthwise_conv_grads(x, weight, g, **kw)
        for memory in (np.ascontiguousarray, channels_last):
            what = f"padding {padding}, {memory.__name__}"
            out, out_x, out_w = memory(nan_like(g)), memory(nan_like(x)), nan_like(weight)
            assert kconv.depthwise_conv(memory(x), weight, bias, out=out, **kw) is out
            reference.assert_close(out, y, what)
            kconv.depthwise_conv_grad_input(memory(g), weight, size, out=out_x, **kw)
            reference.assert_close(out_x, gx, what)
            kconv.depthwise_conv_grad_weight(memory(x), memory(g), kernel, out=out_w, **kw)
            reference.assert_close(out_w, gw, what)


def test_layouts() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 6, 7)), rng.standard_normal((5, 3, 3))
    y = reference.depthwise_conv(x, weight, stride=2, padding="same")
    g = rng.standard_normal(y.shape)
    gx, gw = reference.depthwise_conv_grads(x, weight, g, stride=2, padding="same")
    io = {"stride": 2, "layout": "NHWC", "weight_layout": "IO"}
    for w in (weight.transpose(1, 2, 0), weight.transpose(1, 2, 0)[..., None]):
        reference.assert_close(kconv.depthwise_conv(nhwc(x), w, **io), nhwc(y))
        got = kconv.depthwise_conv_grad_input(nhwc(g), w, (6, 7), **io)
        reference.assert_close(got, nhwc(gx))
    got = kconv.depthwise_conv_grad_weight(nhwc(x), nhwc(g), 3, **io)
    reference.assert_close(got, gw.transpose(1, 2, 0))
    reference.assert_close(kconv.depthwise_conv(x, weight[:, None], stride=2), y)
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    reference.assert_close(kconv.depthwise_conv(strided, weight, stride=2), y)


def test_nan_stays_where_it_is_seen() -> None:
    x = np.zeros((1, 20, 9, 9), np.float32)
    x[0, :, 0, 0] = np.nan
    for memory in (np.ascontiguousarray, channels_last):
        y = kconv.depthwise_conv(memory(x), np.ones((20, 3, 3), np.float32))
        assert np.isnan(y[0, :, :2, :2]).all()
        assert np.isfinite(y).sum() == y.size - 20 * 4


def linear_calls(
    images: tuple[int, ...], size: tuple[int, int], weight: np.ndarray, **kw: Any
) -> list[tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]]:
    """What takes an image, or the gradient by one, and that one's shape; all else is ones."""
    x, kernel = np.ones(images, weight.dtype), weight.shape[1]
    g = np.ones_like(kconv.depthwise_conv(x, weight, **kw))

    def by_weight(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        return kconv.depthwise_conv_grad_weight(x, g, kernel_size=kernel, **kw)

    return [
        (x.shape, lambda x: kconv.depthwise_conv(x, weight, **kw)),
        (g.shape, lambda g: kconv.depthwise_conv_grad_input(g, weight, input_size=size, **kw)),
        (x.shape, lambda x: by_weight(x, g)),
        (g.shape, lambda g: by_weight(x, g)),
    ]


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_reaches_the_taps_that_see_it(stride: int, layout: str, dtype: str) -> None:
    """NaN makes NaN of the results that a one among zeros makes ones of, and of no others."""
    rng = np.random.default_rng(0)
    for size, kernel, channels in [
        ((1, 1), 3, 2),
        ((5, 4), 5, 3),
        ((9, 33), 3, 1),
        ((8, 9), 7, 17),
    ]:
        images = (2, channels, *size) if layout == "NCHW" else (2, *size, channels)
        weight = np.ones((channels, kernel, kernel), dtype)
        calls = linear_calls(images, size, weight, stride=stride, layout=layout)
        for which, (shape, call) in enumerate(calls):
            for place in rng.integers(0, np.prod(shape), 4):
                one, nan = np.zeros(shape, dtype), np.zeros(shape, dtype)
                one.flat[place], nan.flat[place] = 1, np.nan
                seen, found = call(one) != 0, np.isnan(call(nan))
                np.testing.assert_array_equal(found, seen, f"{size} {kernel} {which} {place}")


def test_finite_differences() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((3, 3, 3))
    kw = {"stride": 2, "padding": ((1, 0), (0, 2))}
    g = rng.standard_normal(kconv.depthwise_conv(x, weight, **kw).shape)
    gx = kconv.depthwise_conv_grad_input(g, weight, (5, 4), **kw)
    gw = kconv.depthwise_conv_grad_weight(x, g, 3, **kw)

    def loss() -> float:
        return float((kconv.depthwise_conv(x, weight, **kw) * g).sum())

    for value, grad in ((x, gx), (weight, gw)):
        for index in np.ndindex(*value.shape):
            old = value[index]
            value[index] = old + 0.5
            above = loss()
            value[index] = old - 0.5
            assert above - loss() == pytest.approx(grad[index], abs=1e-10)
            value[index] = old
