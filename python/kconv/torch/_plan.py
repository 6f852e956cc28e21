"""How modules run one after the other: which of them as one operation, which by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

from kconv.models import graph
from kconv.models.chains import Chain, Node, find_chains
from kconv.models.fusion import Segment, is_fusable, may_end
from kconv.torch._lift import UNKNOWN, Derived, Watch, is_chain, is_in_place, is_known, lift
from kconv.torch._parameters import Borrowed, Parameter
from kconv.torch.fused import FusedSegment, trains

__all__ = ["Call", "Part", "Plan", "Step", "divide", "not_lifted", "run_parts"]

Values = dict[str, Any]
"""Tensors, and what else is computed on the way, by their names."""


@dataclass
class Call:
    """Something that is called by itself, where it is not fused.

    Attributes:
        name: of the value that it gives.
        inputs: the names of the values that it reads.
        run: computes the value, for the module that all is about.
        module: what is called; None for functions.
        lift: the layers that compute the same from the layers that it reads; () for none.
        in_place: whether it writes its result into its first input.
        writes: whether it may change any of its inputs.
        label: what users know it by.
        is_tensor_function: whether it is a function that a layer might have been.
        borrowed: which parameters the layers have, if a function's.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Any, Values], Any]
    module: nn.Module | None
    lift: Callable[[Sequence[graph.Layer]], tuple[graph.Layer, ...]]
    in_place: bool = False
    writes: bool = False
    label: str = ""
    is_tensor_function: bool = False
    borrowed: Borrowed | None = None

    @property
    def owner(self) -> Any:
        """What has the weights and the state of the layers."""
        return self.borrowed or self.module

    def owner_of(self, layer: graph.Layer) -> Any:
        """What has the weights of one of the layers: of a norm that activates, too, its PReLU."""
        if self.module is not None and isinstance(layer, graph.PReLU):
            return self.module._modules.get("act", self.module)
        return self.owner


@dataclass
class Part:
    """What runs together, and what is read for the last time by it."""

    calls: list[Call]
    fused: FusedSegment | None
    finished: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the value that comes out."""
        return self.calls[-1].name

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the values that go in."""
        return self.fused.segment.inputs if self.fused else self.calls[0].inputs


def run_parts(parts: Sequence[Part], root: nn.Module, values: Values) -> None:
    """Computes the values of parts, and keeps only what is still to be read."""
    for part in parts:
        fused = part.fused
        y = fused(values[fused.segment.input]) if fused else None
        if y is not None:
            values[part.name] = y
        else:
            _run_each(part, root, values)
        for name in part.finished:
            del values[name]


def _run_each(part: Part, root: nn.Module, values: Values) -> None:
    if len(part.calls) == 1:
        values[part.name] = part.calls[0].run(root, values)
        return
    last = {name: i for i, call in enumerate(part.calls) for name in call.inputs}
    inner = {call.name for call in part.calls[:-1]}
    for i, call in enumerate(part.calls):
        values[call.name] = call.run(root, values)
        for name in {call.name, *call.inputs} & inner:
            if last.get(name, i) == i:
                del values[name]


def divide(
    calls: Sequence[Call],
    sources: Sequence[str],
    outputs: Iterable[str],
    *,
    by_mode: bool = False,
    recompute: bool = False,
) -> tuple[list[Part], dict[str, graph.Layer]]:
    """The parts in which calls run, the largest chains of them fused.

    Args:
        calls: in their order.
        sources: the names of the values that come from outside.
        outputs: the names of the values that are wanted.
        by_mode: whether chains end where batch norms that train meet others that do not (which a
            fused operation cannot compute), or else are made for any mode.
        recompute: whether chains keep little for their backward passes.

    Returns:
        The parts, and all layers by name; plain ones stand for what no layer computes.
    """
    outputs = list(outputs)
    lifted, layers = _lift_all(calls, sources, outputs)
    # What only parameters are read for is read first, so that chains can be tried and left alone.
    calls = sorted(calls, key=lambda call: not isinstance(layers.get(call.name), Parameter))
    chains = _chains(calls, sources, outputs, lifted, layers, by_mode)
    while moved := _moved_draws(calls, chains.values(), lifted, by_mode):
        for call in moved:
            _leave(call, lifted, layers)
        chains = _chains(calls, sources, outputs, lifted, layers, by_mode)
    by_name = {call.name: call for call in calls}
    parts: list[Part] = []
    done: set[str] = set()
    for call in calls:
        chain = chains.get(call.name)
        if chain is not None:
            members = [by_name[name] for name in chain.nodes]
            fused = _fuse(chain.input, members, lifted, layers, recompute)
            parts.append(Part(members, fused))
            done |= {member.name for member in members}
        elif call.name not in done:
            parts.append(Part([call], None))
    _set_finished(parts, sources, outputs)
    return parts, layers


def _chains(
    calls: Sequence[Call],
    sources: Sequence[str],
    outputs: Sequence[str],
    lifted: dict[str, tuple[graph.Layer, ...]],
    layers: dict[str, graph.Layer],
    by_mode: bool,
) -> dict[str, Chain]:
    """The chains by the names of their first calls."""
    nodes = _nodes(calls, sources, lifted, layers, by_mode)
    # By mode, a single layer is no chain, as it has nothing to be fused with. (The 7x7 of ConvNeXt,
    # between LayerNorms: inference of convnext_atto takes 1.1 times as long with these fused.)
    return {
        chain.nodes[0]: chain
        for chain in find_chains(sources, nodes, outputs, starts=_values(layers))
        if not by_mode or sum(len(lifted[name]) for name in chain.nodes) > 1
    }


def _moved_draws(
    calls: Sequence[Call],
    chains: Iterable[Chain],
    lifted: dict[str, tuple[graph.Layer, ...]],
    by_mode: bool,
) -> list[Call]:
    """The calls that would draw their random numbers in a chain, before others that they follow."""
    places = {call.name: i for i, call in enumerate(calls)}
    run = places | {name: places[chain.nodes[0]] for chain in chains for name in chain.nodes}
    latest, moved = 0, []
    for call in calls:
        if _may_draw(call, lifted[call.name], by_mode):
            if run[call.name] < latest:
                moved.append(call)
            latest = max(latest, run[call.name])
    return moved


def _may_draw(call: Call, own: Sequence[graph.Layer], by_mode: bool) -> bool:
    """Whether a call may draw random numbers; what is not known may."""
    module = call.module
    if own:
        drops = any(isinstance(layer, graph.Dropout) for layer in own)
        return drops and not (by_mode and module is not None and not module.training)
    if module is None:
        return call.is_tensor_function
    return not is_known(module) or isinstance(module, _DROPOUTS)


def _values(layers: dict[str, graph.Layer]) -> set[str]:
    """The names of what a chain may read."""
    return {name for name, layer in layers.items() if not isinstance(layer, Derived)}


def _nodes(
    calls: Sequence[Call],
    sources: Sequence[str],
    lifted: dict[str, tuple[graph.Layer, ...]],
    layers: dict[str, graph.Layer],
    by_mode: bool,
) -> list[Node]:
    readers: dict[str, list[graph.Layer]] = {name: [] for name in layers}
    for layer in layers.values():
        for name in layer.inputs:
            readers[name].append(layer)
    memory = _memory(calls, sources, lifted)
    nodes = []
    for call in calls:
        own = [layers[layer.name] for layer in lifted[call.name]]
        norms = any(isinstance(layer, graph.BatchNorm) for layer in own)
        nodes.append(
            Node(
                call.name,
                tuple(name for name in call.inputs if not isinstance(layers[name], Parameter)),
                fusable=bool(own)
                and all(isinstance(x, Derived) or is_fusable(x, readers[x.name]) for x in own)
                and not (by_mode and any(map(_loses, own))),
                ends=bool(own) and not isinstance(own[-1], Derived) and may_end(own[-1]),
                is_convolution=any(map(_wins if by_mode else _convolves, own)),
                mode=trains(call.owner) if norms and by_mode else None,
                writes=_written(call, memory) if call.writes else (),
            )
        )
    return nodes


def _memory(
    calls: Sequence[Call], sources: Sequence[str], lifted: dict[str, tuple[graph.Layer, ...]]
) -> dict[str, set[str]]:
    """For each value those in whose memory it may be."""
    memory = {name: {name} for name in sources}
    for call in calls:
        own = memory[call.name] = {call.name}
        if call.in_place or _may_be_its_input(lifted[call.name]):
            own.update(*(memory[name] for name in call.inputs))
    return memory


def _written(call: Call, memory: dict[str, set[str]]) -> tuple[str, ...]:
    """The values that a call may change."""
    places = set().union(*(memory[name] for name in call.inputs))
    return tuple(name for name, own in memory.items() if not own.isdisjoint(places))


def _convolves(layer: graph.Layer) -> bool:
    return isinstance(layer, graph.Conv | graph.DepthwiseConv) and _image(layer)


def _wins(layer: graph.Layer) -> bool:
    """Whether a convolution makes a chain faster than PyTorch's layers: if it has groups.

    The operations round it gain less than an ungrouped convolution loses beside oneDNN's, and by
    themselves they gain nothing. (PyTorch's processor time, channels_last, one thread, of a step
    over that with norms and activations alone fused, and with pointwise convolutions too: 0.88 and
    1.00 of DenseNet-121, 8 images of 192 x 192; 0.96 and 0.93 of ResNet-50, 4 images.)
    """
    return isinstance(layer, graph.Conv) and _image(layer) and layer.groups > 1


def _loses(layer: graph.Layer) -> bool:
    """Whether a convolution is better left to PyTorch, whatever stands round it.

    So if it is larger than 1x1 and reads more than a few channels. (ResNet-50, 4 images of 96 x 96,
    one thread: 949 ms of processor time for a step with all fused, 355 by PyTorch. In groups it may
    read more: PyTorch's time over that with all fused, two threads, of a step and of inference, is
    1.28 and 1.16 for groups of 16 channels (RegNetY-008, 8 images of 224 x 224), 0.99 and 1.07 for
    those of 24 (RegNetY-032, 4 of 160 x 160), 0.96 and 1.03 for those of 56 (RegNetX-064).)
    """
    if not isinstance(layer, graph.Conv) or layer.kernel_size == (1, 1):
        return False
    most = _MOST_DENSE_INPUTS if layer.groups == 1 else _MOST_GROUPED_INPUTS
    return layer.in_channels // layer.groups > most


_MOST_DENSE_INPUTS = 4
_MOST_GROUPED_INPUTS = 16


def _lift_all(
    calls: Sequence[Call], sources: Sequence[str], outputs: Sequence[str]
) -> tuple[dict[str, tuple[graph.Layer, ...]], dict[str, graph.Layer]]:
    """For each call its layers, and all layers by name; plain ones stand for all other calls."""
    readers: dict[str, list[int]] = {name: [len(calls)] for name in outputs}
    for i, call in enumerate(calls):
        for name in call.inputs:
            readers.setdefault(name, []).append(i)
    layers: dict[str, graph.Layer] = {
        name: graph.Input(name=name, inputs=(), shape=UNKNOWN) for name in sources
    }
    lifted: dict[str, tuple[graph.Layer, ...]] = {}
    new: set[str] = set()  # values in memory of their own
    for i, call in enumerate(calls):
        made = call.lift([layers[source] for source in call.inputs])
        source = call.inputs[0] if call.inputs else ""
        others = [other for other in readers.get(source, ()) if other != i]
        if call.in_place and not (
            source in new
            and all(
                other < i and not _may_be_its_input(lifted[calls[other].name]) for other in others
            )
        ):
            made = ()  # others see what it changes
        same = call.in_place or _may_be_its_input(made)
        if made and (not same or (source in new and (call.in_place or not others))):
            new.add(call.name)
        lifted[call.name] = made
        for layer in made or (graph.Layer(name=call.name, inputs=call.inputs, shape=UNKNOWN),):
            layers[layer.name] = layer
            _settle_inputs(layers, layer)
    for call in calls:
        if any(
            layers[layer.name].shape[-1:] == (None,) and not isinstance(layer, Derived)
            for layer in lifted[call.name]
        ):
            _leave(call, lifted, layers)
    _leave_what_changes(calls, sources, lifted, layers)
    return lifted, layers


def _leave_what_changes(
    calls: Sequence[Call],
    sources: Sequence[str],
    lifted: dict[str, tuple[graph.Layer, ...]],
    layers: dict[str, graph.Layer],
) -> None:
    """Calls whose parameters a forward changes on its way run where they stand."""
    memory = _memory(calls, sources, lifted)
    changed = [name for call in calls if call.in_place for name in _written(call, memory)]
    parameters = {id(x.tensor) for x in map(layers.get, changed) if isinstance(x, Parameter)}
    for call in calls if parameters else ():
        if lifted[call.name] and not parameters.isdisjoint(map(id, _tensors(call))):
            _leave(call, lifted, layers)


def _leave(
    call: Call, lifted: dict[str, tuple[graph.Layer, ...]], layers: dict[str, graph.Layer]
) -> None:
    """Has a call run by itself; of its layers a plain one is left."""
    lifted[call.name] = ()
    shape = layers[call.name].shape
    layers[call.name] = graph.Layer(name=call.name, inputs=call.inputs, shape=shape)


def _tensors(call: Call) -> list[Any]:
    """The parameters and buffers of a call's layers."""
    if call.borrowed:
        return list(call.borrowed._buffers.values())
    return [*call.module.parameters(), *call.module.buffers()] if call.module else []


def _image(layer: graph.Layer) -> bool:
    return len(layer.shape) == 3


def _fuse(
    source: str,
    calls: Sequence[Call],
    lifted: dict[str, tuple[graph.Layer, ...]],
    layers: dict[str, graph.Layer],
    recompute: bool,
) -> FusedSegment:
    own: list[tuple[graph.Layer, Any]] = []
    read = {calls[-1].name}
    for call in reversed(calls):
        for lifted_layer in reversed(lifted[call.name]):
            layer = layers[lifted_layer.name]
            if layer.name in read and not isinstance(layer, Derived):
                own.append((layer, call.owner_of(layer)))
                read.update(layer.inputs)
    own.reverse()
    chain, channels = tuple(layer for layer, _ in own), layers[source].channels
    segment = _shared(Segment(chain, source, channels, recompute))
    return FusedSegment(segment, {layer.name: owner for layer, owner in own})


@lru_cache(maxsize=256)
def _shared(segment: Segment) -> Segment:
    """One for all that are equal, so that a copy of a network makes no programs of its own."""
    return segment


def _set_finished(parts: Sequence[Part], sources: Sequence[str], outputs: Sequence[str]) -> None:
    last: dict[str, int] = dict.fromkeys(sources, -1)
    for i, part in enumerate(parts):
        last[part.name] = i  # where nobody reads it
        inner = {call.name for call in part.calls}
        last |= {name: i for call in part.calls for name in call.inputs if name not in inner}
    for i, part in enumerate(parts):
        part.finished = tuple(n for n, at in last.items() if at == i and n not in outputs)


Step = tuple[str, tuple[str, ...]]
"""The name of a module, which is that of its output, and the names of what it reads."""


class Plan:
    """Runs modules as they are now, chains of those that can be lifted as one operation each.

    Containers that only call their children are looked into. A plan holds good as long as
    :meth:`holds` says so.

    Attributes:
        graph: the modules' layers; plain ones stand for those that run by themselves.
        calls: of the modules, in their order.

    Args:
        root: the module that owns them.
        steps: the names of modules in the root and what they read, in the order of their calls.
        source: the name of the tensor that goes in.
        output: the name of the tensor that comes out.
        recompute: whether chains keep little for their backward passes.
    """

    def __init__(
        self,
        root: nn.Module,
        steps: Sequence[Step],
        source: str,
        output: str,
        *,
        recompute: bool = False,
    ) -> None:
        self._source, self._output = source, output
        self._keys = [name for name, _ in steps]
        self._children = list(map(root._modules.get, self._keys))
        self._containers: list[tuple[nn.Module, list[nn.Module | None]]] = []
        self.calls: list[Call] = []
        for (name, inputs), module in zip(steps, self._children, strict=True):
            self._add(name, inputs, None, name, module, name)
        modules = [call.module for call in self.calls if call.lift is not not_lifted]
        watched = [*modules, *(container for container, _ in self._containers)]
        # Made before the modules are lifted, so that no change goes unseen between.
        self._watch = Watch([module for module in watched if module is not None])
        self._parts, layers = divide(self.calls, [source], [output], recompute=recompute)
        self.graph = graph.Graph("", tuple(layers.values()), output)

    def _add(
        self,
        name: str,
        inputs: tuple[str, ...],
        owner: nn.Module | None,
        key: str,
        module: nn.Module | None,
        path: str,
    ) -> None:
        """A module, or those in a container, of which the last has the container's name."""
        if not (is_chain(module) and module):
            in_place = is_in_place(module)
            run = _by_name(owner, key, inputs)
            # A dropout is nothing in evaluation, but one plan serves both modes.
            by_mode = isinstance(module, _DROPOUTS)
            lifter = not_lifted if by_mode else _lifted(module, name)
            self.calls.append(Call(name, inputs, run, module, lifter, in_place, in_place))
            return
        children = module._modules
        self._containers.append((module, list(children.values())))
        for number, (inner, child) in enumerate(children.items(), 1):
            inner_path = f"{path}.{inner}"
            inner_name = name if number == len(children) else inner_path
            self._add(inner_name, inputs, module, inner, child, inner_path)
            inputs = (inner_name,)

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

    def run(self, root: nn.Module, x: Any) -> Any:
        """The output for an input."""
        values = {self._source: x}
        del x
        run_parts(self._parts, root, values)
        return values[self._output]


def _by_name(owner: nn.Module | None, key: str, inputs: tuple[str, ...]) -> Any:
    """Calls what has a name in its owner at the time, by default in the root."""

    def run(root: nn.Module, values: Values) -> Any:
        return getattr(owner or root, key)(*(values[name] for name in inputs))

    return run


def _may_be_its_input(made: Sequence[graph.Layer]) -> bool:
    """Whether the result of a call may be (a part of) its input itself.

    Args:
        made: the layers that it is lifted to; of one without any nothing is known.
    """
    if not made:
        return True
    return isinstance(made[-1], _SAME_MEMORY) and not getattr(made[-1], "is_new", False)


def not_lifted(inputs: Sequence[graph.Layer]) -> tuple[graph.Layer, ...]:
    """For what no layer computes."""
    return ()


def _lifted(module: nn.Module | None, name: str) -> Any:
    return lambda inputs: lift(module, name, inputs)


_DROPOUTS = nn.Dropout | nn.Dropout2d

_SAME_MEMORY = (
    graph.CopyChannels
    | graph.Dropout
    | graph.Flatten
    | graph.Identity
    | graph.Interleave
    | graph.Reshape
    | Derived
)

_PRESERVING = (
    graph.Activation
    | graph.Add
    | graph.BatchNorm
    | graph.ChannelScale
    | graph.Dropout
    | graph.Flatten
    | graph.GlobalPool
    | graph.Identity
    | graph.Interleave
    | graph.Multiply
    | graph.PReLU
    | graph.Pool
    | graph.Reshape
    | graph.WindowPool
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
        if source.shape[-1] is None and not isinstance(source, Derived):
            layers[name] = replace(source, shape=(*source.shape[:-1], channels))
            _settle_inputs(layers, layers[name])
