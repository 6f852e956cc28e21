"""PyTorch modules on kconv's kernels, with the parameters of PyTorch's own convolutions.

Each layer and its counterpart of PyTorch's own operators have the same state and differ by their
class (see :data:`NATIVE`), so a layer changes from one to the other in place: hooks, masks of
pruning and parametrizations stay with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from kconv.torch import ops
from kconv.torch._scriptable import (
    DropConnect,
    IndexedInterleave,
    InterleavedConv2d,
    PaddedConv2d,
    pad_explicit,
    pointwise_repr,
)

__all__ = [
    "AcceleratedConv2d",
    "DepthwiseConv2d",
    "DropConnect",
    "IndexedInterleave",
    "InterleaveChannels",
    "InterleavedConv2d",
    "InterleavedPointwiseConv2d",
    "PaddedConv2d",
    "PointwiseConv2d",
]


class _KernelConv2d(nn.Conv2d):
    """``nn.Conv2d`` by the kernels where they compute what its attributes say at a call."""

    def _conv_forward(self, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or (type(x) is fx.Proxy and _is_quantizing(x)):
            return super()._conv_forward(x, weight, bias)
        return ops.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In files of earlier versions the convolutions that `accelerate` changed, and those that
        # interleave, are of the classes PointwiseConv2d and DepthwiseConv2d.
        accelerated = state.pop("accelerated", False)
        super().__setstate__(state)
        if accelerated:
            self.__class__ = AcceleratedConv2d
        elif self.__dict__.get("interleave", 1) > 1:
            self.__class__ = InterleavedPointwiseConv2d  # type: ignore[assignment]


_TENSORS: Any = Tensor, fx.Proxy


class AcceleratedConv2d(_KernelConv2d):
    """What :func:`kconv.torch.accelerate` makes of an ``nn.Conv2d``.

    It has ``nn.Conv2d``'s arguments and attributes, and heeds them at each call as that does: what
    the kernels do not compute, PyTorch's own operator does. Exported by ``torch.export`` it is an
    ``nn.Conv2d``, so that the program needs no kconv.

    Example:
        >>> import torch
        >>> layer = AcceleratedConv2d(6, 12, kernel_size=1)
        >>> layer.stride = (2, 2)
        >>> layer(torch.randn(2, 6, 9, 7)).shape
        torch.Size([2, 12, 5, 4])
    """

    def _conv_forward(self, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            self.padding_mode == "zeros"
            and isinstance(x, _TENSORS)
            and not (type(x) is fx.Proxy and _is_quantizing(x))
            and not (is_compiling() and _is_exporting())
        ):
            try:
                return ops.conv2d(
                    x, weight, bias, self.stride, self.padding, self.dilation, self.groups
                )
            except ValueError:  # PyTorch says in its own way what does not fit
                pass
        elif is_compiling() and not torch.compiler.is_dynamo_compiling():
            warnings.warn(
                "an accelerated convolution is exported as PyTorch's own operator, but as a module "
                "of another class than nn.Conv2d, which some quantizers go by: "
                "call kconv.torch.restore(model) before the export if it is for one of these",
                stacklevel=2,
            )
        return nn.Conv2d._conv_forward(self, x, weight, bias)


class PointwiseConv2d(_KernelConv2d):
    """Grouped 1x1 convolution, optionally with its output channels interleaved.

    It is an ``nn.Conv2d`` of kernel size 1: same parameters, initial values and state_dict. With
    ``interleave`` above 1 the constructor gives an :class:`InterleavedPointwiseConv2d`, which has
    the same parameters but is no ``nn.Conv2d``.

    Example:
        >>> import torch
        >>> layer = PointwiseConv2d(32, 24, groups=4)
        >>> layer(torch.randn(2, 32, 7, 5)).shape
        torch.Size([2, 24, 7, 5])
        >>> PointwiseConv2d(32, 24, groups=4, interleave=6)
        InterleavedPointwiseConv2d(32, 24, groups=4, interleave=6)

    Args:
        in_channels: C_in.
        out_channels: C_out.
        groups: divides C_in and C_out.
        bias: whether there is a learnable bias, (C_out,).
        interleave: the step by which the output is interleaved after the convolution (1: not).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if the groups do not divide the channels, the step is below 1, or a subclass
            is given a step above 1.
    """

    interleave = 1

    def __new__(
        cls,
        in_channels: int = 0,
        out_channels: int = 0,
        groups: int = 1,
        bias: bool = True,
        interleave: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> Any:
        """The layer, or an interleaving one, which is of another class."""
        if cls is PointwiseConv2d and interleave > 1:
            return InterleavedPointwiseConv2d(
                in_channels, out_channels, groups, bias, interleave, device, dtype
            )
        return super().__new__(cls)

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
        if interleave > 1:
            raise ValueError(
                f"{type(self).__name__}: interleave={interleave} needs a subclass of "
                f"InterleavedPointwiseConv2d, not of PointwiseConv2d"
            )
        super().__init__(
            in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype
        )

    def extra_repr(self) -> str:
        """The arguments that are not defaults."""
        plain = (self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)
        if plain == ((1, 1), (1, 1), (0, 0), (1, 1), "zeros"):
            return pointwise_repr(self)
        return super().extra_repr()


class DepthwiseConv2d(_KernelConv2d):
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
        ValueError: if an argument is not one that the kernels compute. Attributes that are changed
            afterwards are heeded as ``nn.Conv2d``'s are.
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
        asymmetric = _is_asymmetric(padding)
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

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros" and _is_asymmetric(padding):
            x = pad_explicit(x, padding, self.padding_mode)
            return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)


class InterleavedPointwiseConv2d(InterleavedConv2d):
    """Grouped 1x1 convolution whose output channels are interleaved in the same pass.

    It has ``nn.Conv2d``'s parameters and attributes, but row r of the weight is not output channel
    r. So it is no ``nn.Conv2d``, which tools take that for granted of: they fold a batch norm into
    the rows, or remove some with the channels of the layers that follow. For the same reason its
    parameters are not replaced by assignment.

    Example:
        >>> import torch
        >>> layer = InterleavedPointwiseConv2d(32, 24, groups=4, interleave=6)
        >>> layer(torch.randn(2, 32, 7, 5)).shape, layer.weight.shape
        (torch.Size([2, 24, 7, 5]), torch.Size([24, 8, 1, 1]))

    Args:
        in_channels: C_in.
        out_channels: C_out.
        groups: divides C_in and C_out.
        bias: whether there is a learnable bias, (C_out,).
        interleave: the step.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: (C_out, C_in / groups, 1, 1).
        bias: (C_out,), or None.

    Raises:
        ValueError: if the groups do not divide the channels or the step is below 1; if somebody
            assigns a weight or bias.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(x, weight, bias)
        return ops.conv2d(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.interleave,
        )


class InterleaveChannels(IndexedInterleave):
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

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; the batch axis may be missing."""
        return ops.interleave(x, self.step)


class NativeInterleaveChannels(InterleaveChannels):
    """:class:`InterleaveChannels` by PyTorch's own indexing; TorchScript compiles it.

    Args:
        step: at least 1; 1 is the identity.

    Raises:
        ValueError: if the step is below 1.
    """

    forward = IndexedInterleave.forward


def _native_conv(layer: nn.Conv2d) -> tuple[type[nn.Module], dict[str, Any]]:
    if _is_asymmetric(layer.padding):
        return PaddedConv2d, {"borders": layer.padding, "padding": (0, 0)}
    return nn.Conv2d, {}


NATIVE: dict[type[nn.Module], Callable[[Any], tuple[type[nn.Module], dict[str, Any]]]] = {
    AcceleratedConv2d: _native_conv,
    PointwiseConv2d: _native_conv,
    DepthwiseConv2d: _native_conv,
    InterleavedPointwiseConv2d: lambda _: (InterleavedConv2d, {}),
    InterleaveChannels: lambda _: (NativeInterleaveChannels, {}),
    NativeInterleaveChannels: lambda _: (NativeInterleaveChannels, {}),  # which is one already
}
"""For each layer of kconv's the class on PyTorch's own operators, and attributes that differ."""


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


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on


def _is_quantizing(x: fx.Proxy) -> bool:
    """Whether the trace is one for quantization, which looks for PyTorch's own operators."""
    return type(x.tracer).__name__ == "QuantizationTracer"


def _is_asymmetric(padding: Any) -> bool:
    return isinstance(padding, tuple) and isinstance(padding[0], tuple)


class ReadsAsConv2d:
    """What models read of a pointwise convolution, for blocks in its place; not to be set."""

    in_channels: int
    out_channels: int

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(1, 1)."""
        return 1, 1

    @property
    def stride(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return 1, 1

    @property
    def padding(self) -> tuple[int, int]:
        """(0, 0)."""
        return 0, 0

    @property
    def dilation(self) -> tuple[int, int]:
        """(1, 1)."""
        return 1, 1

    @property
    def groups(self) -> int:
        """1, as any input channel counts for any output channel."""
        return 1
