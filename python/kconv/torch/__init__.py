"""kconv for PyTorch: functions, layers and networks on its kernels, forward and backward.

Example:
    >>> import torch
    >>> layer = PointwiseConv2d(144, 24, groups=8, interleave=3)
    >>> layer(torch.randn(2, 144, 7, 7)).shape
    torch.Size([2, 24, 7, 7])
"""

from __future__ import annotations

import sys as _sys

import torch as _torch

from kconv._versions import warn_of_version
from kconv.torch import _flops as _flops  # FlopCounterMode knows the operators
from kconv.torch._create import create_model, register_timm
from kconv.torch._freeze import freeze
from kconv.torch._fuse import fuse
from kconv.torch.convert import accelerate, compress, report, restore
from kconv.torch.layers import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    InterleaveChannels,
    InterleavedPointwiseConv2d,
    PointwiseConv2d,
)
from kconv.torch.native import to_native
from kconv.torch.network import ConvUnit, KPointwiseConv2d, MBConv, Network, build
from kconv.torch.ops import deinterleave, depthwise_conv, interleave, pointwise_conv

__all__ = [
    "AcceleratedConv2d",
    "ConvUnit",
    "DepthwiseConv2d",
    "InterleaveChannels",
    "InterleavedPointwiseConv2d",
    "KPointwiseConv2d",
    "MBConv",
    "Network",
    "PointwiseConv2d",
    "accelerate",
    "build",
    "compress",
    "create_model",
    "deinterleave",
    "depthwise_conv",
    "freeze",
    "fuse",
    "interleave",
    "pointwise_conv",
    "register_timm",
    "report",
    "restore",
    "to_native",
]

warn_of_version("torch", _torch.__version__)
if "timm.models" in _sys.modules:
    register_timm()


def __dir__() -> list[str]:
    return sorted(__all__)
