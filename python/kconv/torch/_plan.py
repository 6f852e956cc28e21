"""How a chain of modules runs: which of them as one operation, which by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kconv.models import graph
from kconv.models.fusion import Segment, partition
from kconv.torch._lift import UNKNOWN, Watch, is_chain, is_in_place, lift
from kconv.torch.fused import FusedSegment

__all__ = ["Plan"]

Step = tuple[str, tuple[str, ...]]
"""The name of a module, which is that of its output, and the names of what it reads."""


@dataclass
class _Call:
    """A module that runs by itself: what has that name in its owner at the time.

    Attributes:
        owner: a container among the modules; None for that of all.
    """

    name: str
    inputs: tuple[str, ...]
    owner: nn.Module | None
    key: str

    def __call__(self, root: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        result: Tensor = getattr(self.owner or root, self.key)(*inputs)
        return result


@dataclass
class _Part:
    """What runs together, and the tensors that are read for the last time by it."""

    calls: list[_Call]
    fused: FusedSegment | None
    finished: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.calls[-1].name

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.fused.segment.inputs if self.fused else self.calls[0].inputs


class Plan:
    """Runs modules as they are now, chains of those that can be lifted as one operation each.

    Containers that only call their children are looked into. A plan holds good as long as
    :meth:`holds` says so.

    Attributes:
        graph: the modules' layers; plain ones stand for those that run by themselves.

    Args:
        root: the module that owns them.
        steps: the names of modules in the root and what they read, in the order of their calls.
        source: the name of the tensor that goes in.
        output: the name of the tensor that comes out.
    """

    def __init__(self, root: nn.Module, steps: Sequence[Step], source: str, output: str) -> None:
        self._source, self._output = source, output
        self._keys = [name for name, _ in steps]
        self._children = list(map(root._modules.get, self._keys))
        self._containers: list[tuple[nn.Module, list[nn.Module | None]]] = []
        self._modules: dict[str, nn.Module | None] = {}
        self._calls: dict[str, _Call] = {}
        for (name, inputs), module in zip(steps, self._children, strict=True):
            self._add(_Call(name, inputs, None, name), module, name)
        watched = [*self._modules.values(), *(container for container, _ in self._containers)]
        # Made before the modules are lifted, so that no change goes unseen between.
        self._watch = Watch([module for module in watched if module is not None])
        self.graph = self._graph()
        self._parts = self._partition(self.graph)

    def _add(self, call: _Call, module: nn.Module | None, path: str) -> None:
        """A module, or those in a container, of which the last has the container's name."""
        if not (is_chain(module) and module):
            self._calls[call.name], self._modules[call.name] = call, module
            return
        children = module._modules
        self._containers.append((module, list(children.values())))
        inputs = call.inputs
        for number, (key, child) in enumerate(children.items(), 1):
            inner = f"{path}.{key}"
            name = call.name if number == len(children) else inner
            self._add(_Call(name, inputs, module, key), child, inner)
            inputs = (name,)

    def _graph(self) -> graph.Graph:
        """See :attr:`graph`."""
        readers = Counter(name for call in self._calls.values() for name in call.inputs)
        layers: dict[str, graph.Layer] = {
            self._source: graph.Input(name=self._source, inputs=(), shape=UNKNOWN)
        }
        for name, call in self._calls.items():
            module, inputs = self._modules[name], [layers[source] for source in call.inputs]
            layer = lift(module, name, inputs)
            if is_in_place(module) and not (
                # Whose result is new and read by nobody else, so that nobody sees it change.
                isinstance(inputs[0], graph.Conv | graph.BatchNorm) and readers[inputs[0].name] == 1
            ):
                layer = None
            layers[name] = layer or graph.Layer(name=name, inputs=call.inputs, shape=UNKNOWN)
            if layer is not None:
                _settle_inputs(layers, layer)
        for name, layer in layers.items():
            if layer.shape[-1] is None and name != self._source:
                layers[name] = graph.Layer(name=name, inputs=layer.inputs, shape=UNKNOWN)
        return graph.Graph("", tuple(layers.values()), self._output)

    def _partition(self, layers: graph.Graph) -> list[_Part]:
        parts: list[_Part] = []
        for part in partition(layers):
            if isinstance(part, Segment):
                calls = [self._calls[layer.name] for layer in part.layers]
                parts.append(_Part(calls, FusedSegment(part, self._modules)))
            else:
                parts.append(_Part([self._calls[part.name]], None))
        last = {name: i for i, made in enumerate(parts) for name in made.inputs}
        for i, made in enumerate(parts):
            made.finished = tuple(name for name in set(made.inputs) if last[name] == i)
        return parts

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        """The modules of the graph's layers, by their names there."""
        return dict(self._modules)

    @property
    def segments(self) -> dict[str, FusedSegment]:
        """The fused chains by the name of the tensor that goes in."""
        return {part.inputs[0]: part.fused for part in self._parts if part.fused}

    def holds(self, root: nn.Module) -> bool:
        """Whether a module owns the same modules, and they are as they were."""
        if list(map(root._modules.get, self._keys)) != self._children:
            return False
        for container, children in self._containers:
            if list(container._modules.values()) != children:
                return False
        return self._watch.unchanged()

    def run(self, root: nn.Module, x: Tensor) -> Tensor:
        """The output for an input."""
        values = {self._source: x}
        for part in self._parts:
            inputs = [values[name] for name in part.inputs]
            y: Any = part.fused(inputs[0]) if part.fused else None
            values[part.name] = _run(part.calls, root, part.inputs, inputs) if y is None else y
            for name in part.finished:  # so that inference keeps only what is still to be read
                del values[name]
            del inputs
        return values[self._output]


def _run(
    calls: Sequence[_Call], root: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]
) -> Tensor:
    """One by one."""
    if len(calls) == 1:
        return calls[0](root, inputs)
    values = dict(zip(names, inputs, strict=True))
    last = {name: i for i, call in enumerate(calls) for name in call.inputs}
    for i, call in enumerate(calls):
        values[call.name] = call(root, [values[name] for name in call.inputs])
        for name in {*call.inputs}:
            if last[name] == i:
                del values[name]
    return values[calls[-1].name]


_PRESERVING = (
    graph.Activation
    | graph.Add
    | graph.BatchNorm
    | graph.Dropout
    | graph.Flatten
    | graph.GlobalPool
    | graph.Identity
    | graph.Interleave
    | graph.Multiply
    | graph.Pool
    | graph.Reshape
    | graph.ZeroPad
)
"""Layers whose inputs have as many channels as their output."""


def _settle_inputs(layers: dict[str, graph.Layer], layer: graph.Layer) -> None:
    """What a layer's channels tell about those of its inputs, and of theirs."""
    channels = layer.shape[-1] if isinstance(layer, _PRESERVING) else None
    if isinstance(layer, graph.Conv):
        channels = layer.in_channels
    if channels is None:
        return
    for name in layer.inputs:
        source = layers[name]
        if source.shape[-1] is None:
            layers[name] = replace(source, shape=(*source.shape[:-1], channels))
            _settle_inputs(layers, layers[name])
