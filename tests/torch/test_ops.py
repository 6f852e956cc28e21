"""The functions against PyTorch's own, their derivatives, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from kconv.ktypes import interleave_index
from kconv.torch import deinterleave, depthwise_conv, interleave, ops, pointwise_conv

LAST = torch.channels_last
FORMATS = [torch.contiguous_format, LAST]


def own_pointwise(x, weight, bias=None, *, groups=1, interleave=1):
    y = F.conv2d(x, weight, bias, groups=groups)
    return y[:, torch.tensor(interleave_index(y.shape[1], interleave), dtype=torch.long)]


def own_depthwise(x, weight, bias=None, *, stride=1, padding="same"):
    top, bottom, left, right = ops.borders(padding, x.shape[2:], weight.shape[2:], stride)
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, bias, stride, groups=x.shape[1])


def tensors(*shapes, dtype=torch.float32, format_=torch.contiguous_format, grad=True):
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=format_)
    return [tensor.requires_grad_(grad) for tensor in made]


def assert_same(kconv, own, inputs, **options):
    """Outputs, their memory format and all gradients."""
    actual, expected = kconv(*inputs, **options), own(*inputs, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if actual.numel():  # nothing has no order
        formats = [f for f in FORMATS if inputs[0].is_contiguous(memory_format=f)]
        assert any(actual.is_contiguous(memory_format=f) for f in formats)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, inputs, grad) for y in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 5])
@pytest.mark.parametrize("size", [(0, 7, 5), (1, 1, 1), (3, 7, 5), (2, 16, 9)])
def test_pointwise(size, groups, interleaved, format_):
    n, h, w = size
    shapes = (n, 7 * groups, h, w), (3 * groups, 7, 1, 1), (3 * groups,)
    assert_same(
        pointwise_conv,
        own_pointwise,
        tensors(*shapes, format_=format_),
        groups=groups,
        interleave=3 if interleaved else 1,
    )


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid", 1, ((0, 2), (1, 0))])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(0, 7, 5), (1, 5, 6), (3, 16, 9)])
def test_depthwise(size, kernel, padding, stride, format_):
    n, h, w = size
    shapes = (n, 11, h, w), (11, 1, kernel, kernel), (11,)
    inputs = tensors(*shapes, format_=format_)
    assert_same(depthwise_conv, own_depthwise, inputs, stride=stride, padding=padding)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("step", [1, 2, 3, 5, 12, 13])
def test_interleave(step, format_):
    (x,) = tensors((2, 12, 3, 5), format_=format_)
    y = interleave(x, step)
    assert torch.equal(y, x[:, interleave_index(12, step)])
    assert y.is_contiguous(memory_format=format_)
    assert torch.equal(deinterleave(y, step), x)
    (gradient,) = torch.autograd.grad(y, x, x)
    assert torch.equal(gradient, deinterleave(x, step))


def test_shorter_shapes():
    x, weight = tensors((6, 4, 5), (4, 3), grad=False)
    expected = own_pointwise(x[None], weight[:, :, None, None], groups=2)[0]
    torch.testing.assert_close(pointwise_conv(x, weight, groups=2), expected)
    kernel = torch.randn(6, 3, 3)
    expected = own_depthwise(x[None], kernel[:, None])[0]
    torch.testing.assert_close(depthwise_conv(x, kernel), expected)
    assert torch.equal(interleave(x, 2), x[[0, 2, 4, 1, 3, 5]])


def test_strided_tensors():
    x, weight, bias = tensors((4, 12, 6, 8), (8, 12), (16,), grad=False)
    x, weight, bias = x[::2, 2:8, :, ::2], weight[:, ::4, None, None], bias[::2]
    expected = own_pointwise(x, weight, bias, groups=2)
    torch.testing.assert_close(pointwise_conv(x, weight, bias, groups=2), expected)
    last = x.contiguous(memory_format=LAST)[:, :4]  # dense in neither format
    y = pointwise_conv(last, weight[:, :2], groups=2)
    assert y.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(y, own_pointwise(last, weight[:, :2], groups=2))


def test_gradients_that_are_not_dense():
    inputs = tensors((2, 6, 4, 5), (4, 3, 1, 1), (4,))
    gradients = [
        torch.autograd.grad(f(*inputs, groups=2, interleave=2).sum(), inputs)
        for f in (pointwise_conv, own_pointwise)
    ]
    torch.testing.assert_close(*gradients)


def test_results_share_no_memory_with_inputs():
    (x,) = tensors((1, 4, 2, 2), grad=False)
    assert interleave(x, 1).data_ptr() != x.data_ptr()


POINTWISE = ((2, 6, 2, 3), (4, 3, 1, 1), (4,)), pointwise_conv, {"groups": 2, "interleave": 2}
DEPTHWISE = ((2, 3, 4, 3), (3, 1, 3, 3), (3,)), depthwise_conv, {"stride": 2}


@pytest.mark.parametrize(("shapes", "function", "options"), [POINTWISE, DEPTHWISE])
def test_derivatives(shapes, function, options):
    inputs = tensors(*shapes, dtype=torch.float64)

    def f(*args):
        return function(*args, **options)

    assert gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


def test_interleave_derivatives():
    inputs = tensors((2, 5, 2, 2), dtype=torch.float64)
    assert gradcheck(lambda x: interleave(x, 2), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda x: deinterleave(x, 2), inputs)


def test_gradients_only_where_they_are_wanted(monkeypatch):
    inputs = tensors((2, 6, 4, 5), (4, 3, 1, 1), (4,))
    x, weight, bias = inputs
    y = pointwise_conv(x.detach(), weight, bias, groups=2)
    assert y.grad_fn.saved_tensors[1] is None  # the weight is for the input's gradient only
    for name in ("pointwise_conv_grad_input", "pointwise_conv_grad_weight"):
        monkeypatch.setattr(ops._kconv, name, None)
    pointwise_conv(x.detach(), weight.detach(), bias, groups=2).sum().backward()
    assert x.grad is weight.grad is None
    assert bias.grad.tolist() == [40.0] * 4
    assert not pointwise_conv(x.detach(), weight.detach(), groups=2).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    inputs = tensors((2, 6, 4, 5), (4, 3, 1, 1), (4,), dtype=torch.float32)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    y = pointwise_conv(*narrow, groups=2)
    assert y.dtype is dtype
    torch.testing.assert_close(y, own_pointwise(*narrow, groups=2), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert all(tensor.grad.dtype is dtype for tensor in narrow)


def test_not_a_number_passes_through():
    x = torch.zeros(1, 2, 2, 2)
    x[0, 0, 0, 0] = float("nan")
    x[0, 1, 1, 1] = float("inf")
    y = pointwise_conv(x, torch.ones(1, 2, 1, 1))
    assert y.flatten().isnan().tolist() == [True, False, False, False]
    assert y.flatten().isinf().tolist() == [False, False, False, True]


def test_weight_that_changed_before_the_backward_pass():
    x, weight = tensors((1, 2, 2, 2), (2, 2, 1, 1))
    y = pointwise_conv(x, weight)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


X, W = torch.zeros(2, 6, 4, 4), torch.zeros(4, 3, 1, 1)
LAST_X = X.permute(0, 2, 3, 1)  # whose shape is (N, H, W, C)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pointwise_conv(X, W), ValueError, "6"),
        (lambda: pointwise_conv(X, W, groups=4), ValueError, "groups"),
        (lambda: pointwise_conv(X, W, groups=0), ValueError, "groups"),
        (lambda: pointwise_conv(X, W, torch.zeros(3), groups=2), ValueError, "bias"),
        (lambda: pointwise_conv(X, W, groups=2, interleave=0), ValueError, "interleave"),
        (lambda: pointwise_conv(X[0, 0], W), ValueError, r"\(4, 4\)"),
        (lambda: pointwise_conv(X.double(), W, groups=2), TypeError, "float32.*float64"),
        (lambda: pointwise_conv(X.int(), W.int(), groups=2), TypeError, "int32"),
        (lambda: depthwise_conv(X, torch.zeros(5, 1, 3, 3)), ValueError, "5"),
        (lambda: depthwise_conv(X, torch.zeros(6, 1, 3, 3), stride=0), ValueError, "stride"),
        (lambda: depthwise_conv(X, torch.zeros(6, 1, 3, 3), padding="full"), ValueError, "full"),
        (lambda: depthwise_conv(X, torch.zeros(6, 1, 3, 5)), ValueError, "3.*5"),
        (lambda: depthwise_conv(X, torch.zeros(3, 1, 3, 3)), ValueError, "C=6$"),
        (
            lambda: pointwise_conv(LAST_X, W, groups=2),
            ValueError,
            r"or permute x to \(N, C, H, W\)$",
        ),
        (lambda: interleave(X, 0), ValueError, "0"),
        (lambda: deinterleave(X, -1), ValueError, "-1"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_view_of_numpy_memory_is_read_in_place():
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)  # N, H, W, C
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    y = pointwise_conv(x, torch.eye(4)[:, :, None, None])
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, x)
