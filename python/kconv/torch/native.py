"""PyTorch's own layers for kconv's."""

from __future__ import annotations

from torch import nn

from kconv._report import Report
from kconv.torch._conversion import change_classes, copied, set_report, unwrapped
from kconv.torch._fuse import unfuse
from kconv.torch.layers import NATIVE

__all__ = ["make_native", "to_native"]


def to_native(model: nn.Module) -> nn.Module:
    """A copy of a model in which PyTorch's own layers stand for kconv's, with the same weights.

    The copy exports to other formats, runs on other devices, and is what tools know that look for
    PyTorch's own layers: those that quantize, and those that count operations (``thop``,
    ``ptflops``, ``fvcore``). Hooks, parametrizations and the masks of pruning stay.

    Example:
        >>> from kconv.torch import PointwiseConv2d
        >>> native = to_native(nn.Sequential(PointwiseConv2d(8, 4, groups=2), nn.ReLU()))
        >>> type(native[0])
        <class 'torch.nn.modules.conv.Conv2d'>

    Args:
        model: any module.

    Returns:
        The copy; outputs agree to rounding. :func:`kconv.torch.report` tells what has changed.

    Raises:
        ValueError: if a layer is of a class derived from one of kconv's, which may compute
            something else, or if the model cannot be copied.
        TypeError: if ``model`` is no module.
    """
    unwrapped(model)
    native = copied(model, "to_native")
    set_report(native, Report("to_native", make_native(native), {}))
    return native


def make_native(model: nn.Module) -> dict[str, str]:
    """Changes kconv's layers to PyTorch's own, in place; returns names and new classes.

    Raises:
        ValueError: as :func:`to_native`; nothing has changed then.
    """
    changed = change_classes(model, NATIVE, "to_native") | unfuse(model)
    for module in model.modules():
        if "_fuses" in module.__dict__:  # of a network, whose layers then run as they are
            module.__dict__["_fuses"] = False
    return changed
