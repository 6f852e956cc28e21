"""What the functions that convert models share: new classes in place, and their report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrize

from kconv._report import Report

__all__ = ["change_classes", "copied", "names_of", "report", "set_report", "unwrapped"]

_KEY = "_kconv_report"


def report(model: nn.Module) -> Report:
    """What the last conversion of a model changed, what it left, and why.

    It is kept with the model, also in its copies and pickles, but not in its state_dict.

    Example:
        >>> from kconv.torch import accelerate
        >>> model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 3))
        >>> print(report(accelerate(model)))
        accelerate: 1 changed, 1 kept
          changed  0  AcceleratedConv2d
          kept     2  16 to 4 channels in 1 groups is not depthwise

    Args:
        model: what ``accelerate``, ``compress``, ``fuse``, ``restore`` or ``to_native`` returned.

    Returns:
        The report.

    Raises:
        ValueError: if none of them returned this module.
        TypeError: if ``model`` is no module.
    """
    stored = unwrapped(model).__dict__.get(_KEY)
    if stored is None:
        raise ValueError(
            f"report: this {type(model).__name__} is none that accelerate, compress, fuse, "
            f"restore or to_native returned"
        )
    return Report(**stored)


def set_report(model: nn.Module, made: Report) -> None:
    """Keeps a report with a model: as a plain dict, so that no pickle of it needs kconv."""
    unwrapped(model).__dict__[_KEY] = asdict(made)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper and ``DataParallel``.

    Raises:
        TypeError: if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}, expected a torch.nn.Module")
    while True:
        if isinstance(model, DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module of a model, and all its names; "" is the model."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def copied(model: nn.Module, action: str) -> nn.Module:
    """A deep copy, also of modules with tensors that were computed from their parameters.

    Pruning and the older weight norm keep such a tensor as an attribute, which they compute anew
    before each call and PyTorch does not copy.
    """
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{action}: this {type(model).__name__} cannot be copied: {error}"
        ) from error


def change_classes(
    model: nn.Module,
    classes: Mapping[type[nn.Module], Callable[[Any], tuple[type[nn.Module], dict[str, Any]]]],
    action: str,
) -> dict[str, str]:
    """Gives modules another class in place; hooks and all the rest of their state stays.

    Args:
        model: any module.
        classes: for a class a function of the module that tells the class in its place, and the
            attributes that differ there.
        action: what this is called in an error.

    Returns:
        The names of the changed modules, and of their new classes.

    Raises:
        ValueError: if a module is of a class derived from one of these, whose code may compute
            anything; nothing has changed then.
    """
    plan: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    changed: dict[str, str] = {}
    for module, (name, *_) in names_of(model).items():
        own = parametrize.type_before_parametrizations(module)
        if own in classes:
            cls, attributes = classes[own](module)
            if cls is own:
                continue
            plan.append((module, cls, attributes))
            changed[name] = cls.__name__
        elif (base := next((cls for cls in own.__mro__ if cls in classes), None)) is not None:
            raise ValueError(
                f"{action}: module {name!r} is a {own.__name__}, which is derived from "
                f"{base.__name__} and may compute something else; put an exact {base.__name__}, "
                f"or a layer of PyTorch's own, in its place first"
            )
    for module, cls, attributes in plan:
        _set_class(module, cls)
        module.__dict__.update(attributes)
    return changed


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # Its class is one of its own, with a property for each parametrized tensor.
        body = {k: v for k, v in vars(type(module)).items() if k not in _MADE_BY_TYPE}
        cls = type(f"Parametrized{cls.__name__}", (cls,), body)
    module.__class__ = cls


_MADE_BY_TYPE = ("__dict__", "__weakref__")
