"""PyTorch modules on kconv's kernels, with the parameters of PyTorch's own convolutions."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kconv.torch import ops

__all__ = ["DepthwiseConv2d", "InterleaveChannels", "PointwiseConv2d"]


class PointwiseConv2d(nn.Conv2d):
    """Grouped 1x1 convolution, optionally with its output channels interleaved.

    It is an ``nn.Conv2d`` of kernel size 1: same parameters, initial values and state_dict.

    Example:
        >>> import torch
        >>> layer = PointwiseConv2d(32, 24, groups=4, interleave=6)
        >>> layer(torch.randn(2, 32, 7, 5)).shape
        torch.Size([2, 24, 7, 5])

    Args:
        in_channels: C_in.
        out_channels: C_out.
        groups: divides C_in and C_out.
        bias: whether there is a learnable bias, (C_out,).
        interleave: the step by which the output is interleaved after the convolution (1: not).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if the groups do not divide the channels or the step is below 1.
    """

    interleave = 1  # also of a plain nn.Conv2d that becomes a PointwiseConv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        bias: bool = True,
        interleave: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if interleave < 1:
            raise ValueError(f"interleave must be at least 1, got {interleave}")
        super().__init__(
            in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype
        )
        self.interleave = interleave

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H, W); the batch axis may be missing."""
        return ops.pointwise_conv(
            x, self.weight, self.bias, groups=self.groups, interleave=self.interleave
        )

    def extra_repr(self) -> str:
        """The arguments that are not defaults."""
        parts = [f"{self.in_channels}, {self.out_channels}"]
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += ["bias=False"] if self.bias is None else []
        parts += [f"interleave={self.interleave}"] if self.interleave > 1 else []
        return ", ".join(parts)

    def to_native(self) -> nn.Conv2d:
        """The same layer as an ``nn.Conv2d``."""
        if self.interleave == 1:
            return _own_conv(self, 1)
        native = _own_conv(self, 1, InterleavedConv2d)
        native.interleave = self.interleave
        return native


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution: every channel with its own k x k kernel, (C, 1, k, k).

    It is an ``nn.Conv2d`` with as many groups as channels: same parameters, initial values and
    state_dict. Beyond its paddings it takes asymmetric ones.

    Example:
        >>> import torch
        >>> layer = DepthwiseConv2d(6, 6, kernel_size=3, stride=2, padding=1)
        >>> layer(torch.randn(2, 6, 9, 9)).shape
        torch.Size([2, 6, 5, 5])

    Args:
        in_channels: C.
        out_channels: C.
        kernel_size: k: 3, 5 or 7.
        stride: 1 or 2.
        padding: pixels at each border, (vertical, horizontal) or ((top, bottom), (left, right));
            "valid" for none, "same" for as many outputs as inputs at stride 1.
        dilation: only 1.
        groups: C, also if left out.
        bias: whether there is a learnable bias, (C,).
        padding_mode: only "zeros".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if an argument is not one that the kernels compute.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Any = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        asymmetric = isinstance(padding, tuple) and isinstance(padding[0], tuple)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if asymmetric else padding,
            dilation,
            in_channels if groups is None else groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if asymmetric:
            self.padding = padding
        if reason := depthwise_obstacle(self):
            raise ValueError(f"DepthwiseConv2d: {reason}; nn.Conv2d computes such layers")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H_out, W_out); the batch axis may be missing."""
        return ops.depthwise_conv(
            x, self.weight, self.bias, stride=self.stride[0], padding=_borders(self.padding)
        )

    def to_native(self) -> nn.Conv2d:
        """The same layer as an ``nn.Conv2d``."""
        padding = self.padding
        if isinstance(padding, str) or not isinstance(padding[0], tuple):
            return _own_conv(self, self.kernel_size, stride=self.stride, padding=padding)
        native = _own_conv(self, self.kernel_size, PaddedConv2d, stride=self.stride)
        native.borders = padding
        return native


class InterleavedConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose output channels are interleaved, by PyTorch's own indexing.

    Attributes:
        interleave: the step.
    """

    interleave = 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        return ops.interleave_by_index(super().forward(x), self.interleave)

    def extra_repr(self) -> str:
        """As the base class's, and the step."""
        return f"{super().extra_repr()}, interleave={self.interleave}"


class PaddedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's paddings: "same" at any stride, or asymmetric ones.

    Attributes:
        borders: "same" or ((top, bottom), (left, right)).
    """

    borders: ops.Padding = "same"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        top, bottom, left, right = ops.borders(
            self.borders, x.shape[-2:], self.kernel_size, self.stride[0]
        )
        return super().forward(F.pad(x, (left, right, top, bottom)))

    def extra_repr(self) -> str:
        """As the base class's, and the borders."""
        return f"{super().extra_repr()}, borders={self.borders!r}"


class InterleaveChannels(nn.Module):
    """Takes every ``step``-th channel, from each of the first ``step`` ones in turn.

    Example:
        >>> import torch
        >>> InterleaveChannels(2)(torch.arange(6.0).reshape(1, 6, 1, 1)).flatten()
        tensor([0., 2., 4., 1., 3., 5.])

    Args:
        step: at least 1; 1 is the identity.

    Raises:
        ValueError: if the step is below 1.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}")
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; the batch axis may be missing."""
        return ops.interleave(x, self.step)

    def extra_repr(self) -> str:
        """The step."""
        return f"{self.step}"

    def to_native(self) -> nn.Module:
        """The same layer on PyTorch's indexing."""
        return _IndexedInterleave(self.step)


class _IndexedInterleave(InterleaveChannels):
    def forward(self, x: Tensor) -> Tensor:
        return ops.interleave_by_index(x, self.step)


def pointwise_obstacle(conv: nn.Conv2d) -> str | None:
    """Why a convolution is none for :class:`PointwiseConv2d`, None if it is one."""
    if conv.kernel_size != (1, 1):
        return f"kernel_size={conv.kernel_size} is not 1"
    if conv.stride != (1, 1):
        return f"stride={conv.stride} is not 1"
    if conv.padding not in ((0, 0), "same", "valid"):
        return f"padding={conv.padding} is not 0"
    return None


def depthwise_obstacle(conv: nn.Conv2d) -> str | None:
    """Why a convolution is none for :class:`DepthwiseConv2d`, None if it is one."""
    channels = conv.in_channels
    if not conv.groups == channels == conv.out_channels:
        return (
            f"{channels} to {conv.out_channels} channels in {conv.groups} groups is not depthwise"
        )
    if conv.kernel_size not in ((3, 3), (5, 5), (7, 7)):
        return f"kernel_size={conv.kernel_size} is not 3, 5 or 7"
    if conv.stride not in ((1, 1), (2, 2)):
        return f"stride={conv.stride} is neither 1 nor 2"
    if conv.dilation != (1, 1):
        return f"dilation={conv.dilation} is not 1"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not 'zeros'"
    return None


def _borders(padding: Any) -> ops.Padding:
    if isinstance(padding, str) or isinstance(padding[0], tuple):
        return padding
    vertical, horizontal = padding
    return (vertical, vertical), (horizontal, horizontal)


def _own_conv(
    layer: nn.Conv2d, kernel_size: Any, cls: type[Any] = nn.Conv2d, **options: Any
) -> Any:
    """A convolution of PyTorch's with a layer's parameters."""
    native = cls(
        layer.in_channels,
        layer.out_channels,
        kernel_size,
        groups=layer.groups,
        bias=layer.bias is not None,
        device="meta",
        **options,
    )
    native.weight, native.bias = layer.weight, layer.bias
    return native.train(layer.training)


class DropConnect(nn.Module):
    """Drops a sample's whole branch in training, and scales the others up to compensate.

    Args:
        rate: the share of branches that are dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1, 1), self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"{self.rate:.4g}"
