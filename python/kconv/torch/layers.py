"""PyTorch modules on kconv's kernels, with the parameters of PyTorch's own convolutions.

Each layer and its counterpart of PyTorch's own operators have the same state and differ by their
class (see :data:`NATIVE`), so a layer changes from one to the other in place: hooks, masks of
pruning and parametrizations stay with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from kconv.torch import ops

__all__ = [
    "AcceleratedConv2d",
    "DepthwiseConv2d",
    "InterleaveChannels",
    "InterleavedPointwiseConv2d",
    "PointwiseConv2d",
]


class _KernelConv2d(nn.Conv2d):
    """``nn.Conv2d`` by the kernels where they compute what its attributes say at a call."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or _is_quantizing(x):
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

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _is_exporting():
            return nn.Conv2d._conv_forward(self, x, weight, bias)
        return super()._conv_forward(x, weight, bias)


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
            asks for a step above 1.
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
            return _pointwise_repr(self)
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


class PaddedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's paddings: "same" at any stride, or asymmetric ones.

    ``padding`` comes on top of them.

    Attributes:
        borders: "same" or ((top, bottom), (left, right)).
    """

    __constants__ = [*nn.Conv2d.__constants__, "borders"]  # noqa: RUF012
    borders: Any = "same"

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # TorchScript compiles the branch of the type that a layer's borders have.
        if isinstance(self.borders, str):
            x = pad_same(x, weight, list(self.stride), list(self.dilation), self.padding_mode)
        else:
            x = pad_explicit(x, self.borders, self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """As the base class's, and the borders."""
        return f"{super().extra_repr()}, borders={self.borders!r}"


def pad_explicit(x: Tensor, borders: tuple[tuple[int, int], tuple[int, int]], mode: str) -> Tensor:
    """Pads an image by ((top, bottom), (left, right)); TorchScript compiles this function."""
    sides = [borders[1][0], borders[1][1], borders[0][0], borders[0][1]]
    return F.pad(x, sides, "constant" if mode == "zeros" else mode)


def pad_same(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], mode: str
) -> Tensor:
    """Pads an image so that a convolution puts out 1/stride of its pixels, rounded up.

    TorchScript compiles this function.
    """
    height = (weight.shape[2] - 1) * dilation[0] + 1
    width = (weight.shape[3] - 1) * dilation[1] + 1
    rows = ops.same_padding(x.shape[-2], height, stride[0])
    columns = ops.same_padding(x.shape[-1], width, stride[1])
    sides = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    return F.pad(x, sides, "constant" if mode == "zeros" else mode)


fx.wrap("pad_explicit")
fx.wrap("pad_same")


class InterleavedConv2d(nn.Module):
    """A 1x1 convolution whose output channels are interleaved, by PyTorch's own operators.

    It has ``nn.Conv2d``'s parameters and attributes, but row r of the weight is not output channel
    r. So it is no ``nn.Conv2d``, which tools take that for granted of: they fold a batch norm into
    the rows, or remove some with the channels of the layers that follow.

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

    weight: Tensor
    bias: Tensor | None

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
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = (1, 1), (1, 1), (1, 1)
        self.padding, self.padding_mode = (0, 0), "zeros"
        self.groups, self.interleave = groups, interleave
        self.register_parameter("weight", conv._parameters["weight"])
        self.register_parameter("bias", conv._parameters["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H, W); the batch axis may be missing."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            (rows, columns), padding = padding, (0, 0)
            x = F.pad(x, (columns, columns, rows, rows), self.padding_mode)
        y = F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return ops.interleave_by_index(y, self.interleave)

    def __setattr__(self, name: str, value: Any) -> None:
        # Who computes new parameters from the old ones and from those of a layer that follows, as
        # fuse_conv_bn_eval does, takes the rows for the output channels.
        if name in ("weight", "bias") and isinstance(self._parameters.get(name), Tensor):
            raise ValueError(
                f"{type(self).__name__}: its {name} is in the order before the interleave, not of "
                f"its output channels, and is not replaced by assignment; "
                f"register_parameter({name!r}, ...) replaces it, as load_state_dict fills it"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The arguments that are not defaults."""
        return _pointwise_repr(self)


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


class IndexedInterleave(nn.Module):
    """:class:`InterleaveChannels` by PyTorch's own indexing.

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
        return ops.interleave_by_index(x, self.step)

    def extra_repr(self) -> str:
        """The step."""
        return f"{self.step}"


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


def _native_conv(layer: nn.Conv2d) -> tuple[type[nn.Module], dict[str, Any]]:
    if _is_asymmetric(layer.padding):
        return PaddedConv2d, {"borders": layer.padding, "padding": (0, 0)}
    return nn.Conv2d, {}


NATIVE: dict[type[nn.Module], Callable[[Any], tuple[type[nn.Module], dict[str, Any]]]] = {
    AcceleratedConv2d: _native_conv,
    PointwiseConv2d: _native_conv,
    DepthwiseConv2d: _native_conv,
    InterleavedPointwiseConv2d: lambda _: (InterleavedConv2d, {}),
    InterleaveChannels: lambda _: (IndexedInterleave, {}),
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


def _is_exporting() -> bool:
    return is_compiling() and _EXPORTING()


_EXPORTING = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on


def _is_quantizing(x: Any) -> bool:
    """Whether x stands for a tensor in a trace for quantization, which looks for own operators."""
    return type(x) is fx.Proxy and type(x.tracer).__name__ == "QuantizationTracer"


def _is_asymmetric(padding: Any) -> bool:
    return isinstance(padding, tuple) and isinstance(padding[0], tuple)


def _pointwise_repr(layer: Any) -> str:
    parts = [f"{layer.in_channels}, {layer.out_channels}"]
    parts += [f"groups={layer.groups}"] if layer.groups > 1 else []
    parts += ["bias=False"] if layer.bias is None else []
    parts += [f"interleave={layer.interleave}"] if layer.interleave > 1 else []
    return ", ".join(parts)


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
        return x * F.dropout(x.new_ones([x.shape[0], 1, 1, 1]), self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"{self.rate:.4g}"
