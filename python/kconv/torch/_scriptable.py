"""Layers of PyTorch's own operators, which TorchScript compiles.

It takes annotations as they are evaluated, so this module does not postpone that, and the code is
written in what TorchScript knows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kconv._geometry import interleave_order, same_padding

__all__ = [
    "DropConnect",
    "IndexedInterleave",
    "InterleavedConv2d",
    "PaddedConv2d",
    "interleave_by_index",
    "pad_explicit",
    "pointwise_repr",
]


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
        return interleave_by_index(y, self.interleave)

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
        return pointwise_repr(self)


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
        return interleave_by_index(x, self.step)

    def extra_repr(self) -> str:
        """The step."""
        return f"{self.step}"


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


def pad_explicit(x: Tensor, borders: tuple[tuple[int, int], tuple[int, int]], mode: str) -> Tensor:
    """Pads an image by ((top, bottom), (left, right))."""
    sides = [borders[1][0], borders[1][1], borders[0][0], borders[0][1]]
    return F.pad(x, sides, "constant" if mode == "zeros" else mode)


def pad_same(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], mode: str
) -> Tensor:
    """Pads an image so that a convolution puts out 1/stride of its pixels, rounded up."""
    height = (weight.shape[2] - 1) * dilation[0] + 1
    width = (weight.shape[3] - 1) * dilation[1] + 1
    top, bottom = same_padding(x.shape[-2], height, stride[0])
    left, right = same_padding(x.shape[-1], width, stride[1])
    sides = [left, right, top, bottom]
    return F.pad(x, sides, "constant" if mode == "zeros" else mode)


def interleave_by_index(x: Tensor, step: int) -> Tensor:
    """:func:`interleave` by PyTorch's own indexing, on any device.

    The index is a constant for exporters: thousands of nodes that compute it would slow each run.
    """
    order = interleave_order(x.shape[-3], step)
    return x if step == 1 else x.index_select(-3, torch.tensor(order, device=x.device))


def pointwise_repr(layer: Any) -> str:
    """The arguments of a pointwise convolution that are not defaults."""
    parts = [f"{layer.in_channels}, {layer.out_channels}"]
    parts += [f"groups={layer.groups}"] if layer.groups > 1 else []
    parts += ["bias=False"] if layer.bias is None else []
    parts += [f"interleave={layer.interleave}"] if layer.interleave > 1 else []
    return ", ".join(parts)


# torch.fx, which follows a module's code with stand-ins for tensors, keeps these calls as they are.
for _name in ("interleave_by_index", "pad_explicit", "pad_same"):
    fx.wrap(_name)
