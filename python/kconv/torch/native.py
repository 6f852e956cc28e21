"""PyTorch's own layers for kconv's."""

from __future__ import annotations

import copy

from torch import nn

from kconv.torch.layers import DepthwiseConv2d, InterleaveChannels, PointwiseConv2d

__all__ = ["make_native", "to_native"]

_KCONV_LAYERS = (PointwiseConv2d, DepthwiseConv2d, InterleaveChannels)


def to_native(model: nn.Module) -> nn.Module:
    """A copy of a model in which PyTorch's own layers stand for kconv's, with the same weights.

    The copy needs no kconv, so it exports to other formats and runs on other devices.

    Example:
        >>> native = to_native(nn.Sequential(PointwiseConv2d(8, 4, groups=2), nn.ReLU()))
        >>> type(native[0])
        <class 'torch.nn.modules.conv.Conv2d'>

    Args:
        model: any module.

    Returns:
        The copy; outputs agree to rounding.
    """
    return make_native(copy.deepcopy(model))


def make_native(model: nn.Module) -> nn.Module:
    """Exchanges kconv's layers in place; returns the model, or what stands for it."""
    made: dict[nn.Module, nn.Module] = {}  # a layer may occur in several places
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _KCONV_LAYERS):
                module._modules[name] = made.setdefault(child, child.to_native())
    return model.to_native() if isinstance(model, _KCONV_LAYERS) else model
