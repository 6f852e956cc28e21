"""A traced forward, run with its chains of layers as one operation each."""

from __future__ import annotations

import builtins
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kconv.models.graph import Conv, Layer
from kconv.torch._lift import Watch, is_in_place, is_known, lift
from kconv.torch._lift_calls import lift_call
from kconv.torch._outside import Outside
from kconv.torch._parameters import Borrowed, Parameter, parameter
from kconv.torch._plan import Call, Part, Values, divide, not_lifted, run_parts
from kconv.torch._trace import _HOOKS, HOOKED, Placeholder, State, Trace, modes, trace, visible
from kconv.torch.fused import trains

__all__ = ["Fusion", "TracedPlan", "why_not"]

Forward = Callable[..., Any]
Key = tuple[Any, ...]

_MOST_PLANS = 8
"""Kept of a module: for training, evaluation, and what else changes to and fro."""
_MOST_TRACES = 100
"""After that many, a module changes all the time, and is better called as it is."""


class Fusion:
    """The plans of a module, each for one of the states in which it has been called.

    Copies and pickles of the module make their own.
    """

    def __init__(self) -> None:
        self._plans: list[TracedPlan] = []
        self._made = 0
        self._lock = threading.RLock()

    @property
    def reason(self) -> str:
        """Why the last call had no plan."""
        return self._plans[0].reason if self._plans else "its arguments are no tensors"

    def plan(
        self, root: nn.Module, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> TracedPlan | None:
        """The plan for a call now; None if the module must be called as it is."""
        key = _key(args, kwargs)
        if key is None:
            return None
        for plan in self._plans:
            if plan.key == key and plan.holds(root):
                return plan if plan.parts is not None else None
        if self._made >= _MOST_TRACES:
            return None
        with self._lock:
            self._made += 1
            plan = TracedPlan(root, forward, key, args, kwargs)
            self._plans = [plan, *self._plans[: _MOST_PLANS - 1]]
        return plan if plan.parts is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return Fusion()

    def __reduce__(self) -> tuple[type[Fusion], tuple[()]]:
        return Fusion, ()


def _key(args: Sequence[Any], kwargs: dict[str, Any]) -> Key | None:
    """What is the same in calls that a plan stands for."""
    names = [*range(len(args)), *kwargs]
    values = [*args, *kwargs.values()]
    if not all(isinstance(v, _CONSTANTS) or type(v) in _TENSORS for v in values):
        return None
    kinds = tuple(_ANY if isinstance(v, Tensor | Placeholder) else (type(v), v) for v in values)
    return (*modes(), *names, kinds)


_ANY = "tensor"
_TENSORS = Tensor, nn.Parameter, Placeholder  # of subclasses a forward may ask which they are
_CONSTANTS = bool, int, float, str, type(None)


class TracedPlan:
    """What a forward computes, for arguments of one kind and a module in one state.

    Attributes:
        parts: what runs one after the other; None if the forward cannot be traced.
        reason: why not.
        traced: the trace.
        sources: the names of the values that come from outside.
        layers: all by name, as :func:`divide` has them.
    """

    def __init__(
        self,
        root: nn.Module,
        forward: Forward,
        key: Key,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        self.key, self._root = key, root
        self.parts: list[Part] | None = None
        self.reason = ""
        self.traced: Trace | None = None
        given = [_placeholder(value) for value in args]
        named = {name: _placeholder(value) for name, value in kwargs.items()}
        try:
            self.traced = trace(root, forward, given, named)
        except ValueError as error:
            self.reason = str(error)
        modules = visible(root, self.traced.opaque if self.traced else ())
        self._state = State(modules, Outside(modules))
        if self.traced:
            self._prepare(self.traced.nodes)

    def _prepare(self, nodes: Sequence[fx.Node]) -> None:
        nodes = _without_dead(nodes)
        modules = dict(self._root.named_modules(remove_duplicate=False))
        called = [modules[str(node.target)] for node in nodes if node.op == "call_module"]
        self._watch = Watch(called)
        self._norms = [module for module in called if hasattr(module, "running_mean")]
        self._trained = list(map(trains, self._norms))
        self._functions = _functions(nodes)
        self.sources = [node.name for node in nodes if node.op == "placeholder"]
        (output,) = (node for node in nodes if node.op == "output")
        self._output = output.args[0]
        wanted = [node.name for node in output.all_input_nodes]
        calls = [_call(node, modules) for node in nodes if node.op not in ("placeholder", "output")]
        self.parts, self.layers = divide(calls, self.sources, wanted, by_mode=True)
        self._read = [x for x in self.layers.values() if isinstance(x, Parameter) and not x.inputs]

    @property
    def output(self) -> str | None:
        """The name of the value that the forward returns; None if it returns several."""
        return self._output.name if isinstance(self._output, fx.Node) else None

    def holds(self, root: nn.Module) -> bool:
        """Whether the module is in the state that this was made for."""
        if root is not self._root or not self._state.unchanged():
            return False
        if self.parts is None:
            return True
        return (
            self._watch.unchanged()
            and list(map(trains, self._norms)) == self._trained
            and all(x.is_whole for x in self._read)
            and all(getattr(owner, name, None) is f for owner, name, f in self._functions)
        )

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the forward returns."""
        assert self.parts is not None
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        values: Values = dict(zip(self.sources, tensors, strict=True))
        del tensors, args, kwargs
        run_parts(self.parts, self._root, values)
        return _filled(self._output, values)


def why_not(call: Call, layer: Layer) -> str:
    """Why a call, which computes a layer (a plain one if that is not known), is in no chain."""
    module = call.module
    if module is None:
        return "no fused operation computes this call"
    kind = type(module).__name__
    if any(map(module.__dict__.get, _HOOKS)):
        return HOOKED
    if isinstance(module, nn.Conv2d) and isinstance(layer, Conv) and layer.groups == 1:
        return f"a {kind} without groups is PyTorch's, which computes it as fast or faster here"
    if is_known(module):
        return f"no chain can have this {kind} here"
    return f"no fused operation computes a {kind}"


def _placeholder(value: Any) -> Any:
    return Placeholder() if isinstance(value, Tensor) else value


def _filled(value: Any, values: Values) -> Any:
    """A structure of torch.fx as one of Python's own, with the values of its nodes."""
    if isinstance(value, fx.Node):
        return values[value.name]
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = (_filled(item, values) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {name: _filled(item, values) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_filled(item, values) for item in (value.start, value.stop, value.step)))
    return value


def _without_dead(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Without sizes that nobody reads."""
    read: set[fx.Node] = set()
    kept = []
    for node in reversed(nodes):
        if node in read or node.target not in (builtins.getattr, operator.getitem, "size", "dim"):
            read.update(node.all_input_nodes)
            kept.append(node)
    return kept[::-1]


def _functions(nodes: Sequence[fx.Node]) -> list[tuple[Any, str, Any]]:
    """Where the functions that are called stand, which somebody may replace."""
    called = {node.target for node in nodes if node.op == "call_function"}
    places = [(owner, getattr(f, "__name__", ""), f) for f in called for owner in (F, torch)]
    return [place for place in places if getattr(place[0], place[1], None) is place[2]]


def _call(node: fx.Node, modules: dict[str, nn.Module]) -> Call:
    inputs = tuple(other.name for other in node.all_input_nodes)
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        read = parameter(node.name, modules[owner], attribute)
        return Call(
            node.name,
            (),
            lambda root, values: getattr(modules[owner], attribute),
            None,
            lambda _: read,
        )
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)
        known = plain and is_known(module)
        in_place = is_in_place(module)
        return Call(
            node.name,
            inputs,
            _runner(node, module),
            module,
            (lambda layers: lift(module, node.name, layers)) if known else not_lifted,
            in_place,
            in_place or not (known or type(module).__module__.startswith("torch.nn.")),
            label=str(node.target),
        )
    in_place = _is_in_place(node)
    known = node.op == "call_method" or _is_pure(node.target)
    borrowed = Borrowed()
    return Call(
        node.name,
        inputs,
        _runner(node, _method(str(node.target)) if node.op == "call_method" else node.target),
        None,
        lambda layers: lift_call(node, dict(zip(inputs, layers, strict=True)), borrowed),
        in_place,
        in_place or not known,
        label=node.name,
        is_tensor_function=node.target not in _ABOUT,
        borrowed=borrowed,
    )


_ABOUT = (
    *(builtins.getattr, operator.getitem, operator.eq, operator.floordiv, torch._assert),
    *("size", "dim", "numel", "__len__", OrderedDict),
)
"""Functions that are no layers."""

_PURE = "torch", "_operator", "builtins", "collections", "math"
"""Modules whose functions leave their arguments as they are, unless their names say else."""


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.target in _CHANGING or "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    # As the last argument, where torch.nn.functional has it.
    last = node.args[-1] if node.args else None
    return getattr(F, name, None) is node.target and last is True


def _is_pure(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return False
    return (getattr(function, "__module__", None) or "torch").partition(".")[0] in _PURE


_CHANGING = tuple(
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor setitem delitem".split()
)


def _method(name: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name)(*args, **kwargs)

    return call


def _runner(node: fx.Node, target: Any) -> Any:
    """Calls a function or module with the node's arguments."""
    args, kwargs = node.args, node.kwargs
    if not kwargs and all(isinstance(arg, fx.Node) for arg in args):
        names = [arg.name for arg in args if isinstance(arg, fx.Node)]
        return lambda root, values: target(*(values[name] for name in names))

    def run(root: nn.Module, values: Values) -> Any:
        return target(*_filled(args, values), **_filled(kwargs, values))

    return run
