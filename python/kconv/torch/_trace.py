"""What a module's forward computes, as a graph of calls, and whether it still does.

The tracer is that of torch.fx, with these differences. Modules that :mod:`kconv.torch._lift` knows
are calls, and so is any module whose forward cannot be followed: it is called as it is, with all
that it does. What Python decides in a forward (``if self.training``, attributes, ``None`` or a
layer) is decided once, so all that it may depend on is compared before a trace is used again.
"""

from __future__ import annotations

import gc
import pickle
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import TraceError
from torch.jit import ScriptFunction

from kconv.torch._lift import is_known
from kconv.torch._outside import GENERATORS, Outside, frozen, members, refill
from kconv.torch._private import len_function_stack
from kconv.torch._proxy import Proxy

__all__ = ["HOOKED", "Placeholder", "State", "Trace", "is_opaque", "modes", "trace", "visible"]

_LOCK = threading.RLock()


class Trace:
    """The calls of a forward.

    Attributes:
        nodes: of torch.fx, in their order.
        through: the modules whose forward has been followed, the root first.
        opaque: why others that have modules inside are called as they are.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], through: list[nn.Module], opaque: dict[nn.Module, str]
    ) -> None:
        self.nodes, self.through, self.opaque = nodes, through, opaque


def trace(root: nn.Module, forward: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Trace:
    """Follows a forward.

    Args:
        root: the module.
        forward: its function of the module and the arguments.
        args: :class:`Placeholder` for each tensor, and constants.
        kwargs: likewise.

    Raises:
        ValueError: if it cannot be followed.
    """
    opaque: dict[nn.Module, str] = {}
    # A module that changes itself as it runs is found afterwards, and is a call the next time.
    for _ in range(10):
        modules = visible(root, opaque)
        outside = Outside(modules)
        if reason := outside.reason(root):
            raise ValueError(reason)
        state = State(modules)
        tracer = _Tracer(forward, args, kwargs, opaque, outside)
        numbers = _random_state()
        try:
            with _LOCK, _functions_are_calls(tracer):
                nodes = list(tracer.trace(root).nodes)
            if _random_state() != numbers:
                raise TraceError("it draws random numbers")
        except Exception as error:
            state.put_back()
            outside.put_back()
            raise ValueError(_reason(error)) from error
        finally:
            _set_random_state(numbers)
        changed = state.put_back()
        if outside.put_back():
            raise ValueError(_CHANGES_OUTSIDE)
        if tracer.leaked():
            raise ValueError("its forward keeps tensors outside of it")
        if not changed:
            through = [root, *(m for m in tracer.through if m is not root)]
            return Trace(nodes, list(dict.fromkeys(through)), tracer.opaque)
        if root in changed:
            raise ValueError("its forward changes attributes or buffers of the module")
        opaque |= dict.fromkeys(changed, "its forward changes attributes or buffers of the module")
    raise ValueError("forwards change attributes of their modules")


_CHANGES_OUTSIDE = "its forward changes what is outside of the module"


class Placeholder:
    """Stands for a tensor among arguments."""


def is_opaque(module: nn.Module) -> str | None:
    """Why a module's forward is not followed, as far as its state tells."""
    own = module.__dict__
    if any(map(own.get, _HOOKS)):
        return HOOKED
    if "forward" in own or "_call_impl" in own or "_compiled_call_impl" in own:
        return "it has a forward of its own"
    if isinstance(module, torch.jit.ScriptModule | nn.parallel.DistributedDataParallel):
        return f"it is a {type(module).__name__}"
    if any(isinstance(value, GENERATORS) for value in own.values()):
        return "it draws random numbers"
    return None


def visible(root: nn.Module, opaque: Any = ()) -> list[nn.Module]:
    """The modules whose forward can be followed, the root first."""
    found: dict[nn.Module, None] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module in found or (module is not root and (module in opaque or _is_call(module))):
            continue
        found[module] = None
        waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


def _is_call(module: nn.Module) -> bool:
    if is_known(module) or is_opaque(module):
        return True
    from_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return from_torch and not isinstance(module, containers)


HOOKED = "it has hooks"
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def modes() -> tuple[Any, ...]:
    """What of PyTorch's is switched on or off for a thread, and counts for what is computed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        len_function_stack(),
    )


@contextmanager
def _functions_are_calls(tracer: _Tracer) -> Iterator[None]:
    """An ``autograd.Function`` is a call, as its backward pass is its own.

    TorchScript's functions, too, read tensors as they lie in memory, where a tracer's are not.
    """
    classes: tuple[Any, Any] = Function, ScriptFunction
    own, call_script = vars(Function)["apply"], ScriptFunction.__call__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = own.__get__(None, cls)
        if tracer.is_mine and any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values())):
            return tracer.create_proxy("call_function", call, args, kwargs)
        return call(*args, **kwargs)

    def script(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.is_mine:
            raise TraceError("it calls a function of TorchScript")
        return call_script(function, *args, **kwargs)

    classes[0].apply, classes[1].__call__ = classmethod(apply), script
    try:
        yield
    finally:
        classes[0].apply, classes[1].__call__ = own, call_script


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        torch.random.get_rng_state().numpy().tobytes(),
        numpy and pickle.dumps(numpy.random.get_state(legacy=False)),
    )


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    torch.random.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(pickle.loads(state[2]))


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].partition(". ")[0].rstrip(".")
    return f"its forward cannot be traced: {text or type(error).__name__}"


class _Tracer(fx.Tracer):
    """See the module; ``through`` and ``opaque`` are as in :class:`Trace`."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        forward: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        opaque: dict[nn.Module, str],
        outside: Outside,
    ) -> None:
        super().__init__()
        self._outside, self._modes = outside, modes()
        self._call = forward, args, kwargs
        self._thread = threading.get_ident()
        self._names: dict[int, str] = {}
        self._proxies: list[weakref.ref[Any]] = []
        self.through: list[nn.Module] = []
        self.opaque = dict(opaque)

    @property
    def is_mine(self) -> bool:
        """Whether it is this thread that traces; torch.fx replaces functions for all threads."""
        return threading.get_ident() == self._thread

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuses what a node cannot tell."""
        if modes() != self._modes:
            raise TraceError("it switches gradients, autocast or another mode on or off")
        return super().create_node(*args, **kwargs)

    def leaked(self) -> bool:
        """Whether somebody outside has kept a tensor of the trace."""
        if any(proxy() is not None for proxy in self._proxies):
            gc.collect()
        return any(proxy() is not None for proxy in self._proxies)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """The root's forward, and what it is called with."""
        root: Any = self.root
        tensors = [*root.named_parameters(), *root.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}
        forward, args, kwargs = self._call

        def given(value: Any, name: str) -> Any:
            if isinstance(value, Placeholder):
                return self.create_proxy("placeholder", name, (), {})
            return value

        proxies = [given(value, f"input_{i}") for i, value in enumerate(args)]
        named = {name: given(value, f"input_{name}") for name, value in kwargs.items()}
        return lambda *tensors: forward(root, *tensors, **named), proxies

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Of a class of our own."""
        made = Proxy(node, self)
        self._proxies.append(weakref.ref(made))
        return made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called, not looked into."""
        if m in self.opaque or _is_call(m):
            reason = is_opaque(m)
            if reason and m._modules:
                self.opaque.setdefault(m, reason)
            return True
        if reason := self._outside.reason(m):
            self.opaque[m] = reason
        return reason is not None

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Follows a module's forward, or makes it a call if that is not possible."""
        if not self.is_mine:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if self._outside.put_back():
            raise TraceError(_CHANGES_OUTSIDE)
        count, stack = len(self.graph.nodes), dict(self.module_stack)
        through = len(self.through)
        numbers = _random_state()
        try:
            y = super().call_module(m, forward, args, kwargs)
            if _random_state() != numbers:
                raise TraceError("it draws random numbers")
            if self._outside.put_back():
                raise TraceError(_CHANGES_OUTSIDE)
            self.through.append(m)
            return y
        except Exception as error:
            self.opaque[m] = _reason(error)
        _set_random_state(numbers)  # what the call has drawn is none of the caller's
        del self.through[through:]
        self.module_stack.clear()
        self.module_stack.update(stack)
        for node in reversed(list(self.graph.nodes)[count:]):
            self.graph.erase_node(node)
        return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """A parameter or buffer is read at each call."""
        if self.is_mine and id(attr_val) in self._names:
            return self.create_proxy("get_attr", self._names[id(attr_val)], (), {})
        return attr_val

    def create_arg(self, a: Any) -> Any:
        """What goes into a call."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) in self._names:
                return self.create_node("get_attr", self._names[id(a)], (), {})
            raise TraceError("it uses a tensor that is neither parameter nor buffer")
        if isinstance(a, nn.Module):
            raise TraceError("it passes a module to a function")
        if type(a) is OrderedDict:  # which torch.fx would make a dict of
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        of_its_own = isinstance(a, list | tuple | dict) and type(a) not in _CONTAINERS
        if of_its_own and not hasattr(a, "_fields"):  # as namedtuples have
            raise TraceError(f"it passes on a {type(a).__name__}")
        return super().create_arg(a)


_CONTAINERS = list, tuple, dict, torch.Size, immutable_list, immutable_dict


class State:
    """What Python's decisions in the forwards of modules may depend on, as it is now.

    Args:
        modules: whose forwards are followed.
        outside: what else these read.
    """

    def __init__(self, modules: Sequence[nn.Module], outside: Outside | None = None) -> None:
        self._outside = outside
        self._names = outside.names if outside else frozenset()
        self._modules = list(modules)
        self._own = [dict(_own(module)) for module in modules]
        self._tensors = [_tensors(own) for own in self._own]
        self._versions = [_versions(tensors) for tensors in self._tensors]
        self._children = [list(own["_modules"].items()) for own in self._own]
        values = [
            (i, value)
            for i, own in enumerate(self._own)
            for name, value in own.items()
            if name not in _OF_MODULES and not isinstance(value, _CONSTANT)
        ]
        self._copies = [(i, v, type(v)(v)) for i, v in values if type(v) in (list, dict, set)]
        classes = {base for module in modules for base in type(module).__mro__}
        self._classes = [(cls, dict(vars(cls))) for cls in classes - {nn.Module, object}]
        shared = [v for _, own in self._classes for k, v in own.items() if _is_shared(k, v)]
        mutable = [*(value for _, value in values), *shared]
        self._mutable = [(value, frozen(value, self._names)) for value in mutable]
        self._present = list(map(_presence, self._own))
        self._call = nn.Module.__call__
        self._types = list(map(type, self._modules[1:]))  # the root's forward is looked up

    def unchanged(self) -> bool:
        """Whether all is as it was, but for the tensors in parameters and buffers."""
        own = list(map(_own, self._modules))
        try:
            return (
                list(map(type, self._modules[1:])) == self._types
                and own == self._own
                and [list(attributes["_modules"].items()) for attributes in own] == self._children
                and list(map(_presence, own)) == self._present
                and all(frozen(value, self._names) == was for value, was in self._mutable)
                and all(vars(cls) == attributes for cls, attributes in self._classes)
                and nn.Module.__call__ is self._call
                and (self._outside is None or self._outside.unchanged())
            )
        except Exception:  # what cannot be compared is not what it was
            return False

    def put_back(self) -> list[nn.Module]:
        """The modules that have changed themselves since; they no longer have."""
        changed = {i for i, value, copy in self._copies if members(value) != members(copy)}
        for i, value, copy in self._copies:
            if i in changed:
                refill(value, copy)
        for i, module in enumerate(self._modules):
            own, tensors = _own(module), self._tensors[i]
            if not (_same(own, self._own[i]) and _same(_tensors(own), tensors)):
                changed.add(i)
                module.__dict__.update(self._own[i])
                for name in own.keys() - self._own[i].keys():
                    del module.__dict__[name]
                for kind in ("_parameters", "_buffers"):
                    own[kind].clear()
                for (kind, name), tensor in tensors.items():
                    own[kind][name] = tensor
            if _versions(tensors) != self._versions[i]:
                changed.add(i)
        return [self._modules[i] for i in sorted(changed)]


def _own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes but for kconv's notes."""
    own = module.__dict__
    if "_kconv_report" in own or "_kconv_fusion" in own:
        return {name: value for name, value in own.items() if name not in _NOTES}
    return own


def _same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(one[k] is other[k] for k in one)


def _tensors(own: dict[str, Any]) -> dict[tuple[str, str], Any]:
    kinds = ("_parameters", "_buffers")
    return {(kind, name): value for kind in kinds for name, value in own[kind].items()}


def _versions(tensors: dict[tuple[str, str], Any]) -> list[int]:
    return [t._version for t in tensors.values() if t is not None and not t.is_inference()]


def _presence(own: dict[str, Any]) -> list[Any]:
    parameters, buffers = own["_parameters"], own["_buffers"]
    return [
        list(parameters),
        [value is None for value in parameters.values()],
        list(buffers),
        [value is None for value in buffers.values()],
        any(map(own.get, _HOOKS)),
    ]


def _is_shared(name: str, value: Any) -> bool:
    """Whether a value in a class can change in its place."""
    return not (name.startswith("__") or isinstance(value, _CONSTANT) or hasattr(value, "__get__"))


_CONSTANT = int | float | str | bool | None | types.FunctionType | type | nn.Module
_NOTES = frozenset({"_kconv_report", "_kconv_fusion"})
_OF_MODULES = frozenset(nn.Module().__dict__)
