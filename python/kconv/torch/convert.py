"""kconv in models of any origin: its kernels, or the papers' blocks, for their convolutions."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from kconv import ktypes
from kconv.torch.layers import (
    DepthwiseConv2d,
    PointwiseConv2d,
    depthwise_obstacle,
    pointwise_obstacle,
)
from kconv.torch.network import KPointwiseConv2d

__all__ = ["accelerate", "compress", "restore"]


def accelerate(model: nn.Module) -> list[str]:
    """Has kconv's kernels compute a model's pointwise and depthwise convolutions, in place.

    The modules stay the same objects with the same parameters: an optimizer, hooks and the
    state_dict notice nothing. Only modules of exactly the class ``nn.Conv2d`` change, as a subclass
    may have a forward of its own.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 3))
        >>> accelerate(model)
        ['0']
        >>> model[0]
        PointwiseConv2d(8, 16)

    Args:
        model: any module.

    Returns:
        The names of the modules that changed; :func:`restore` changes them back.
    """
    changed = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            if pointwise_obstacle(module) is None:
                module.__class__ = PointwiseConv2d
            elif depthwise_obstacle(module) is None:
                module.__class__ = DepthwiseConv2d
            else:
                continue
            module.__dict__["accelerated"] = True
            changed.append(name)
    return changed


def restore(model: nn.Module) -> list[str]:
    """Undoes :func:`accelerate`, in place.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 16, 1))
        >>> accelerate(model), restore(model), type(model[0])
        (['0'], ['0'], <class 'torch.nn.modules.conv.Conv2d'>)

    Args:
        model: any module.

    Returns:
        The names of the modules that changed.
    """
    changed = []
    for name, module in model.named_modules():
        if module.__dict__.pop("accelerated", False):
            module.__class__ = nn.Conv2d
            changed.append(name)
    return changed


def compress(model: nn.Module, ktype: ktypes.KType | str | int = "D6_16ch") -> nn.Module:
    """Puts the papers' block in the place of each pointwise convolution, in place.

    The batch norm and the activation that follow the convolution become part of the block's units.
    What the kType leaves as it is, such as a convolution of few channels, stays with its weights;
    blocks start from new weights, so the model is to be trained.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(128, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        >>> compress(model, "D6_16ch")(torch.randn(2, 128, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> sum(parameter.numel() for parameter in model.parameters())
        1920

    Args:
        model: a module that ``torch.fx`` can trace down to its convolutions.
        ktype: a kType, its name or its number.

    Returns:
        The model (a new one only where the model itself is a convolution).

    Raises:
        ValueError: if the kType is unknown or the model cannot be traced.
    """
    ktype = ktypes.resolve(ktype)
    if type(model) is nn.Conv2d:
        return _block(model, None, None, ktype) or model
    try:
        nodes = _Tracer().trace(model).nodes
    except Exception as error:
        raise ValueError(
            f"compress: torch.fx cannot trace this {type(model).__name__}: {error}"
        ) from error
    modules = dict(model.named_modules())
    calls = [node for node in nodes if node.op == "call_module"]
    count = Counter(node.target for node in calls)
    names = {node: str(node.target) for node in calls if count[node.target] == 1}
    for node, name in names.items():
        conv = modules[name]
        if type(conv) is nn.Conv2d:
            norm, activation, absorbed = _followers(node, names, modules)
            block = _block(conv, norm, activation, ktype)
            if block is not None:
                model.set_submodule(name, block.train(conv.training))
                for follower in absorbed:
                    model.set_submodule(follower, nn.Identity())
    return model


def _followers(
    node: fx.Node, names: Mapping[fx.Node, str], modules: Mapping[str, nn.Module]
) -> tuple[nn.BatchNorm2d | None, nn.Module | None, list[str]]:
    """The batch norm and activation that a convolution's result goes through, and their names.

    Nothing else may read the result, and they must be called there only.
    """
    norm: nn.BatchNorm2d | None = None
    activation: nn.Module | None = None
    absorbed: list[str] = []
    while activation is None and len(node.users) == 1:
        (node,) = node.users
        if node not in names:
            break
        module = modules[names[node]]
        if norm is None and isinstance(module, nn.BatchNorm2d):
            norm = module
            inner = getattr(module, "act", None)  # of a norm that activates too, such as timm's
            activation = inner if _is_activation(inner) else None
        elif _is_activation(module):
            activation = module
        elif type(module) is not nn.Identity:
            break
        absorbed.append(names[node])
    return norm, activation, absorbed


class _Tracer(fx.Tracer):
    """Looks into a module only where there are convolutions to find."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(type(inner) is nn.Conv2d for inner in m.modules() if inner is not m)


class Subsample(nn.Module):
    """The pixels that a pointwise convolution of that stride reads.

    Args:
        vertical: the step from row to row.
        horizontal: the step from column to column.
    """

    def __init__(self, vertical: int, horizontal: int) -> None:
        super().__init__()
        self.step = vertical, horizontal

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / vertical, W / horizontal)."""
        vertical, horizontal = self.step
        return x[..., ::vertical, ::horizontal]

    def extra_repr(self) -> str:
        """The step."""
        return f"{self.step}"


_UNPADDED = ((0, 0), "same", "valid")
_NOT_ELEMENTWISE = (nn.GLU, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)


def _is_activation(module: Any) -> bool:
    """Whether this is an elementwise activation without parameters."""
    return (
        isinstance(module, nn.Module)
        and "activation" in type(module).__module__  # PyTorch's and timm's
        and not isinstance(module, _NOT_ELEMENTWISE)
        and not list(module.parameters())
    )


def _block(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    activation: nn.Module | None,
    ktype: ktypes.KType,
) -> nn.Module | None:
    """What takes the place of a convolution; None if it is to stay."""
    if conv.kernel_size != (1, 1) or conv.groups > 1 or conv.padding not in _UNPADDED:
        return None
    plan = ktypes.plan(ktype, conv.in_channels, conv.out_channels)
    if plan.out_channels != conv.out_channels or all(unit.groups == 1 for unit in plan.units):
        return None
    block = KPointwiseConv2d(
        conv.in_channels,
        conv.out_channels,
        ktype,
        activation="relu" if activation else None,  # exchanged below
        use_bias=conv.bias is not None,
        has_batch_norm=norm is not None,
    )
    for name, module in block.named_children():
        if activation and isinstance(module, nn.ReLU):
            block.set_submodule(name, copy.deepcopy(activation))
        elif norm and isinstance(module, nn.BatchNorm2d):
            options = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
            block.set_submodule(name, nn.BatchNorm2d(module.num_features, *options))
    block.to(conv.weight.device, conv.weight.dtype)
    return block if conv.stride == (1, 1) else nn.Sequential(Subsample(*conv.stride), block)
