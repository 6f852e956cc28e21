"""Fused chains of layers in models of any origin."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from kconv._report import Report
from kconv.torch._conversion import set_report, unwrapped
from kconv.torch._parameters import Parameter
from kconv.torch._private import has_any_global_hook
from kconv.torch._trace import HOOKED, Placeholder, is_opaque
from kconv.torch._traced import Fusion, TracedPlan, why_not
from kconv.torch.fused import is_watched

__all__ = ["fuse", "traced", "unfuse"]

_KEY = "_kconv_fusion"


def fuse(model: nn.Module) -> nn.Module:
    """Has chains of a model's layers run as one operation each, in place.

    Convolutions, batch norms, activations, squeeze-excites, sums and the like that follow each
    other become one operation, forward, backward and in inference, on the parameters and buffers of
    the model's own modules. The model stays the same object, with the same modules, parameters,
    ``state_dict``, hooks and mode; its class becomes one derived from its own. What no fused
    operation computes runs by the model's own layers, and so does everything where the fused
    operation could not be noticed to differ: under hooks on inner modules, in autocast to float16,
    compilers, tracers and function transforms, on other devices and dtypes. In bfloat16, and in
    autocast to it, what an operation stores on its way is bfloat16, what it computes with float32.

    Forwards are followed by ``torch.fx``. Of a model that this cannot follow, the largest modules
    are fused that it can. What a forward's code depends on (attributes, modes, the modules) is
    compared at every call, and followed anew after changes.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.bn = nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8)
        ...
        ...     def forward(self, x):
        ...         return x + nn.functional.relu(self.bn(self.conv(x)))
        >>> model = fuse(nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(200, 3)))
        >>> model(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 3])
        >>> from kconv.torch import report
        >>> print(report(model))
        fuse: 1 changed, 2 kept
          changed  0.conv  8 layers as one operation, to add_1
          kept     2       no chain can have this Flatten here
          kept     3       no chain can have this Linear here

    Args:
        model: any module.

    Returns:
        The model. :func:`kconv.torch.report` lists the chains, and what stayed outside and why;
        :func:`kconv.torch.restore` changes the model back.

    Raises:
        TypeError: if ``model`` is no module.
    """
    inner = unwrapped(model)
    unfuse(inner)
    changed: dict[str, str] = {}
    kept: dict[str, str] = {}
    _fuse(inner, "", changed, kept)
    set_report(model, Report("fuse", changed, kept))
    return model


def unfuse(model: nn.Module) -> dict[str, str]:
    """Gives fused modules their own classes again; returns their names and these."""
    restored = {}
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            module.__dict__.pop(_KEY, None)  # without it a module's own forward runs
            cls: Any = type(module).own_class
            restored[name] = cls.__name__
            if type(module).__bases__ == (Fused, cls):
                module.__class__ = cls
    return restored


def traced(module: nn.Module) -> TracedPlan:
    """A plan for a module in the mode that it is in; itself, it must not be fused."""
    args, kwargs = _arguments(module)
    return TracedPlan(module, type(module).forward, (), args, kwargs)


def _fuse(module: nn.Module, name: str, changed: dict[str, str], kept: dict[str, str]) -> bool:
    """Fuses a module, or those in it; returns whether there is a chain."""
    if isinstance(module, Fused):  # it is in another one, too
        return True
    prefix = f"{name}." if name else ""
    children = list(module.named_children())
    if not children:
        return False
    container = type(module).forward is nn.Module.forward  # it has none, as an nn.ModuleList
    reason = is_opaque(module)
    fusion = Fusion()
    plan = None
    if not container and (reason is None or reason == HOOKED):
        plan = fusion.plan(module, type(module).forward, *_arguments(module))
        reason = fusion.reason
    if plan is None:
        if not container:
            kept[name] = str(reason)
        fused = [_fuse(child, prefix + key, changed, kept) for key, child in children]
        return any(fused)
    assert plan.traced is not None
    assert plan.parts is not None
    cls: Any = type(module)
    has_chain = any(part.fused for part in plan.parts)
    if has_chain:
        module.__dict__[_KEY] = fusion
        module.__class__ = _fused_class(cls)
    _describe(plan, prefix, changed, kept)
    names = {child: key for key, child in module.named_modules()}
    outside = list(plan.traced.opaque)  # what is in another one before that
    inner = [_fuse(child, prefix + names[child], changed, kept) for child in reversed(outside)]
    if has_chain and any(inner):  # modules that are called are of other classes now
        fusion.plan(module, cls.forward, *_arguments(module))
    return has_chain or any(inner)


def _arguments(module: nn.Module) -> tuple[list[Placeholder], dict[str, Any]]:
    """A tensor for each argument that a forward must have."""
    signature = inspect.signature(type(module).forward)
    own = list(signature.parameters.values())[1:]
    positional = [p for p in own if p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    count = len(positional) or int(any(p.kind == p.VAR_POSITIONAL for p in own))
    return [Placeholder() for _ in range(count)], {}


def _describe(plan: TracedPlan, prefix: str, changed: dict[str, str], kept: dict[str, str]) -> None:
    assert plan.parts is not None
    assert plan.traced is not None
    for part in plan.parts:
        first, last = part.calls[0], part.calls[-1]
        layer = plan.layers[first.name]
        if part.fused:
            count = len(part.fused.segment.layers)
            text = f"{count} layers as one operation, to {last.label}"
            changed[prefix + first.label] = text
        elif first.module is not None:
            reason = plan.traced.opaque.get(first.module)
            kept[prefix + first.label] = reason or why_not(first, layer)
        elif first.is_tensor_function and not isinstance(layer, Parameter):
            kept[prefix + first.label] = why_not(first, layer)


class Fused:
    """What the classes of fused modules are derived from, beside their own.

    Attributes:
        own_class: the module's own.
    """

    own_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made anew where a pickle or a copy is."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        function, args, *rest = reduced
        if function is copyreg.__newobj__ and args[0] is type(self):  # type: ignore[attr-defined]
            return _new, (type(self).own_class, *args[1:]), *rest
        if function is type(self):
            return _make, (type(self).own_class, *args), *rest
        return reduced

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: the module's own forward."""
        cls = type(self).own_class
        plain = cls.__new__(cls)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != _KEY})
        prepare = getattr(plain, "__prepare_scriptable__", None)
        return plain if prepare is None else prepare()


@contextmanager
def _in_own_class(module: Any) -> Iterator[None]:
    """What torch.fx writes into the class of a module belongs into the module's own."""
    fused = type(module)
    module.__class__ = fused.own_class
    try:
        yield
    finally:
        module.__class__ = fused


def _recompile(self: Any) -> Any:
    with _in_own_class(self):
        return self.recompile()


def _copy_graph_module(self: Any, memo: dict[int, Any]) -> Any:
    with _in_own_class(self):
        made: Any = copy.deepcopy(self, memo)
    cls: Any = type(made)
    made.__dict__[_KEY] = Fusion()
    made.__class__ = _fused_class(cls)
    return made


def _new(cls: Any, *args: Any) -> Any:
    fused = _fused_class(cls)
    return fused.__new__(fused, *args)


def _make(cls: Any, *args: Any) -> Any:
    return _fused_class(cls)(*args)


@functools.cache
def _fused_class(cls: Any) -> Any:
    """A class whose forward runs a module's plan."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fusion = self.__dict__.get(_KEY)
        if fusion is None or is_watched() or has_any_global_hook():
            return cls.forward(self, *args, **kwargs)
        plan = fusion.plan(self, cls.forward, args, kwargs)
        if plan is None:
            return cls.forward(self, *args, **kwargs)
        return plan.run(args, kwargs)

    body = {"forward": forward, "own_class": cls, "__module__": cls.__module__}
    if issubclass(cls, fx.GraphModule):
        body |= {"recompile": _recompile, "__deepcopy__": _copy_graph_module}
    return type(f"Fused{cls.__name__}", (Fused, cls), body)
