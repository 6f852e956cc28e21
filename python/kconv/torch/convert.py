"""kconv in models of any origin: its kernels, or the papers' blocks, for their convolutions."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from kconv import ktypes
from kconv._report import Report
from kconv.torch._conversion import change_classes, names_of, report, set_report, unwrapped
from kconv.torch._fuse import unfuse
from kconv.torch.layers import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    PointwiseConv2d,
    ReadsAsConv2d,
    depthwise_obstacle,
    pointwise_obstacle,
)
from kconv.torch.network import KPointwiseConv2d

__all__ = ["accelerate", "compress", "report", "restore"]


def accelerate(model: nn.Module, *, all_layers: bool = False) -> nn.Module:
    """Has kconv's kernels compute a model's pointwise and depthwise convolutions, in place.

    Ungrouped pointwise convolutions of more than 32 input channels stay PyTorch's, as between its
    other operators they gain nothing.

    The modules stay the same objects with the same parameters: an optimizer, hooks and the
    state_dict notice nothing, and attributes that are changed afterwards count as in ``nn.Conv2d``.
    Only modules of exactly the class ``nn.Conv2d`` change, as a subclass may have a forward of its
    own.

    ``torch.export`` and traces for FX quantization find PyTorch's own operators in an accelerated
    model, and PyTorch's ``FlopCounterMode`` counts the kernels' operations. Tools that go by the
    class ``nn.Conv2d`` want :func:`restore` or :func:`kconv.torch.to_native` first: eager-mode
    quantization, some quantizers of exported programs, and ``thop``, ``ptflops`` and ``fvcore``,
    which count operations.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 3))
        >>> accelerate(model)[0]
        AcceleratedConv2d(8, 16, kernel_size=(1, 1), stride=(1, 1))
        >>> report(model).changed
        {'0': 'AcceleratedConv2d'}

    Args:
        model: any module.
        all_layers: whether those change, too, which gain nothing.

    Returns:
        The model. :func:`kconv.torch.report` tells what has changed, what was left alone and why;
        :func:`restore` changes it back.

    Raises:
        TypeError: if ``model`` is no module.
    """
    inner = unwrapped(model)
    changed: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, module in inner.named_modules():
        if type(module) is nn.Conv2d:
            reason = _obstacle(module)
            if reason is None and not all_layers:
                reason = _no_gain(module)
            if reason is None:
                module.__class__ = AcceleratedConv2d
                changed[name] = AcceleratedConv2d.__name__
            else:
                kept[name] = reason
        elif isinstance(module, nn.Conv2d) and not isinstance(module, _OWN):
            kept[name] = _of_another_class(module)
    set_report(model, Report("accelerate", changed, kept))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`accelerate` and :func:`fuse`, in place.

    What has been done to the modules since then, such as hooks, pruning and parametrizations,
    stays.

    Example:
        >>> model = accelerate(nn.Sequential(nn.Conv2d(8, 16, 1)))
        >>> type(restore(model)[0])
        <class 'torch.nn.modules.conv.Conv2d'>

    Args:
        model: any module.

    Returns:
        The model. :func:`kconv.torch.report` tells what has changed.

    Raises:
        ValueError: if the class of an accelerated module was exchanged for one derived from it,
            which may compute something else; nothing has changed then.
        TypeError: if ``model`` is no module.
    """
    inner = unwrapped(model)
    changed = change_classes(inner, {AcceleratedConv2d: lambda _: (nn.Conv2d, {})}, "restore")
    set_report(model, Report("restore", changed | unfuse(inner), {}))
    return model


def compress(model: nn.Module, ktype: ktypes.KType | str | int = "D6_16ch") -> nn.Module:
    """Puts the papers' block in the place of each pointwise convolution, in place.

    The batch norm and the activation that follow the convolution become part of the block's units.
    What the kType leaves as it is, such as a convolution of few channels, stays with its weights,
    and so does a convolution that something else depends on: hooks, tied parameters, code that
    reads its weight. Blocks start from new weights, so the model is to be trained.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(128, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        >>> compress(model, "D6_16ch")(torch.randn(2, 128, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> sum(parameter.numel() for parameter in model.parameters())
        1920
        >>> print(report(model))
        compress: 1 changed, 0 kept
          changed  0  KPointwiseConv2d

    Args:
        model: a module that ``torch.fx`` can trace down to its convolutions; it may be accelerated,
            and wrapped by ``torch.compile`` or ``DataParallel``.
        ktype: a kType, its name or its number.

    Returns:
        The model (a new one only where the model itself is a convolution).
        :func:`kconv.torch.report` tells what has changed, and why other pointwise convolutions have
        not.

    Raises:
        ValueError: if the kType is unknown, the model cannot be traced, or a wrapper such as
            ``DistributedDataParallel`` holds the parameters already.
        TypeError: if ``model`` is no module.
    """
    ktype = ktypes.resolve(ktype)
    inner = unwrapped(model)
    for module in model.modules():
        if wrapper := next((c for c in type(module).__mro__ if c.__name__ in _HOLDERS), None):
            raise ValueError(
                f"compress: {wrapper.__name__} has taken over the parameters that blocks would "
                f"replace; compress the model before it is wrapped"
            )
    try:
        nodes = [] if type(inner) in _PLAIN else list(_Tracer().trace(inner).nodes)
    except Exception as error:
        raise ValueError(
            f"compress: torch.fx cannot trace this {type(inner).__name__}: {error}"
        ) from error
    compressed, made = _Compression(inner, nodes, ktype).run()
    if compressed is not inner:  # the model itself was a convolution
        if model is inner:
            model = compressed
        else:
            _replace(model, inner, compressed)
    set_report(model, made)
    return model


class _Compression:
    """Replaces convolutions of a model by blocks.

    Args:
        model: without wrappers.
        nodes: of its trace.
        ktype: of the blocks.
    """

    def __init__(self, model: nn.Module, nodes: list[fx.Node], ktype: ktypes.KType) -> None:
        self.model, self.ktype = model, ktype
        self.names = names_of(model)
        modules = {name: module for module, names in self.names.items() for name in names}
        self.calls = {n: modules[str(n.target)] for n in nodes if n.op == "call_module"}
        self.count = Counter(self.calls.values())
        self.node_of = {module: node for node, module in self.calls.items()}
        self.read = {modules[str(n.target).rpartition(".")[0]] for n in nodes if n.op == "get_attr"}
        self.owners = Counter(
            id(parameter) for module in self.names for parameter in module._parameters.values()
        )
        self.referred = {
            id(found): names[0]
            for module, names in self.names.items()
            for found in _modules_in_attributes(module)
        }

    def run(self) -> tuple[nn.Module, Report]:
        """The model, or the block that stands for it, and the report."""
        changed: dict[str, str] = {}
        kept: dict[str, str] = {}
        model = self.model
        for conv, (name, *_) in self.names.items():
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1):
                continue
            reason = self._reason_to_stay(conv)
            if reason is not None:
                kept[name] = reason
                continue
            norm, activation, absorbed = self._followers(conv)
            block = _block(conv, norm, activation, self.ktype).train(conv.training)
            changed[name] = KPointwiseConv2d.__name__
            if conv is model:
                model = block
            else:
                _replace(model, conv, block)
            for follower in absorbed:
                _replace(model, follower, nn.Identity())
        return model, Report("compress", changed, kept)

    def _reason_to_stay(self, conv: nn.Conv2d) -> str | None:
        if type(conv) not in _PLAIN:
            return _of_another_class(conv)
        if conv.groups > 1:
            return f"groups={conv.groups} is not 1"
        if conv.padding not in _UNPADDED:
            return f"padding={conv.padding} is not 0"
        if not _changes(conv, self.ktype):
            return (
                f"its kType leaves a convolution of {conv.in_channels} to {conv.out_channels} "
                f"channels as it is"
            )
        reason = self._dependent(conv)
        if reason is None and conv is not self.model and self.count[conv] != 1:
            return f"the model calls it {self.count[conv]} times"
        return reason

    def _dependent(self, module: nn.Module) -> str | None:
        """What else depends on a module, so that it cannot be replaced."""
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return "it has hooks"
        if "forward" in module.__dict__:
            return "it has a forward of its own"
        if parametrize.is_parametrized(module):
            return "it has parametrizations"
        if any(self.owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return "another module has the same parameters"
        if module in self.read:
            return "its parameters are read outside of it"
        if id(module) in self.referred:
            return f"module {self.referred[id(module)]!r} refers to it in an attribute"
        return None

    def _followers(
        self, conv: nn.Conv2d
    ) -> tuple[nn.BatchNorm2d | None, nn.Module | None, list[nn.Module]]:
        """The batch norm and activation that a convolution's result goes through, and all these.

        Nothing else may read the result, and they must be called there only.
        """
        norm: nn.BatchNorm2d | None = None
        activation: nn.Module | None = None
        absorbed: list[nn.Module] = []
        node = self.node_of.get(conv)
        while node is not None and activation is None and len(node.users) == 1:
            (node,) = node.users
            module = self.calls.get(node)
            if module is None or self.count[module] != 1 or self._dependent(module):
                break
            if norm is None and _is_batch_norm(module):
                norm = module
                inner = getattr(module, "act", None)  # of a norm that activates too, such as timm's
                activation = inner if _is_activation(inner) else None
            elif _is_activation(module):
                activation = module
            elif type(module) is not nn.Identity:
                break
            absorbed.append(module)
        return norm, activation, absorbed


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another one, under each of its names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _modules_in_attributes(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module has in lists and the like, where PyTorch does not see them."""
    waiting = [value for name, value in vars(module).items() if name != "_modules"]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            yield value
        elif type(value) is dict:
            waiting += value.values()
        elif type(value) in (list, tuple, set):
            waiting += value


class _Tracer(fx.Tracer):
    """Looks into a module only where there are convolutions to find."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(type(inner) in _PLAIN for inner in m.modules() if inner is not m)


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


class StridedKPointwiseConv2d(ReadsAsConv2d, nn.Sequential):
    """The block in the place of a pointwise convolution with strides: it reads fewer pixels.

    Args:
        stride: (vertical, horizontal).
        block: in the place of the convolution.
    """

    def __init__(self, stride: tuple[int, ...], block: KPointwiseConv2d) -> None:
        super().__init__(Subsample(*stride), block)
        self.in_channels, self.out_channels = block.in_channels, block.out_channels

    @property
    def stride(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return self[0].step  # type: ignore[return-value]


_OWN = (AcceleratedConv2d, PointwiseConv2d, DepthwiseConv2d)
_PLAIN = (nn.Conv2d, AcceleratedConv2d)
_UNPADDED = ((0, 0), "same", "valid")
_HOLDERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_NOT_ELEMENTWISE = (nn.GLU, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)


def _obstacle(conv: nn.Conv2d) -> str | None:
    """Why a convolution is none for the kernels; None if it is one."""
    if conv.kernel_size == (1, 1):
        return pointwise_obstacle(conv)
    return depthwise_obstacle(conv)


def _no_gain(conv: nn.Conv2d) -> str | None:
    """Why a convolution is better left to PyTorch; None if it is not."""
    if conv.groups > 1 or conv.in_channels <= _MOST_UNGROUPED_INPUTS:
        return None
    channels = f"{conv.in_channels} to {conv.out_channels} channels"
    return f"{channels} in one group gain nothing between PyTorch's operators"


_MOST_UNGROUPED_INPUTS = 32
"""Measurements are in docs/ALGORITHMS.md, "accelerate"."""


def _of_another_class(conv: nn.Conv2d) -> str:
    if parametrize.is_parametrized(conv):
        return "it has parametrizations"
    return f"it is a {type(conv).__name__}, not an nn.Conv2d"


def _is_batch_norm(module: Any) -> TypeGuard[nn.BatchNorm2d]:
    """Whether this is PyTorch's batch norm, or timm's, which may activate, too."""
    return type(module) is nn.BatchNorm2d or (
        isinstance(module, nn.BatchNorm2d) and type(module).__module__.startswith("timm.")
    )


def _is_activation(module: Any) -> bool:
    """Whether this is an elementwise activation without parameters."""
    return (
        isinstance(module, nn.Module)
        and "activation" in type(module).__module__  # PyTorch's and timm's
        and not isinstance(module, _NOT_ELEMENTWISE)
        and not list(module.parameters())
    )


def _changes(conv: nn.Conv2d, ktype: ktypes.KType) -> bool:
    """Whether a kType has something else for a convolution."""
    plan = ktypes.plan(ktype, conv.in_channels, conv.out_channels)
    return plan.out_channels == conv.out_channels and any(unit.groups > 1 for unit in plan.units)


def _block(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    activation: nn.Module | None,
    ktype: ktypes.KType,
) -> nn.Module:
    """What takes the place of a convolution."""
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
    return block if conv.stride == (1, 1) else StridedKPointwiseConv2d(conv.stride, block)
