# ruff: noqa: E501 (a table: one case a line)
"""Bad input: one clear error that names the value and what was expected, and no panic."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes  # noqa: F401  NumPy's bfloat16
import numpy as np
import pytest

import kconv

X = np.zeros((2, 6, 5, 5), np.float32)
W = np.zeros((4, 3), np.float32)
G = np.zeros((2, 4, 5, 5), np.float32)
D = np.zeros((6, 3, 3), np.float32)
READ_ONLY = G.copy()
READ_ONLY.flags.writeable = False

CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: kconv.pointwise_conv(X[0], W, groups=2), ValueError, r"x has shape \[6, 5, 5\], expected \(N, C, H, W\)"),
    (lambda: kconv.pointwise_conv(X[0], W, layout="NHWC"), ValueError, r"expected \(N, H, W, C\)"),
    (lambda: kconv.pointwise_conv(X, W, groups=4), ValueError, "in_channels=6 is not divisible by groups=4"),
    (lambda: kconv.pointwise_conv(X, np.zeros((5, 3), "f"), groups=2), ValueError, "out_channels=5 is not divisible by groups=2"),
    (lambda: kconv.pointwise_conv(X, W), ValueError, r"weight has shape \[4, 3\].*C_in/groups=6.*in_channels=6, groups=1"),
    (lambda: kconv.pointwise_conv(X, W[0], groups=2), ValueError, r"weight has shape \[3\], expected \(C_out, C_in/groups\)"),
    (lambda: kconv.pointwise_conv(X, W, groups=0), ValueError, "groups=0, expected at least 1"),
    (lambda: kconv.pointwise_conv(X, W, groups=-2), ValueError, "groups=-2, expected at least 1"),
    (lambda: kconv.pointwise_conv(X, W, groups=2, interleave=0), ValueError, "interleave=0, expected at least 1"),
    (lambda: kconv.pointwise_conv(X, W, np.zeros(3, "f"), groups=2), ValueError, r"bias has shape \[3\], expected \[4\]"),
    (lambda: kconv.pointwise_conv(X, W, groups=2, layout="CHWN"), ValueError, 'layout="CHWN", expected "NCHW" or "NHWC"'),
    (lambda: kconv.pointwise_conv(X, W, groups=2, weight_layout="X"), ValueError, 'weight_layout="X", expected "OI" or "IO"'),
    (lambda: kconv.pointwise_conv(X, W, groups=2, out=X), ValueError, r"out has shape \[2, 6, 5, 5\], expected \[2, 4, 5, 5\]"),
    (lambda: kconv.pointwise_conv(X, W, groups=2, out=READ_ONLY), ValueError, "out is not writable"),
    (lambda: kconv.pointwise_conv(X, W, groups=2, out=G.astype("d")), TypeError, "out is float64, expected float32"),
    (lambda: kconv.pointwise_conv(X.astype("i4"), W), TypeError, "x is an array of int32, expected a NumPy array of float32, float64 or bfloat16"),
    (lambda: kconv.pointwise_conv(X.astype("f2"), W), TypeError, "x is an array of float16"),
    (lambda: kconv.pointwise_conv(X.astype(">f4"), W), TypeError, "x is an array of >f4"),
    (lambda: kconv.pointwise_conv(X.tolist(), W), TypeError, "x is list, expected a NumPy array of float32"),
    (lambda: kconv.pointwise_conv(X, W.astype("d"), groups=2), TypeError, "weight is float64, expected float32"),
    (lambda: kconv.pointwise_conv(X, W.astype("bfloat16"), groups=2), TypeError, "weight is bfloat16, expected float32"),
    (lambda: kconv.pointwise_conv(X.astype("bfloat16"), W, groups=2), TypeError, "weight is float32, expected bfloat16"),
    (lambda: kconv.pointwise_conv(X[:, :0], W), ValueError, "in_channels=0"),
    (lambda: kconv.pointwise_conv(X, W, groups="2"), TypeError, "groups is str, expected an integer"),
    (lambda: kconv.pointwise_conv(X, W, groups=2**70), ValueError, f"groups={2**70}, expected an integer of 64 bits"),
    (lambda: kconv.pointwise_conv_grad_input(G, W, groups=2**62), ValueError, "out_channels=4 is not divisible by groups=4611686018427387904"),
    (lambda: kconv.pointwise_conv(np.zeros((0, 1, 2**30, 2**29), "f"), W[:, :1]), ValueError, r"the result has shape \[0, 4, .*, expected at most"),
    (lambda: kconv.pointwise_conv_grad_bias(np.zeros((0, 2**50, 1, 1), "f")), MemoryError, r"no memory for the result of shape \[1125899906842624\]"),
    (lambda: kconv.interleave(np.broadcast_to(X[:1, :1, :1, :1], (2**25, 2**25, 1, 1)), 2), MemoryError, "no memory for the result"),
    (lambda: kconv.pointwise_conv_grad_bias(np.broadcast_to(X[:1, :1, :1, :1], (2**50, 2, 1, 1))), MemoryError, "no memory for a copy of grad_output"),
    (lambda: kconv.pointwise_conv_grad_input(G, W[:2], groups=2), ValueError, "grad_output has 4 channels, expected 2"),
    (lambda: kconv.pointwise_conv_grad_input(G, W, groups=3), ValueError, "out_channels=4 is not divisible by groups=3"),
    (lambda: kconv.pointwise_conv_grad_weight(X, G[:1], groups=2), ValueError, r"grad_output has shape \[1, 4, 5, 5\], expected \[2, 4, 5, 5\]"),
    (lambda: kconv.pointwise_conv_grad_weight(X, G[0], groups=2), ValueError, r"grad_output has shape \[4, 5, 5\]"),
    (lambda: kconv.pointwise_conv_grad_bias(G[0]), ValueError, r"expected \(N, C, H, W\)"),
    (lambda: kconv.pointwise_conv_grad_bias(G, interleave=-1), ValueError, "interleave=-1, expected at least 1"),
    (lambda: kconv.interleave(X, 0), ValueError, "step=0, expected at least 1"),
    (lambda: kconv.deinterleave(X, -3), ValueError, "step=-3, expected at least 1"),
    (lambda: kconv.depthwise_conv(X, D[:, :2, :2]), ValueError, "kernel_size=2, expected 3, 5 or 7"),
    (lambda: kconv.depthwise_conv(X, D[:, :2]), ValueError, r"weight has shape \[6, 2, 3\], expected \(C, k, k\)"),
    (lambda: kconv.depthwise_conv(X, D[:4]), ValueError, r"weight has shape \[4, 3, 3\].* with C=6"),
    (lambda: kconv.depthwise_conv(X, D, stride=3), ValueError, "stride=3, expected 1 or 2"),
    (lambda: kconv.depthwise_conv(X, D, padding="full"), ValueError, 'padding="full", expected "same", "valid"'),
    (lambda: kconv.depthwise_conv(X, D, padding=-1), ValueError, "padding=-1, expected"),
    (lambda: kconv.depthwise_conv(X, D, padding=3), ValueError, r"padding=\[3, 3\] of the height, expected less than kernel_size=3"),
    (lambda: kconv.depthwise_conv(X[:, :, :2], D, padding="valid"), ValueError, "height=2 .* is smaller than kernel_size=3"),
    (lambda: kconv.depthwise_conv_grad_input(X, D, (11, 9), stride=2), ValueError, r"grad_output .*, expected \[2, 6, 6, 5\]"),
    (lambda: kconv.depthwise_conv_grad_input(X, D, (8, 8)), ValueError, r"grad_output has shape \[2, 6, 5, 5\], expected \[2, 6, 8, 8\]"),
    (lambda: kconv.depthwise_conv_grad_input(X, D, (5, -1)), ValueError, "input_size has -1, expected sizes from 0"),
    (lambda: kconv.depthwise_conv_grad_input(X, D, 5), TypeError, r"input_size is int, expected \(height, width\)"),
    (lambda: kconv.depthwise_conv_grad_weight(X, X, -1), ValueError, "kernel_size=-1, expected 3, 5 or 7"),
    (lambda: kconv.depthwise_conv_grad_weight(X, G, 3), ValueError, r"grad_output has shape \[2, 4, 5, 5\], expected \[2, 6, 5, 5\]"),
    (lambda: kconv.set_num_threads(0), ValueError, "num_threads=0, expected 1 to 1024"),
    (lambda: kconv.set_num_threads(2**70), ValueError, f"threads={2**70}, expected an integer of 64 bits"),
    (lambda: kconv.set_num_threads(-1), ValueError, "num_threads=-1, expected 1 to 1024"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_error(case: int) -> None:
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "panic" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ", or " not in str(caught.value)  # no layout helps these


L = np.zeros((2, 5, 7, 6), np.float32)  # images as (N, H, W, C)
LAYOUTS: list[tuple[Callable[[], object], str]] = [
    (lambda: kconv.pointwise_conv(L, W, groups=2), 'in_channels=5 is not divisible by groups=2, or pass layout="NHWC"'),
    (lambda: kconv.pointwise_conv(X, W, groups=2, layout="NHWC"), 'groups=2, or pass layout="NCHW"'),
    (lambda: kconv.pointwise_conv(X, W.T.copy(), groups=2), 'groups=2, or pass weight_layout="IO"'),
    (lambda: kconv.pointwise_conv(X, W, groups=2, weight_layout="IO"), 'or pass weight_layout="OI"'),
    (lambda: kconv.pointwise_conv(L, W.T.copy(), groups=2), 'or pass layout="NHWC", weight_layout="IO"'),
    (lambda: kconv.pointwise_conv_grad_input(L[..., :4], W, groups=2), 'expected 4 as .*, or pass layout="NHWC"'),
    (lambda: kconv.depthwise_conv(L, D), r' with C=5, or pass layout="NHWC"'),
    (lambda: kconv.depthwise_conv(X, D.transpose(1, 2, 0).copy()), ' with C=6, or pass weight_layout="IO"'),
    (lambda: kconv.depthwise_conv_grad_input(L, D, (5, 7)), 'or pass layout="NHWC"'),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(LAYOUTS)))
def test_error_names_the_layout_that_fits(case: int) -> None:
    call, message = LAYOUTS[case]
    with pytest.raises(ValueError, match=message):
        call()
