"""The kernels on PyTorch tensors in Keras's layouts; nothing is copied for a change of layout."""

from __future__ import annotations

from torch import Tensor

import kconv.torch.ops as torch_ops
from kconv.torch.ops import Padding


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    groups: int,
    interleave: int,
    layout: str,
    weight_layout: str,
) -> Tensor:
    """x: (N, H, W, C_in), weight: (1, 1, C_in/groups, C_out) -> (N, H, W, C_out)."""
    assert weight_layout == "IO"
    y = torch_ops.pointwise_conv(
        _to_nchw(x, layout),
        weight.permute(3, 2, 0, 1),
        bias,
        groups=groups,
        interleave=interleave,
    )
    return _from_nchw(y, layout)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    padding: Padding,
    layout: str,
    weight_layout: str,
) -> Tensor:
    """x: (N, H, W, C), weight: (k, k, C, 1) -> (N, H_out, W_out, C)."""
    assert weight_layout == "IO"
    y = torch_ops.depthwise_conv(
        _to_nchw(x, layout), weight.permute(2, 3, 0, 1), bias, stride=stride, padding=padding
    )
    return _from_nchw(y, layout)


def interleave(x: Tensor, step: int, *, layout: str) -> Tensor:
    """x: (N, H, W, C) -> the same with its channels interleaved."""
    return _from_nchw(torch_ops.interleave(_to_nchw(x, layout), step), layout)


def _to_nchw(x: Tensor, layout: str) -> Tensor:
    return x if layout == "NCHW" else x.permute(0, 3, 1, 2)


def _from_nchw(x: Tensor, layout: str) -> Tensor:
    return x if layout == "NCHW" else x.permute(0, 2, 3, 1)
