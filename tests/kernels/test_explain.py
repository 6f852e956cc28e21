# ruff: noqa: E501 (a table: one case a line)
"""Candidates for a call, and each algorithm by force against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  NumPy's bfloat16
import numpy as np
import pytest

from kconv import _kconv

from . import reference
from .reference import Array, assert_close

DTYPES = ["float32", "float64", "bfloat16"]
DIRECTIONS = ["forward", "grad_input", "grad_weight"]
# images, height, width, in_channels, out_channels, groups, interleave
POINTWISE = [
    (2, 9, 7, 96, 24, 6, 1),
    (1, 40, 33, 24, 48, 4, 12),
    (2, 5, 5, 30, 10, 10, 2),
    (1, 1, 1, 20, 30, 5, 3),
    (1, 23, 23, 40, 36, 1, 1),
]
# images, height, width, channels, kernel, stride
DEPTHWISE = [(2, 9, 7, 10, 3, 1), (1, 11, 6, 33, 5, 2), (1, 7, 7, 16, 3, 1)]
INTERLEAVE = [(2, 9, 9, 24, 4), (1, 20, 20, 96, 32), (1, 3, 5, 7, 3)]


@pytest.fixture(autouse=True)
def no_force() -> Iterator[None]:
    yield
    _kconv.force_algorithm(None)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype("bfloat16").astype(np.float64)


def by_force(rows: list[Any], call: Callable[[], Array], expected: Array, what: object) -> set[str]:
    """Calls with each algorithm that applies; the names of those."""
    assert sum(row["chosen"] for row in rows) == 1, what
    assert all(row["applies"] == (row["cost"] is not None) for row in rows), what
    names = {row["algorithm"] for row in rows if row["applies"]}
    for name in names:
        _kconv.force_algorithm(name)
        assert_close(call(), expected, f"{name} {what}")
    _kconv.force_algorithm(None)
    return names


def in_layout(x: Array, layout: str, dtype: str) -> Array:
    x = x.transpose(0, 2, 3, 1) if layout == "NHWC" and x.ndim == 4 else x
    return np.ascontiguousarray(x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pointwise(layout: str, dtype: str) -> None:
    seen = set()
    for n, h, w, c_in, c_out, groups, step in POINTWISE:
        x, grad = random(1, n, c_in, h, w), random(2, n, c_out, h, w)
        weight = random(3, c_out, c_in // groups)
        options: Any = {"groups": groups, "interleave": step}
        grads = reference.pointwise_conv_grads(x, weight, grad, **options)
        expected = [reference.pointwise_conv(x, weight, **options), grads[0], grads[1]]
        x_in, grad_in, weight_in = (in_layout(a, layout, dtype) for a in (x, grad, weight))
        calls = [
            lambda x=x_in, w=weight_in, o=options: _kconv.pointwise_conv(x, w, layout=layout, **o),
            lambda g=grad_in, w=weight_in, o=options: _kconv.pointwise_conv_grad_input(g, w, layout=layout, **o),
            lambda x=x_in, g=grad_in, o=options: _kconv.pointwise_conv_grad_weight(x, g, layout=layout, **o),
        ]  # fmt: skip
        for direction, call, result in zip(DIRECTIONS, calls, expected, strict=True):
            problem: Any = (direction, layout, dtype, n, h, w, c_in, c_out, groups, step)
            rows = _kconv.explain("pointwise_conv", *problem)
            seen |= by_force(rows, call, in_layout(result, layout, "float64"), problem)
    assert len(seen) >= 2


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_depthwise(layout: str) -> None:
    for n, h, w, c, kernel, stride in DEPTHWISE:
        x, weight = random(1, n, c, h, w), random(2, c, kernel, kernel)
        grad = random(3, n, c, -(-h // stride), -(-w // stride))
        options: Any = {"stride": stride, "padding": "same"}
        grads = reference.depthwise_conv_grads(x, weight, grad, **options)
        expected = [reference.depthwise_conv(x, weight, **options), *grads]
        x_in, grad_in, weight_in = (in_layout(a, layout, "float32") for a in (x, grad, weight))
        options["layout"] = layout
        calls = [
            lambda x=x_in, w=weight_in, o=options: _kconv.depthwise_conv(x, w, **o),
            lambda g=grad_in, w=weight_in, s=(h, w), o=options: _kconv.depthwise_conv_grad_input(g, w, s, **o),
            lambda x=x_in, g=grad_in, k=kernel, o=options: _kconv.depthwise_conv_grad_weight(x, g, k, **o),
        ]  # fmt: skip
        for direction, call, result in zip(DIRECTIONS, calls, expected, strict=True):
            problem: Any = (direction, layout, "float32", n, h, w, c, c)
            rows = _kconv.explain("depthwise_conv", *problem, kernel=kernel, stride=stride)
            by_force(rows, call, in_layout(result, layout, "float64"), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_interleave(layout: str, dtype: str) -> None:
    for n, h, w, c, step in INTERLEAVE:
        x = random(1, n, c, h, w)
        x_in = in_layout(x, layout, dtype)
        for direction, function, expected in [
            ("forward", _kconv.interleave, reference.interleave(x, step)),
            ("grad_input", _kconv.deinterleave, reference.deinterleave(x, step)),
        ]:
            problem: Any = (direction, layout, dtype, n, h, w, c, c)
            rows = _kconv.explain("interleave", *problem, interleave=step)
            call = lambda f=function, x=x_in, s=step: f(x, s, layout=layout)  # noqa: E731
            by_force(rows, call, in_layout(expected, layout, "float64"), (problem, step))


def test_what_does_not_apply_is_refused() -> None:
    x, weight = np.ones((1, 4, 3, 3), np.float32), np.ones((4, 4), np.float32)
    assert _kconv.force_algorithm("Transposed") is None
    with pytest.raises(
        ValueError, match='algorithm="Transposed" does not apply to this call, expected Rows'
    ):
        _kconv.pointwise_conv(x, weight)
    assert _kconv.pointwise_conv_grad_bias(x).shape == (4,)  # there is no choice
    with pytest.raises(
        ValueError, match=r'algorithm="Fastest", expected one of .*Rows, .*Transposed'
    ):
        _kconv.force_algorithm("Fastest")
    assert _kconv.force_algorithm(None) == "Transposed"
    assert _kconv.pointwise_conv(x, weight).shape == x.shape


GOOD = {
    "operation": "pointwise_conv", "direction": "forward", "layout": "NCHW", "dtype": "float32",
    "images": 1, "height": 2, "width": 2, "in_channels": 4, "out_channels": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"operation": "conv"}, ValueError, 'operation="conv", expected "pointwise_conv"'),
        ({"direction": "backward"}, ValueError, 'direction="backward", expected "forward"'),
        (
            {"operation": "interleave", "direction": "grad_weight"},
            ValueError,
            'expected "forward" or "grad_input"',
        ),
        ({"layout": "CHWN"}, ValueError, 'layout="CHWN"'),
        (
            {"dtype": "float16"},
            ValueError,
            'dtype="float16", expected "float32", "float64" or "bfloat16"',
        ),
        ({"images": 0}, ValueError, "images=0, expected at least 1"),
        ({"height": "2"}, TypeError, "height is str, expected an integer"),
        ({"height": 2**40, "width": 2**40}, ValueError, "expected fewer values"),
        ({"groups": 3}, ValueError, "in_channels=4 is not divisible by groups=3"),
        ({"interleave": 0}, ValueError, "interleave=0, expected at least 1"),
        ({"kernel": 3}, ValueError, "kernel=3, stride=1, expected 1 and 1"),
        (
            {"operation": "depthwise_conv", "kernel": 4},
            ValueError,
            "kernel_size=4, expected 3, 5 or 7",
        ),
        ({"operation": "depthwise_conv", "stride": 3}, ValueError, "stride=3, expected 1 or 2"),
        (
            {"operation": "depthwise_conv", "out_channels": 8},
            ValueError,
            "out_channels=8, expected in_channels=4",
        ),
        (
            {"operation": "depthwise_conv", "groups": 4},
            ValueError,
            "groups=4, interleave=1, expected 1 and 1",
        ),
        ({"threads": 0}, ValueError, "threads=0, expected 1 to 1024"),
    ],
)
def test_bad_questions(bad: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: Any = GOOD | bad
    with pytest.raises(error, match=message):
        _kconv.explain(**arguments)
    assert _kconv.explain(**GOOD)  # type: ignore[arg-type]
