"""kconv's kernels as PyTorch functions, differentiable any number of times.

Images are (N, C, H, W) tensors, contiguous or channels_last; results keep the input's memory
format. The operators behind the functions are registered as ``torch.ops.kconv.*``, so that
``torch.compile``, ``torch.export``, autocast and the transforms of ``torch.func`` know them. They
run on dense CPU tensors; for other devices, layouts and subclasses the functions use PyTorch's own
operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kconv import _kconv
from kconv._geometry import interleave_order, same_padding
from kconv.torch._dispatch import KernelOp
from kconv.torch._private import from_dlpack, to_dlpack, tracing_state
from kconv.torch._scriptable import interleave_by_index

__all__ = [
    "Padding",
    "conv2d",
    "deinterleave",
    "depthwise_conv",
    "interleave",
    "pointwise_conv",
]

Padding = int | Literal["same", "valid"] | tuple[tuple[int, int], tuple[int, int]]
"""Pixels at each border, TensorFlow's "same", none ("valid"), or ((top, bottom), (left, right))."""


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, interleave: int = 1
) -> Tensor:
    """Grouped pointwise (1x1) convolution, its output interleaved.

    Example:
        >>> x, weight = torch.randn(2, 32, 7, 5), torch.randn(24, 8, 1, 1)
        >>> pointwise_conv(x, weight, groups=4, interleave=6).shape
        torch.Size([2, 24, 7, 5])

    Args:
        x: (N, C_in, H, W), or (C_in, H, W).
        weight: (C_out, C_in / groups, 1, 1), or (C_out, C_in / groups).
        bias: (C_out,) or None; added before the interleave.
        groups: number of groups; divides C_in and C_out.
        interleave: step by which the output's channels are interleaved; 1 leaves them.

    Returns:
        (N, C_out, H, W), or (C_out, H, W).

    Raises:
        TypeError: if the tensors' dtypes differ or are not floating.
        ValueError: if the shapes do not fit.
    """
    if x.dim() != 4:
        return pointwise_conv(_batch_of_one(x), weight, bias, groups=groups, interleave=interleave)[
            0
        ]
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    return _pointwise(x, weight, bias, groups, interleave)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    interleave: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d``, by the kernels where they compute it, else by itself.

    Example:
        >>> x, weight = torch.randn(2, 6, 9, 9), torch.randn(6, 1, 3, 3)
        >>> conv2d(x, weight, stride=2, padding=1, groups=6).shape  # by the depthwise kernel
        torch.Size([2, 6, 5, 5])
        >>> conv2d(x, weight, dilation=2, groups=6).shape  # by PyTorch's
        torch.Size([2, 6, 5, 5])

    Args:
        x: (N, C_in, H, W), or (C_in, H, W).
        weight: (C_out, C_in / groups, k, k).
        bias: (C_out,) or None; added before the interleave.
        stride: as PyTorch's.
        padding: as PyTorch's, or ((top, bottom), (left, right)).
        dilation: as PyTorch's.
        groups: number of groups; divides C_in and C_out.
        interleave: step by which the output's channels are interleaved; 1 leaves them.

    Returns:
        (N, C_out, H_out, W_out), or (C_out, H_out, W_out).

    Raises:
        RuntimeError: PyTorch's, for dtypes and arguments that it does not take.
        NotImplementedError: if a tensor is quantized.
        ValueError: if the shapes do not fit.
    """
    if x.dtype in _FLOATING and weight.dim() == 4:
        channels, inputs, height, width = _sizes(weight)
        try:
            if height == width == 1:
                if (
                    (stride == _ONES or _in_both_directions(stride) == 1)
                    and (padding == _ZEROS or _is_unpadded(padding))
                    and (dilation == _ONES or _in_both_directions(dilation) >= 1)
                ):
                    if x.dim() == 4:
                        return _pointwise(x, weight, bias, groups, interleave)
                    return pointwise_conv(x, weight, bias, groups=groups, interleave=interleave)
            elif (
                height == width
                and height in (3, 5, 7)
                and groups == channels
                and inputs == 1
                and (dilation == _ONES or _in_both_directions(dilation) == 1)
                and (step := _in_both_directions(stride)) in (1, 2)
                and (pads := _pads(padding, height, step)) is not None
                and interleave == 1
            ):
                if x.dim() == 4:
                    return _depthwise(x, weight, bias, step, pads)
                return _depthwise(_batch_of_one(x), weight, bias, step, pads)[0]
        except TypeError:  # dtypes that differ, of which PyTorch says what it thinks
            pass
    if x.is_quantized:
        raise NotImplementedError(
            "a convolution of kconv's got a quantized tensor, which its kernels do not compute: "
            "call kconv.torch.restore(model) or kconv.torch.to_native(model) before quantization"
        )
    if not isinstance(padding, str | int) and any(isinstance(n, tuple) for n in padding):
        (top, bottom), (left, right) = padding
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return interleave_by_index(y, interleave)


_ONES, _ZEROS = (1, 1), (0, 0)
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _is_unpadded(padding: Any) -> bool:
    return padding in ("valid", "same") or _in_both_directions(padding) == 0


def _sizes(weight: Tensor) -> Sequence[int]:
    """A weight's shape in numbers."""
    if not tracing_state():
        return weight.shape
    with warnings.catch_warnings():  # that these are tensors to torch.jit, and become constants
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return [int(size) for size in weight.shape]


def _in_both_directions(number: Any) -> int:
    """The whole number that holds vertically and horizontally, -1 where there is none."""
    if type(number) is int:
        return number
    if isinstance(number, (tuple, list)) and len(number) in (1, 2) and number[0] == number[-1]:
        return number[0] if type(number[0]) is int else -1
    return -1


def _pads(padding: Any, kernel: int, stride: int) -> tuple[int, int, int, int] | None:
    """PyTorch's padding, or asymmetric one, as (top, bottom, left, right).

    None for what PyTorch does not take, or does in a way of its own.
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        half = kernel // 2
        return (half, half, half, half) if stride == 1 else None
    both = padding if isinstance(padding, (tuple, list)) else (padding, padding)
    if len(both) != 2:
        return None
    vertical, horizontal = both
    if type(vertical) is int and type(horizontal) is int:
        pads = vertical, vertical, horizontal, horizontal
    else:
        pads = (*vertical, *horizontal)
    return pads if min(pads) >= 0 else None


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
) -> Tensor:
    """Depthwise convolution: each channel with a k x k kernel of its own.

    Example:
        >>> x, weight = torch.randn(2, 6, 9, 9), torch.randn(6, 1, 3, 3)
        >>> depthwise_conv(x, weight, stride=2).shape
        torch.Size([2, 6, 5, 5])

    Args:
        x: (N, C, H, W), or (C, H, W).
        weight: (C, 1, k, k), or (C, k, k), with k 3, 5 or 7.
        bias: (C,) or None.
        stride: 1 or 2.
        padding: "same" (TensorFlow's: ceil(size / stride) outputs, an odd pixel of padding at the
            bottom and right), "valid" (none), an integer, or ((top, bottom), (left, right)); each
            less than k.

    Returns:
        (N, C, H_out, W_out), or (C, H_out, W_out).

    Raises:
        TypeError: if the tensors' dtypes differ or are not floating.
        ValueError: if the shapes do not fit or the padding is unknown.
    """
    if x.dim() != 4:
        return depthwise_conv(_batch_of_one(x), weight, bias, stride=stride, padding=padding)[0]
    if weight.dim() == 3:
        weight = weight[:, None]
    return _depthwise(
        x, weight, bias, stride, borders(padding, x.shape[2:], weight.shape[2:], stride)
    )


def interleave(x: Tensor, step: int) -> Tensor:
    """Channels s, s + step, s + 2 step, ... for s = 0 .. step - 1 in turn (V1).

    The output's channels are 0, step, 2 step, ..., 1, 1 + step, ... (section 3 of V1,
    MENDEL 28(1), 2022). It is a permutation for every number of channels.

    Example:
        >>> interleave(torch.arange(6.0).reshape(1, 6, 1, 1), 2).flatten()
        tensor([0., 2., 4., 1., 3., 5.])

    Args:
        x: (N, C, H, W), or (C, H, W).
        step: at least 1; 1 leaves the channels where they are.

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: if the step is below 1.
    """
    return _permute(x, step, _interleave)


def deinterleave(x: Tensor, step: int) -> Tensor:
    """Undoes :func:`interleave` (and is its gradient).

    Example:
        >>> deinterleave(torch.tensor([0.0, 2, 4, 1, 3, 5]).reshape(1, 6, 1, 1), 2).flatten()
        tensor([0., 1., 2., 3., 4., 5.])

    Args:
        x: (N, C, H, W), or (C, H, W).
        step: at least 1; that of the interleave to undo.

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: if the step is below 1.
    """
    return _permute(x, step, _deinterleave)


def _permute(x: Tensor, step: int, op: KernelOp) -> Tensor:
    if x.dim() != 4:
        return _permute(_batch_of_one(x), step, op)[0]
    return op(x, step)


def _batch_of_one(x: Tensor) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"x must be (N, C, H, W) or (C, H, W), got shape {tuple(x.shape)}")
    return x[None]


def borders(
    padding: Padding, size: Sequence[int], kernel: Sequence[int], stride: int
) -> tuple[int, int, int, int]:
    """The padded pixels (top, bottom, left, right)."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    match padding:
        case "valid":
            return 0, 0, 0, 0
        case int():
            return padding, padding, padding, padding
        case "same":
            if tracing_state():  # of torch.jit, where sizes are tensors
                size, kernel = [int(n) for n in size], [int(k) for k in kernel]
            rows, columns = (same_padding(n, k, stride) for n, k in zip(size, kernel, strict=True))
            return *rows, *columns
        case ((top, bottom), (left, right)):
            return top, bottom, left, right
    raise ValueError(
        f"padding must be an integer, 'same', 'valid' or ((top, bottom), (left, right)), "
        f"got {padding!r}"
    )


# The kernels behind the operators: tensors in, tensors out, without autograd. They go in and come
# out as DLPack capsules: these take PyTorch 2 us a call, NumPy arrays 5 us. The memory of results
# is kconv's, which it recycles.


def _image(x: Tensor) -> Any:
    """An image's capsule; one that is dense in neither memory format is copied."""
    if x.is_contiguous():
        return to_dlpack(x)
    return to_dlpack(x.contiguous(memory_format=memory_format_of(x)))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """An image's memory format, or the one it resembles."""
    last = not x.is_contiguous() and x.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


def _weight(x: Tensor | None) -> Any:
    """The capsule of a weight or a bias."""
    return None if x is None else to_dlpack(x.contiguous())


def _pointwise_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, interleave: int
) -> Tensor:
    y = _kconv.pointwise_conv(
        _image(x), _weight(weight), _weight(bias), groups=groups, interleave=interleave
    )
    return from_dlpack(y)


def _pointwise_grad_input_kernel(
    grad: Tensor, weight: Tensor, groups: int, interleave: int
) -> Tensor:
    dx = _kconv.pointwise_conv_grad_input(
        _image(grad), _weight(weight), groups=groups, interleave=interleave
    )
    return from_dlpack(dx)


def _pointwise_grad_weight_kernel(x: Tensor, grad: Tensor, groups: int, interleave: int) -> Tensor:
    dw = _kconv.pointwise_conv_grad_weight(
        _image(x), _image(grad), groups=groups, interleave=interleave
    )
    return from_dlpack(dw).unsqueeze(2).unsqueeze(3)


def _depthwise_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int]
) -> Tensor:
    y = _kconv.depthwise_conv(
        _image(x), _weight(weight), _weight(bias), stride=stride, padding=_pairs(padding)
    )
    return from_dlpack(y)


def _depthwise_grad_input_kernel(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: int, padding: Sequence[int]
) -> Tensor:
    height, width = input_size
    dx = _kconv.depthwise_conv_grad_input(
        _image(grad), _weight(weight), (height, width), stride=stride, padding=_pairs(padding)
    )
    return from_dlpack(dx)


def _depthwise_grad_weight_kernel(
    x: Tensor, grad: Tensor, kernel_size: int, stride: int, padding: Sequence[int]
) -> Tensor:
    dw = _kconv.depthwise_conv_grad_weight(
        _image(x), _image(grad), kernel_size, stride=stride, padding=_pairs(padding)
    )
    return from_dlpack(dw).unsqueeze(1)


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    top, bottom, left, right = padding
    return (top, bottom), (left, right)


def _interleave_kernel(x: Tensor, step: int) -> Tensor:
    return from_dlpack(_kconv.interleave(_image(x), step))


def _deinterleave_kernel(x: Tensor, step: int) -> Tensor:
    return from_dlpack(_kconv.deinterleave(_image(x), step))


# The same by PyTorch's own operators, for tensors that the kernels do not know.


def _pointwise_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, interleave: int
) -> Tensor:
    return interleave_by_index(F.conv2d(x, weight, bias, groups=groups), interleave)


def _depthwise_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int]
) -> Tensor:
    top, bottom, left, right = padding
    groups = weight.shape[0]
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, stride, (top, left), groups=groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, groups=groups)


def _interleave_native(x: Tensor, step: int) -> Tensor:
    return x.index_select(1, _order(x.shape[1], step, x.device))


def _deinterleave_native(x: Tensor, step: int) -> Tensor:
    return x.index_select(1, _order(x.shape[1], step, x.device).argsort())


def _order(channels: int, step: int, device: torch.device) -> Tensor:
    """(channels,): the channel that each one of the interleaved tensor comes from."""
    return torch.tensor(interleave_order(channels, step), device=device)


# Their shapes, for tensors without data.


def _empty_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An image in x's memory format."""
    shape = (x.shape[0], channels, height, width)
    format_ = memory_format_of(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_)


def _pointwise_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1, interleave: int = 1
) -> Tensor:
    torch._check_value(
        x.dim() == 4 and x.shape[1] == weight.shape[1] * groups,
        lambda: f"x must have {weight.shape[1] * groups} channels, got shape {tuple(x.shape)}",
    )
    return _empty_like(x, weight.shape[0], x.shape[2], x.shape[3])


def _pointwise_grad_input_fake(
    grad: Tensor, weight: Tensor, groups: int = 1, interleave: int = 1
) -> Tensor:
    return _empty_like(grad, weight.shape[1] * groups, grad.shape[2], grad.shape[3])


def _pointwise_grad_weight_fake(
    x: Tensor, grad: Tensor, groups: int = 1, interleave: int = 1
) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1] // groups, 1, 1))


def _depthwise_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int]
) -> Tensor:
    torch._check_value(
        x.dim() == 4 and x.shape[1] == weight.shape[0],
        lambda: f"x must have {weight.shape[0]} channels, got shape {tuple(x.shape)}",
    )
    top, bottom, left, right = padding
    height = (x.shape[2] + top + bottom - weight.shape[2]) // stride + 1
    width = (x.shape[3] + left + right - weight.shape[3]) // stride + 1
    return _empty_like(x, x.shape[1], height, width)


def _depthwise_grad_input_fake(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: int, padding: Sequence[int]
) -> Tensor:
    return _empty_like(grad, grad.shape[1], *input_size)


def _depthwise_grad_weight_fake(
    x: Tensor, grad: Tensor, kernel_size: int, stride: int, padding: Sequence[int]
) -> Tensor:
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size))


def _permutation_fake(x: Tensor, step: int) -> Tensor:
    return _empty_like(x, *x.shape[1:])


# The operators.


class _PointwiseOp(KernelOp):
    """A pointwise kernel: its groups hold the sets of channels that vmap folds together.

    ``interleaved`` says which argument is in the interleaved order (None: the result).
    """

    interleaved: int | None = None

    def fold_channels(self, size: int, tensors: Sequence[Any], geometry: Sequence[Any]) -> Tensor:
        groups, step = geometry
        tensors = list(tensors)
        if self.interleaved is not None:
            i = self.interleaved
            tensors[i] = _permute_sets(_deinterleave, tensors[i], step, size)
        result = self(*tensors, groups * size, 1)
        if self.interleaved is None:
            return _permute_sets(_interleave, result, step, size)
        return result

    def fold_bias(self, bias: Tensor, groups: int, interleave: int) -> Tensor:
        return bias if interleave == 1 else bias[_order(len(bias), interleave, bias.device)]

    def unfold_bias(self, bias: Tensor, groups: int, interleave: int) -> Tensor:
        return deinterleave(bias[:, None, None], interleave)[:, 0, 0]


def _permute_sets(op: KernelOp, x: Tensor, step: int, size: int) -> Tensor:
    """Permutes each of the ``size`` sets of channels that x, (N, size * C, H, W), holds."""
    if step == 1:
        return x
    n, channels, height, width = x.shape
    return op(x.reshape(n * size, channels // size, height, width), step).reshape(x.shape)


_POINTWISE = "int groups=1, int interleave=1) -> Tensor"
_pointwise = _PointwiseOp(
    "pointwise_conv(Tensor x, Tensor weight, Tensor? bias=None, " + _POINTWISE,
    _pointwise_kernel,
    _pointwise_fake,
    images=(True, False),
    autocast=True,
    native=_pointwise_native,
)
_pointwise_grad_input = _PointwiseOp(
    "pointwise_conv_grad_input(Tensor grad, Tensor weight, " + _POINTWISE,
    _pointwise_grad_input_kernel,
    _pointwise_grad_input_fake,
    images=(True, False),
)
_pointwise_grad_input.interleaved = 0
_pointwise_grad_weight = _PointwiseOp(
    "pointwise_conv_grad_weight(Tensor x, Tensor grad, " + _POINTWISE,
    _pointwise_grad_weight_kernel,
    _pointwise_grad_weight_fake,
    images=(True, True),
    makes_image=False,
)
_pointwise_grad_weight.interleaved = 1

# The sum of y * grad, y the convolution of x with weight, is linear in x, weight and grad; each of
# the three operators is its derivative by one of them, so the other two are theirs.
_pointwise.derivatives = (
    lambda grad, weight, shape, *geometry: _pointwise_grad_input(grad, weight, *geometry),
    lambda grad, x, shape, *geometry: _pointwise_grad_weight(x, grad, *geometry),
)
_pointwise_grad_input.derivatives = (
    lambda x, weight, shape, *geometry: _pointwise(x, weight, None, *geometry),
    lambda x, grad, shape, *geometry: _pointwise_grad_weight(x, grad, *geometry),
)
_pointwise_grad_weight.derivatives = (
    lambda weight, grad, shape, *geometry: _pointwise_grad_input(grad, weight, *geometry),
    lambda weight, x, shape, *geometry: _pointwise(x, weight, None, *geometry),
)

_DEPTHWISE = "int stride, SymInt[] padding) -> Tensor"
_depthwise = KernelOp(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, " + _DEPTHWISE,
    _depthwise_kernel,
    _depthwise_fake,
    images=(True, False),
    autocast=True,
    native=_depthwise_native,
)
_depthwise_grad_input = KernelOp(
    "depthwise_conv_grad_input(Tensor grad, Tensor weight, SymInt[] input_size, " + _DEPTHWISE,
    _depthwise_grad_input_kernel,
    _depthwise_grad_input_fake,
    images=(True, False),
)
_depthwise_grad_weight = KernelOp(
    "depthwise_conv_grad_weight(Tensor x, Tensor grad, int kernel_size, " + _DEPTHWISE,
    _depthwise_grad_weight_kernel,
    _depthwise_grad_weight_fake,
    images=(True, True),
    makes_image=False,
)
_depthwise.derivatives = (
    lambda grad, w, shape, *how: _depthwise_grad_input(grad, w, shape[2:], *how),
    lambda grad, x, shape, *how: _depthwise_grad_weight(x, grad, shape[2], *how),
)
_depthwise_grad_input.derivatives = (
    lambda x, w, shape, size, *how: _depthwise(x, w, None, *how),
    lambda x, grad, shape, size, *how: _depthwise_grad_weight(x, grad, shape[2], *how),
)
_depthwise_grad_weight.derivatives = (
    lambda w, grad, shape, size, *how: _depthwise_grad_input(grad, w, shape[2:], *how),
    lambda w, x, shape, size, *how: _depthwise(x, w, None, *how),
)

_interleave = KernelOp(
    "interleave(Tensor x, int step) -> Tensor",
    _interleave_kernel,
    _permutation_fake,
    images=(True,),
    native=_interleave_native,
)
_deinterleave = KernelOp(
    "deinterleave(Tensor x, int step) -> Tensor",
    _deinterleave_kernel,
    _permutation_fake,
    images=(True,),
    native=_deinterleave_native,
)
_interleave.derivatives = (lambda grad, shape, step: _deinterleave(grad, step),)
_deinterleave.derivatives = (lambda grad, shape, step: _interleave(grad, step),)

# torch.fx, which follows a module's code with stand-ins for tensors, keeps these calls as they are.
for _name in ("conv2d", "deinterleave", "interleave"):
    fx.wrap(_name)
