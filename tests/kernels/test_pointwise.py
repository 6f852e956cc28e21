"""Pointwise convolution and interleave against the oracle: sizes, groups, orders of memory."""

from __future__ import annotations

import numpy as np
import pytest

import kconv

from . import reference

# (N, C_in, C_out, groups, H, W): nothing, one pixel, around the edges of the register tiles (8
# rows, vectors of 4, 8, 16) and of the transposed tiles (32 and 96 pixels), odd groups, one image,
# many channels, short planes of several images, many pixels.
SHAPES = [
    (0, 8, 8, 2, 3, 3),
    (2, 8, 8, 2, 0, 3),
    (1, 1, 1, 1, 1, 1),
    (1, 8, 8, 1, 1, 1),
    (3, 10, 15, 5, 1, 1),
    (70, 6, 4, 2, 1, 1),
    (1, 3, 9, 3, 1, 2),
    (2, 6, 4, 2, 5, 5),
    (1, 14, 14, 2, 3, 5),
    (1, 18, 27, 3, 4, 4),
    (2, 17, 7, 1, 1, 17),
    (1, 5, 35, 5, 7, 7),
    (1, 9, 8, 1, 1, 31),
    (1, 9, 8, 1, 1, 33),
    (1, 8, 9, 1, 1, 48),
    (1, 16, 17, 1, 7, 7),
    (2, 30, 7, 1, 5, 19),
    (1, 16, 6, 2, 1, 97),
    (3, 144, 24, 8, 6, 6),
    (2, 64, 48, 16, 9, 7),
    (1, 72, 75, 3, 16, 16),
    (2, 24, 96, 1, 13, 20),
    (1, 130, 66, 2, 5, 4),
    (11, 32, 34, 2, 7, 7),
    (1, 6, 6, 2, 40, 40),
    (1, 24, 144, 6, 33, 32),
    (2, 144, 24, 8, 23, 23),
]


def arrays(shape: tuple[int, ...], dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    n, c_in, c_out, groups, h, w = shape
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((n, c_in, h, w)).astype(dtype),
        "weight": rng.standard_normal((c_out, c_in // groups)).astype(dtype),
        "bias": rng.standard_normal(c_out).astype(dtype),
        "grad_output": rng.standard_normal((n, c_out, h, w)).astype(dtype),
    }


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def channels_last(x: np.ndarray) -> np.ndarray:
    """The same (N, C, H, W) array in NHWC memory."""
    return nhwc(x).transpose(0, 3, 1, 2)


def nan_like(x: np.ndarray) -> np.ndarray:
    return np.full_like(x, np.nan, subok=False)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_and_gradients(shape: tuple[int, ...], dtype: str) -> None:
    a = arrays(shape, dtype)
    c_out, groups = shape[2], shape[3]
    for step in sorted({1, 3, c_out // groups, c_out + 1}):
        kw = {"groups": groups, "interleave": step}
        y = reference.pointwise_conv(a["x"], a["weight"], a["bias"], **kw)
        gx, gw, gb = reference.pointwise_conv_grads(a["x"], a["weight"], a["grad_output"], **kw)
        for memory in (np.ascontiguousarray, channels_last):
            x, g = memory(a["x"]), memory(a["grad_output"])
            what = f"step {step}, {memory.__name__}"
            out, out_x = memory(nan_like(g)), memory(nan_like(x))
            out_w = nan_like(a["weight"])
            reference.assert_close(kconv.pointwise_conv(x, a["weight"], a["bias"], **kw), y, what)
            assert kconv.pointwise_conv(x, a["weight"], a["bias"], out=out, **kw) is out
            reference.assert_close(out, y, what)
            kconv.pointwise_conv_grad_input(g, a["weight"], out=out_x, **kw)
            reference.assert_close(out_x, gx, what)
            kconv.pointwise_conv_grad_weight(x, g, out=out_w, **kw)
            reference.assert_close(out_w, gw, what)
            gradient = kconv.pointwise_conv_grad_bias(g, interleave=step)
            reference.assert_close(gradient, gb, what)


@pytest.mark.parametrize("shape", [(2, 6, 4, 2, 5, 5), (1, 18, 27, 3, 4, 4)], ids=str)
def test_layouts(shape: tuple[int, ...]) -> None:
    a = arrays(shape, "float32")
    kw = {"groups": shape[3], "interleave": 2}
    io = {"layout": "NHWC", "weight_layout": "IO", **kw}
    weight, transposed = a["weight"], np.ascontiguousarray(a["weight"].T)
    x, g = nhwc(a["x"]), nhwc(a["grad_output"])
    y = nhwc(reference.pointwise_conv(a["x"], weight, **kw))
    gx, gw, gb = reference.pointwise_conv_grads(a["x"], weight, a["grad_output"], **kw)
    for w in (transposed, transposed[None, None], weight.T):
        reference.assert_close(kconv.pointwise_conv(x, w, **io), y)
        reference.assert_close(kconv.pointwise_conv_grad_input(g, w, **io), nhwc(gx))
    reference.assert_close(kconv.pointwise_conv_grad_weight(x, g, **io), gw.T)
    reference.assert_close(kconv.pointwise_conv_grad_bias(g, interleave=2, layout="NHWC"), gb)
    oi = kconv.pointwise_conv(a["x"], weight[:, :, None, None], **kw)
    reference.assert_close(nhwc(oi), y)


def test_memory_order_is_kept_and_nothing_is_copied_back() -> None:
    a = arrays((2, 6, 4, 2, 5, 5), "float32")
    y = kconv.pointwise_conv(channels_last(a["x"]), a["weight"], groups=2)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    assert kconv.pointwise_conv(a["x"], a["weight"], groups=2).flags.c_contiguous


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_any_strides(dtype: str) -> None:
    a = arrays((4, 12, 8, 4, 10, 6), dtype)
    kw = {"groups": 2, "interleave": 3}
    views = [
        (lambda x: x[::2, ::2, ::-1, 1:4], "slices"),
        (lambda x: np.broadcast_to(x[:1, ::2, :1, :1], (2, x.shape[1] // 2, 3, 2)), "stride 0"),
        (lambda x: x[:, ::2].transpose(0, 1, 3, 2), "transposed"),
    ]
    weight = np.asfortranarray(a["weight"][:4])
    for view, what in views:
        x, g = view(a["x"]), view(a["grad_output"])
        y = kconv.pointwise_conv(x, weight[:, :3], **kw)
        reference.assert_close(y, reference.pointwise_conv(x, weight[:, :3], **kw), what)
        gx, gw, gb = reference.pointwise_conv_grads(x, weight[:, :3], g, **kw)
        got = kconv.pointwise_conv_grad_input(g, weight[:, :3], **kw)
        reference.assert_close(got, gx, what)
        reference.assert_close(kconv.pointwise_conv_grad_weight(x, g, **kw), gw, what)
        reference.assert_close(kconv.pointwise_conv_grad_bias(g, interleave=3), gb, what)
        out = np.full((*g.shape, 2), np.nan, dtype)[..., 0]  # strided
        kconv.pointwise_conv(x, weight[:, :3], out=out, **kw)
        reference.assert_close(out, reference.pointwise_conv(x, weight[:, :3], **kw), what)


def test_unaligned_memory() -> None:
    raw = np.zeros(4 * 2 * 3 * 3 + 1, np.uint8)
    x = raw[1:].view(np.float32).reshape(1, 2, 3, 3)
    x[...] = np.arange(18).reshape(x.shape)
    assert not x.flags.aligned
    weight = np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(kconv.pointwise_conv(x, weight), x)
    kconv.pointwise_conv(x.copy(), 2 * weight, out=x)
    np.testing.assert_array_equal(x.ravel(), 2 * np.arange(18))


def test_out_may_be_an_input() -> None:
    a = arrays((2, 8, 8, 2, 5, 5), "float32")
    y = reference.pointwise_conv(a["x"], a["weight"], groups=2, interleave=4)
    x = a["x"].copy()
    kconv.pointwise_conv(x, a["weight"], groups=2, interleave=4, out=x)
    reference.assert_close(x, y)


def test_nan_and_infinity_pass_through() -> None:
    x = np.zeros((1, 2, 1, 40), np.float32)
    x[0, 0, 0, 3], x[0, 0, 0, 39], x[0, 1, 0, 20] = np.nan, np.inf, -np.inf
    y = kconv.pointwise_conv(x, np.ones((2, 1), np.float32), groups=2)
    np.testing.assert_array_equal(y, x)


def test_bfloat16_is_rounded_once() -> None:
    """A product of two has 16 bits; these are rounded to 8, ties to even, as ml_dtypes rounds.

    AVX512-BF16, where it is there, takes numbers too small to be normal, and gives them, as zero.
    """
    small = np.finfo(np.float32).tiny if "avx512" in kconv.build_info()["isa"] else 0.0
    bits = np.arange(0, 1 << 16, 7, np.uint16)  # of every exponent, NaN and infinity among them
    x = bits.view("bfloat16").reshape(1, 1, 1, -1)
    for factor in (1.0, 1.0078125, -0.3359375, 3.0):
        weight = np.full((1, 1), factor, "bfloat16")
        with np.errstate(invalid="ignore", over="ignore"):
            exact = (x.astype(np.float32) * weight.astype(np.float32)).astype("bfloat16")
            tiny = (abs(x.astype(float)) < small) | (abs(exact.astype(float)) < small)
        y, exact = kconv.pointwise_conv(x, weight).astype(float), exact.astype(float)
        np.testing.assert_array_equal(y[~tiny], exact[~tiny])
        assert ((abs(y) <= small) | (y == exact))[tiny].all()


def test_bfloat16_is_summed_in_float32() -> None:
    x = np.ones((3, 2, 100, 100), "bfloat16")  # 256 + 1 is 256 in bfloat16
    for memory in (np.ascontiguousarray, channels_last):
        assert kconv.pointwise_conv_grad_bias(memory(x)).tolist() == [29952.0, 29952.0]
        weight = kconv.pointwise_conv_grad_weight(memory(x), memory(x))
        assert (weight.astype(float) == 29952).all()
        weight = kconv.depthwise_conv_grad_weight(memory(x), memory(x), 3)
        assert weight[:, 1, 1].tolist() == [29952.0, 29952.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_differences(dtype: str) -> None:
    """The gradients are those of the forward function itself, which is linear in each argument."""
    a = {k: v.astype("float64") for k, v in arrays((2, 6, 9, 3, 3, 4), "float64").items()}
    kw = {"groups": 3, "interleave": 2}

    def loss(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> float:
        return float((kconv.pointwise_conv(x, w, b, **kw) * a["grad_output"]).sum())

    values = [a["x"], a["weight"], a["bias"]]
    grads = [
        kconv.pointwise_conv_grad_input(a["grad_output"], a["weight"], **kw),
        kconv.pointwise_conv_grad_weight(a["x"], a["grad_output"], **kw),
        kconv.pointwise_conv_grad_bias(a["grad_output"], interleave=2),
    ]
    for i, (value, grad) in enumerate(zip(values, grads, strict=True)):
        for index in np.ndindex(*value.shape):
            plus, minus = [v.copy() for v in values], [v.copy() for v in values]
            plus[i][index] += 0.5
            minus[i][index] -= 0.5
            assert loss(*plus) - loss(*minus) == pytest.approx(grad[index], abs=1e-10)


@pytest.mark.parametrize("channels", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("step", [1, 2, 3, 8, 40])
def test_interleave(channels: int, step: int) -> None:
    rng = np.random.default_rng(0)
    for dtype in reference.DTYPES:
        x = rng.standard_normal((2, channels, 3, 5)).astype(dtype)
        for memory in (np.ascontiguousarray, channels_last, lambda v: v[:, :, ::-1]):
            expected = reference.interleave(memory(x), step)
            y = kconv.interleave(memory(x), step)
            np.testing.assert_array_equal(y, expected)
            np.testing.assert_array_equal(kconv.deinterleave(y, step), memory(x))
            last = kconv.interleave(nhwc(memory(x)), step, layout="NHWC", out=nan_like(nhwc(x)))
            np.testing.assert_array_equal(last, nhwc(expected))


def test_threads_do_not_change_the_weight_gradient() -> None:
    a = arrays((8, 48, 32, 4, 24, 24), "float32")
    before = kconv.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            kconv.set_num_threads(threads)
            results.append(kconv.pointwise_conv_grad_weight(a["x"], a["grad_output"], groups=4))
    finally:
        kconv.set_num_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_threads_do_not_change_the_bias_gradient(layout: str) -> None:
    g = np.random.default_rng(0).standard_normal((4, 40, 61, 40)).astype(np.float32)
    before = kconv.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        kconv.set_num_threads(threads)
        results.append(kconv.pointwise_conv_grad_bias(g, interleave=3, layout=layout))
    kconv.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
