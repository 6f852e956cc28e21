"""What stands for a value while a forward is followed, and says of which class the value is.

Code asks whether a size is a number or a tensor, or whether a module has returned a tuple; its
answer decides what it computes. (timm's "same" padding rounds a number by ``math`` and a tensor by
a method.) Of what is not known nobody is told anything: the forward cannot be followed there.
"""

from __future__ import annotations

import builtins
import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

from kconv.torch._lift import is_known

__all__ = ["Proxy"]

_CLASS = "kconv_class"
"""Under which a node's notes have the class of its value."""


class Proxy(fx.Proxy):
    """A value that is not there yet; code that wants its class is told that of the value."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer) -> None:
        super().__init__(node, tracer)
        if node.op == "call_module":
            node.meta[_CLASS] = _class_of_module(tracer.root.get_submodule(str(node.target)))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return _told(_class_of(self.node), Tensor)

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):  # nn.Parameter and nn.Buffer ask it
            return False
        cls = _class_of(self.node) or Tensor
        if not hasattr(cls, name):
            if cls is not Tensor or self.node.op == "placeholder":
                raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
            raise TraceError(f"it asks a value for an attribute {name!r}")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise TraceError(f"it sets the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)


class _Attribute(Attribute):
    """An attribute of such a value, or a method that is still to be called."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return _told(_class_of_attribute(self.attr), Attribute)


def _told(cls: type | None, for_torch: type) -> type:
    """What is told who wants a class; PyTorch's own code, which handles proxies, ``for_torch``."""
    asks = str(sys._getframe(2).f_globals.get("__name__"))
    if asks.startswith("torch."):
        return for_torch
    if cls is None:
        raise TraceError("it asks which class a value has that may be of several")
    return cls


def _class_of(node: fx.Node) -> type | None:
    """The class of a node's value; None if that is not known."""
    if _CLASS not in node.meta:
        node.meta[_CLASS] = _find_class(node)
    cls: type | None = node.meta[_CLASS]
    return cls


def _find_class(node: fx.Node) -> type | None:
    args, target = node.args, node.target
    if node.op in ("placeholder", "get_attr"):
        return Tensor
    if target is builtins.getattr:
        return _class_of_attribute(str(args[1]))
    if target is operator.getitem:
        return _class_of_item(args[0], args[1])
    name = str(target) if node.op == "call_method" else getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        classes = [_class_of(x) if isinstance(x, fx.Node) else type(x) for x in args]
        return _class_of_operation(name, classes)
    if name in ("size", "stride"):
        return int if len(args) + len(node.kwargs) > 1 else torch.Size
    if name in _CLASSES:
        return _CLASSES[name]
    package = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
    is_class_method = isinstance(getattr(target, "__self__", None), type)
    return Tensor if package == "torch" and not is_class_method else None


def _class_of_module(module: nn.Module) -> type | None:
    if is_known(module):
        return Tensor
    several = isinstance(module, nn.RNNBase | nn.MultiheadAttention)
    several = several or bool(getattr(module, "return_indices", False))
    return Tensor if type(module).__module__.startswith("torch.nn.") and not several else None


def _class_of_attribute(name: str) -> type | None:
    if name in ("T", "mT", "H", "mH", "data", "real", "imag"):
        return Tensor
    if name == "shape":
        return torch.Size
    return _CLASSES.get(name)


def _class_of_item(source: Any, index: Any) -> type | None:
    cls = _class_of(source) if isinstance(source, fx.Node) else type(source)
    if cls is torch.Size:
        return torch.Size if isinstance(index, slice) else int
    if cls is None and getattr(source.target, "__name__", source.target) in _PIECES:
        return Tensor
    return Tensor if cls is Tensor else None


def _class_of_operation(name: str, classes: list[type | None]) -> type | None:
    if Tensor in classes:
        return Tensor
    if not all(cls in (int, float, bool) for cls in classes):
        return None
    if name in ("eq", "ne", "lt", "le", "gt", "ge"):
        return bool
    return float if name == "truediv" or float in classes else int


_PIECES = "chunk", "split", "split_with_sizes", "tensor_split", "unbind"
_CLASSES: dict[str, type | None] = {
    **dict.fromkeys(("dim", "ndim", "ndimension", "numel", "nelement", "__len__"), int),
    **dict.fromkeys(("get_device", "element_size", "itemsize", "storage_offset"), int),
    **dict.fromkeys(("is_contiguous", "is_floating_point", "is_complex", "requires_grad"), bool),
    "dtype": torch.dtype,
    "device": torch.device,
    # Several tensors, or something else, according to the arguments or the values.
    **dict.fromkeys((*_PIECES, "item", "tolist", "numpy", "type", "max", "min", "sort", "topk")),
    **dict.fromkeys("median mode kthvalue cummax cummin aminmax unique unique_consecutive".split()),
    **dict.fromkeys("nonzero where var_mean std_mean meshgrid broadcast_tensors".split()),
    **dict.fromkeys("hsplit vsplit dsplit frexp svd qr eigh slogdet lstm gru".split()),
}
"""What is no tensor, by the names of functions, methods and attributes."""
