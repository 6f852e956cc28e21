"""Random calls: any geometry in any memory gives the oracle's values, any nonsense a clear error.

The tests take the same examples in every run; `make fuzz` takes many, and others each time.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kconv

from . import reference

Array = np.ndarray
Draw = Callable[[st.SearchStrategy[Any]], Any]

EXAMPLES = int(os.environ.get("KCONV_FUZZ_EXAMPLES", 0))
fuzz = settings(
    max_examples=EXAMPLES or 300,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Few channels and pixels, or more than the kernels' tiles and vectors hold.
COUNTS = st.integers(0, 3)
CHANNELS = st.integers(1, 9) | st.integers(10, 40)
SIDES = st.integers(0, 9) | st.integers(10, 40)
DTYPES = st.sampled_from([np.dtype(name) for name in reference.DTYPES])
LAYOUTS = st.sampled_from(["NCHW", "NHWC"])
WEIGHT_LAYOUTS = st.sampled_from(["OI", "IO"])
FILL = 0xA5  # the bytes around values


def place(draw: Draw, values: Array) -> tuple[Array, Array]:
    """The values somewhere in a larger piece of memory, and that memory.

    Axes lie in any order and are walked with any step; the first value may be misaligned.
    """
    axes = list(range(values.ndim))
    if draw(st.booleans()):  # what the kernels take as it is: C order, or the other layout's
        others = [[0, 2, 3, 1], [0, 3, 1, 2]] if len(axes) == 4 else []
        order, steps, offset = draw(st.sampled_from([axes, *others])), [1] * len(axes), 64
    else:
        order = draw(st.permutations(axes))
        steps = [draw(st.sampled_from([1, -1, 2, -3])) for _ in axes]
        offset = draw(st.sampled_from([64, 65]))
    shape = [values.shape[axis] * abs(steps[axis]) for axis in order]
    end = offset + math.prod(shape) * values.itemsize
    memory = np.full(end + 64, FILL, np.uint8)
    placed = memory[offset:end].view(values.dtype).reshape(shape).transpose(np.argsort(order))
    placed = placed[tuple(slice(None, None, step) for step in steps)]
    placed[...] = values
    return placed, memory


def check(
    draw: Draw, call: Callable[..., Array], arrays: Sequence[Array], expected: Array, **options: Any
) -> None:
    """Calls with arrays placed anywhere: the result is right, and nothing else is written."""
    inputs = [place(draw, array) for array in arrays]
    before = [memory.copy() for _, memory in inputs]
    for array, _ in inputs:
        array.flags.writeable = draw(st.booleans())
    dtype, out = arrays[0].dtype, None
    if "out" in inspect.signature(call).parameters and draw(st.booleans()):
        out, out_memory = place(draw, np.full(expected.shape, np.nan, dtype))
        options["out"] = out
    result = call(*[array for array, _ in inputs], **options)
    assert result.dtype == dtype
    reference.assert_close(result, expected)
    for (_, memory), old in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(memory, old)
    if out is not None:
        assert result is out
        out[...] = np.full(out.itemsize, FILL, np.uint8).view(dtype)[0]
        assert (out_memory == FILL).all()


def images(x: Array, layout: str) -> Array:
    """(N, C, H, W) images in the order of axes of `layout`."""
    return x if layout == "NCHW" else x.transpose(0, 2, 3, 1)


@fuzz
@given(st.data())
def test_pointwise(data: st.DataObject) -> None:
    draw = data.draw
    groups, group_in, group_out = draw(st.integers(1, 7)), draw(CHANNELS), draw(CHANNELS)
    n, h, w, dtype = draw(COUNTS), draw(SIDES), draw(SIDES), draw(DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    c_in, c_out = groups * group_in, groups * group_out
    x = rng.standard_normal((n, c_in, h, w)).astype(dtype)
    weight = rng.standard_normal((c_out, group_in)).astype(dtype)
    bias = rng.standard_normal(c_out).astype(dtype) if draw(st.booleans()) else None
    g = rng.standard_normal((n, c_out, h, w)).astype(dtype)
    step = draw(st.integers(1, c_out + 1))
    kw = {"groups": groups, "interleave": step}
    y = reference.pointwise_conv(x, weight, bias, **kw)
    gx, gw, gb = reference.pointwise_conv_grads(x, weight, g, **kw)

    layout, weight_layout = draw(LAYOUTS), draw(WEIGHT_LAYOUTS)
    x, g, y, gx = (images(a, layout) for a in (x, g, y, gx))
    if weight_layout == "IO":
        weight, gw = weight.T, gw.T
    if draw(st.booleans()):
        weight = weight[None, None] if weight_layout == "IO" else weight[:, :, None, None]
    kw |= {"layout": layout, "weight_layout": weight_layout}
    arrays = (x, weight) if bias is None else (x, weight, bias)
    check(draw, kconv.pointwise_conv, arrays, y, **kw)
    check(draw, kconv.pointwise_conv_grad_input, (g, weight), gx, **kw)
    check(draw, kconv.pointwise_conv_grad_weight, (x, g), gw, **kw)
    check(draw, kconv.pointwise_conv_grad_bias, (g,), gb, interleave=step, layout=layout)


@fuzz
@given(st.data())
def test_interleave(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.tuples(COUNTS, st.integers(0, 40), SIDES, SIDES))
    x = np.random.default_rng(0).standard_normal(shape).astype(draw(DTYPES))
    step, layout = draw(st.integers(1, 50)), draw(LAYOUTS)
    for call, oracle in (
        (kconv.interleave, reference.interleave),
        (kconv.deinterleave, reference.deinterleave),
    ):
        expected = images(oracle(x, step), layout)
        check(draw, call, (images(x, layout),), expected, step=step, layout=layout)


@st.composite
def depthwise_axis(draw: Draw, kernel: int, named: str | None) -> tuple[int, tuple[int, int]]:
    """A size and a padding with which it holds a kernel, or a size of 0."""
    if named:
        pads = (0, 0)
    else:
        pads = draw(st.tuples(st.integers(0, kernel - 1), st.integers(0, kernel - 1)))
    least = 1 if named == "same" else max(1, kernel - sum(pads))
    return draw(st.just(0) | SIDES.map(lambda size: max(size, least))), pads


@fuzz
@given(st.data())
def test_depthwise(data: st.DataObject) -> None:
    draw = data.draw
    kernel, stride = draw(st.sampled_from([3, 5, 7])), draw(st.sampled_from([1, 2]))
    padding: Any = draw(st.sampled_from(["same", "valid", None]))
    (h, vertical), (w, horizontal) = (draw(depthwise_axis(kernel, padding)) for _ in range(2))
    padding = padding or (vertical, horizontal)
    n, c, dtype = draw(COUNTS), draw(CHANNELS), draw(DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.standard_normal((n, c, h, w)).astype(dtype)
    weight = rng.standard_normal((c, kernel, kernel)).astype(dtype)
    bias = rng.standard_normal(c).astype(dtype) if draw(st.booleans()) else None
    kw: dict[str, Any] = {"stride": stride, "padding": padding}
    if h and w:
        y = reference.depthwise_conv(x, weight, bias, **kw)
        g = rng.standard_normal(y.shape).astype(dtype)
        gx, gw = reference.depthwise_conv_grads(x, weight, g, **kw)
    else:  # nothing comes of nothing
        y = g = np.zeros(kconv.depthwise_conv(x, weight, **kw).shape, dtype)
        assert g.size == 0
        gx, gw = np.zeros_like(x), np.zeros_like(weight)

    layout, weight_layout = draw(LAYOUTS), draw(WEIGHT_LAYOUTS)
    x, g, y, gx = (images(a, layout) for a in (x, g, y, gx))
    if weight_layout == "IO":
        weight, gw = weight.transpose(1, 2, 0), gw.transpose(1, 2, 0)
    if draw(st.booleans()):
        weight = weight[..., None] if weight_layout == "IO" else weight[:, None]
    kw |= {"layout": layout, "weight_layout": weight_layout}
    arrays = (x, weight) if bias is None else (x, weight, bias)
    check(draw, kconv.depthwise_conv, arrays, y, **kw)
    check(draw, kconv.depthwise_conv_grad_input, (g, weight), gx, input_size=(h, w), **kw)
    check(draw, kconv.depthwise_conv_grad_weight, (x, g), gw, kernel_size=kernel, **kw)


def valid_calls() -> dict[str, dict[str, Any]]:
    """Each function's name and arguments, all of them given."""
    x, y = np.ones((2, 6, 5, 5), np.float32), np.ones((2, 4, 5, 5), np.float32)
    weight, kernel = np.ones((4, 3), np.float32), np.ones((6, 3, 3), np.float32)
    layout = {"layout": "NCHW"}
    layouts = {**layout, "weight_layout": "OI"}
    pointwise = {"groups": 2, "interleave": 2, **layouts}
    depthwise = {"stride": 1, "padding": 1, **layouts}
    bias = {"bias": np.ones(4, np.float32)}
    biases = {"bias": np.ones(6, np.float32)}
    return {
        "pointwise_conv": {"x": x, "weight": weight, **bias, **pointwise, "out": y.copy()},
        "pointwise_conv_grad_input": {
            "grad_output": y,
            "weight": weight,
            **pointwise,
            "out": x.copy(),
        },
        "pointwise_conv_grad_weight": {
            "x": x,
            "grad_output": y,
            **pointwise,
            "out": weight.copy(),
        },
        "pointwise_conv_grad_bias": {"grad_output": y, "interleave": 2, **layout},
        "interleave": {"x": x, "step": 2, **layout, "out": x.copy()},
        "deinterleave": {"x": x, "step": 2, **layout, "out": x.copy()},
        "depthwise_conv": {"x": x, "weight": kernel, **biases, **depthwise, "out": x.copy()},
        "depthwise_conv_grad_input": {
            "grad_output": x,
            "weight": kernel,
            "input_size": (5, 5),
            **depthwise,
            "out": x.copy(),
        },
        "depthwise_conv_grad_weight": {
            "x": x,
            "grad_output": x.copy(),
            "kernel_size": 3,
            **depthwise,
            "out": kernel.copy(),
        },
    }


INTEGERS = st.integers(-3, 9) | st.builds(
    lambda sign, power, more: sign * 2**power + more,
    st.sampled_from([-1, 1]),
    st.sampled_from([31, 32, 62, 63, 64, 70, 200]),
    st.integers(-3, 3),
)
TEXTS = st.sampled_from(["NCHW", "NHWC", "OI", "IO", "same", "valid", "", "nchw", "\0", "\ud800"])
NONSENSE = st.one_of(
    INTEGERS,
    TEXTS,
    st.none(),
    st.booleans(),
    st.floats(),
    st.binary(max_size=3),
    st.recursive(INTEGERS | TEXTS | st.none(), st.lists, max_leaves=4),
    st.tuples(INTEGERS, INTEGERS),
    st.tuples(st.tuples(INTEGERS, INTEGERS), st.tuples(INTEGERS, INTEGERS)),
    st.sampled_from([object(), int, len, 1j, {}, {"x": 1}, np.int64(2), np.uint64(2**64 - 1)]),
    st.sampled_from([np.float32(1), np.bool_(True), np.array(2), np.array("a"), np.ones((9, 9))]),
)
OTHER_DTYPES = ["f2", "f8", "g", ">f4", ">f8", "i4", "u8", "?", "c8", "O", "S3", "U2", "m8[s]"]
HUGE = 2**25  # squared: more than there are addresses, so that nothing comes of it
WRONG_ARRAYS: list[Callable[[Array], Any]] = [
    lambda a: a[0],
    lambda a: a[None],
    lambda a: a[..., 0],
    lambda a: a[..., :0],
    lambda a: a[:0],
    lambda a: a[:, :1] if a.ndim > 1 else a[:1],
    lambda a: a[1:],
    lambda a: np.repeat(a, 2, 0),
    lambda a: a.T,
    lambda a: a.reshape(-1),
    lambda a: a.tolist(),
    lambda a: a.tobytes(),
    lambda a: memoryview(a),
    lambda a: np.ma.masked_array(a, a > 0),
    lambda a: np.zeros(a.shape, [("a", "f4"), ("b", "f4")]),
    lambda a: np.broadcast_to(np.float32(1), a.shape),
    lambda a: np.broadcast_to(np.float32(1), (HUGE, HUGE, 1, 1)[: max(2, a.ndim)]),
    lambda a: np.broadcast_to(np.float32(1), (1, HUGE, HUGE, 1)[: max(2, a.ndim)]),
    lambda a: np.ones((0, HUGE * HUGE, 1, 1), np.float32),
    lambda a: np.ones((0, a.shape[-1], HUGE, HUGE), np.float32),
    *(lambda a, dtype=dtype: np.zeros(a.shape, dtype) for dtype in OTHER_DTYPES),
]
# What a message may name instead of an argument: what that says.
DERIVED = ["in_channels", "out_channels", "channels", "height", "width", "the result"]


@fuzz
@given(st.data())
def test_nonsense(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(list(valid_calls())))
    arguments = valid_calls()[name]
    names = list(arguments)
    changed = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    for argument in changed:
        value = arguments[argument]
        if isinstance(value, np.ndarray) and draw(st.integers(0, 3)):
            arguments[argument] = draw(st.sampled_from(WRONG_ARRAYS))(value)
        else:
            arguments[argument] = draw(NONSENSE)
    try:
        result = getattr(kconv, name)(**arguments)
    except (TypeError, ValueError, MemoryError) as error:
        message, notes = str(error), getattr(error, "__notes__", [])
    else:
        assert isinstance(result, np.ndarray)
        assert result.dtype in (np.float32, np.float64)
        return
    assert "\n" not in message
    told = " ".join([message, *notes])
    assert re.search(rf"\b({'|'.join(names + DERIVED)})\b", told), told
