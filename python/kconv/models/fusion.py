"""Fusion: which layers of a graph run as one operation, and the program that computes them.

A batch norm, an activation or a sum that is an operation of its own is a pass over memory. A
fused segment has none: each convolution writes its raw result, and whoever reads that normalises,
activates, scales, permutes and adds on the way in (the Rust module ``fused`` explains how).

Here layers become such readings. A tensor is a sum of :class:`~kconv.models.wire.Term`, each some
channels of a stored value as they are read: ``activation(norm(value)) * gate * mask``.
Convolutions, means and what a term cannot express are steps, which store a value. The types of all
this are in :mod:`kconv.models.wire`.

Example:
    >>> from kconv.models import create
    >>> graph = create("keffnet_b0", classes=10, input_shape=(32, 32, 3)).graph()
    >>> [type(part).__name__ for part in partition(graph)]
    ['Segment', 'Dropout', 'Dense']
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from kconv._geometry import interleave_order, same_padding
from kconv.models import wire
from kconv.models.activations import ACTIVATIONS
from kconv.models.chains import Node, find_chains
from kconv.models.graph import (
    Activation,
    Add,
    BatchNorm,
    Borders,
    ChannelScale,
    Concat,
    Conv,
    CopyChannels,
    DepthwiseConv,
    Dropout,
    Flatten,
    FoldHalves,
    GlobalPool,
    Graph,
    Identity,
    Input,
    Interleave,
    Layer,
    Multiply,
    Pool,
    PReLU,
    Reshape,
    WindowPool,
    ZeroPad,
)
from kconv.models.wire import Term, WeightLayout

__all__ = ["Program", "Segment", "UnfitError", "is_fusable", "partition"]

_MAX_TERMS = 4
"""A sum of more terms is stored: each term costs every reader a pass over its value.

With 4, two blocks of two units, a kEffNet-B0 keeps 34 MB less of 64 images of 32x32 than with 2,
and takes as long.
"""


class UnfitError(ValueError):
    """Images of a size for which a segment has no program.

    Its layers may have a result all the same, such as the broadcast sum of tensors of two sizes, or
    raise their framework's own error.
    """


@dataclass(frozen=True)
class Program:
    """A segment for images of one size.

    Attributes:
        segment: the layers.
        integers: what ``kconv._kconv.FusedProgram`` reads.
        parameters: (layer, weight) of each parameter in their order, weights by Keras's names.
        norms: the batch norms in the order of their statistics.
        norm_pixels: for each of them the pixels of an image that it averages over.
        masks: the drop-connect layers in the order of their masks.
        output_size: (channels, height, width) of the output.
    """

    segment: Segment = field(compare=False, repr=False)
    integers: tuple[int, ...]
    parameters: tuple[tuple[str, str], ...]
    norms: tuple[BatchNorm, ...]
    norm_pixels: tuple[int, ...]
    masks: tuple[Dropout, ...]
    output_size: tuple[int, int, int]

    @property
    def norm_channels(self) -> int:
        """The channels of all norms."""
        return sum(norm.channels for norm in self.norms)

    def output_shape(self, layout: str) -> tuple[int, int, int]:
        """(C, H, W) of the output, or (H, W, C) with ``layout="NHWC"``."""
        channels, height, width = self.output_size
        return (channels, height, width) if layout == "NCHW" else (height, width, channels)

    def with_input_grad(self, wanted: bool) -> Program:
        """The program whose backward pass computes the gradient by the input, or does not."""
        return replace(self, integers=wire.with_input_grad(self.integers, wanted))


@dataclass(frozen=True)
class Segment:
    """Layers that run as one operation: one tensor goes in, one comes out.

    With ``recompute``, of what the layers compute little is kept for the backward pass, which
    computes the rest anew.
    """

    layers: tuple[Layer, ...]
    input: str
    input_channels: int
    recompute: bool = False

    @property
    def name(self) -> str:
        """The name of the last layer, whose output is the segment's."""
        return self.layers[-1].name

    @property
    def keeps_pixels(self) -> bool:
        """Whether the output is (H, W, C), or else (C,)."""
        return len(self.layers[-1].shape) == 3

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that go in: one."""
        return (self.input,)

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """(layer, weight) of each parameter, as programs have them."""
        trained = ("kernel", "depthwise_kernel", "bias", "scale", "alpha", "gamma", "beta")
        norms = [layer for layer in self.layers if isinstance(layer, BatchNorm)]
        others = [layer for layer in self.layers if not isinstance(layer, BatchNorm)]
        return [
            (x.name, name) for x in [*others, *norms] for name in x.weights() if name in trained
        ]

    def program(self, size: tuple[int, int], weight_layout: WeightLayout) -> Program:
        """The segment's program for images of (height, width).

        Raises:
            UnfitError: if there is none.
        """
        key = (size, weight_layout)
        if key not in self._programs:
            try:
                self._programs[key] = _Lowering(self, size).finish(weight_layout)
            except UnfitError as reason:
                self._programs[key] = str(reason)
        program = self._programs[key]
        if isinstance(program, str):
            raise UnfitError(program)
        return program

    @cached_property
    def _programs(self) -> dict[tuple[tuple[int, int], WeightLayout], Program | str]:
        """Those made so far, or why there is none.

        A look-up by the segment itself would hash all its layers.
        """
        return {}


def partition(
    graph: Graph, *, recompute: bool = False, frozen: frozenset[str] = frozenset()
) -> list[Layer | Segment]:
    """A graph's layers after the input, the largest sets of them that can be fused as segments.

    A segment reads one image, and one tensor of it is read by others; what else is computed at the
    same time, such as other branches or tensors for later, does not matter. It stands where its
    last layer stood. Equal graphs share segments and so their programs: a copy of a network makes
    none of its own.

    Args:
        graph: the layers.
        recompute: whether the segments keep little for their backward passes.
        frozen: batch norms that do not use the batch's statistics while others do, which are in
            segments of their own therefore.
    """
    return list(_partition(graph, recompute, frozen))


@lru_cache(maxsize=64)
def _partition(
    graph: Graph, recompute: bool, frozen: frozenset[str]
) -> tuple[Layer | Segment, ...]:
    layers = {layer.name: layer for layer in graph.layers}
    readers: dict[str, list[Layer]] = {name: [] for name in layers}
    for layer in graph.layers:
        for source in layer.inputs:
            readers[source].append(layer)
    nodes = [
        Node(
            layer.name,
            layer.inputs,
            fusable=is_fusable(layer, readers[layer.name]),
            ends=may_end(layer),
            is_convolution=isinstance(layer, Conv | DepthwiseConv) and len(layer.shape) == 3,
            mode=layer.name in frozen if isinstance(layer, BatchNorm) else None,
        )
        for layer in graph.layers
        if not isinstance(layer, Input)
    ]
    sources = [layer.name for layer in graph.layers if isinstance(layer, Input)]
    images = {name for name, layer in layers.items() if len(layer.shape) == 3}
    chains = find_chains(sources, nodes, [graph.output], starts=images)
    segments = {
        chain.nodes[-1]: Segment(
            tuple(layers[name] for name in chain.nodes),
            chain.input,
            layers[chain.input].channels,
            recompute,
        )
        for chain in chains
    }
    fused = {name for chain in chains for name in chain.nodes}
    kept = (node.name for node in nodes if node.name in segments or node.name not in fused)
    return tuple(segments.get(name, layers[name]) for name in kept)


def is_fusable(layer: Layer, readers: Sequence[Layer] = ()) -> bool:
    """Whether a segment can hold a layer, which a padding's readers are asked about, too."""
    match layer:
        case Conv():
            largest = max(*layer.kernel_size, *layer.strides, *layer.dilation)
            return largest <= _MAX_KERNEL and _pads(layer, layer.padding)
        case DepthwiseConv():
            return max(layer.strides, layer.kernel_size) <= _MAX_KERNEL
        case ZeroPad():
            return bool(readers) and all(
                isinstance(reader, Conv | DepthwiseConv)
                and reader.padding in ("valid", _NO_BORDERS)
                and _pads(reader, layer.padding)
                for reader in readers
            )
        case Activation():
            row = ACTIVATIONS[layer.kind]
            return row.code is not None and len(row.parameters) == len(layer.parameters)
        case Dropout():
            return layer.per_sample
        case GlobalPool():
            return layer.kind == "avg"
        case Pool():
            return max(layer.pool_size, layer.strides) <= _MAX_KERNEL
        case WindowPool():
            largest = max(*layer.kernel_size, *layer.strides, *layer.dilation)
            flat = layer.kind == "max" or layer.dilation == (1, 1)
            return largest <= _MAX_KERNEL and flat and _pads(layer, layer.padding)
        case ChannelScale() | PReLU():
            return True
        case Multiply() | Reshape() | Flatten():
            return True
        case BatchNorm() | Interleave() | CopyChannels() | Concat() | FoldHalves() | Add():
            return True
        case Identity():
            return True
        case _:
            return False


def may_end(layer: Layer) -> bool:
    """Whether a segment's output may be that of a layer: an image, or means of images.

    What is computed from vectors is better left to the framework, unless it is a gate, and a
    padding belongs to the convolution after it.
    """
    of_means = isinstance(layer, GlobalPool | Flatten)
    return not isinstance(layer, ZeroPad) and (len(layer.shape) == 3 or of_means)


_MAX_KERNEL = 64
_CLIP = ACTIVATIONS["clip"].code or 0
_SIGNS = (-math.inf, 2.0**-126), (0.0, math.inf)
"""The limits of negative and positive numbers; the derivative by the first is 1 at zero, too."""
_NO_BORDERS = ((0, 0), (0, 0))


def _pads(layer: Conv | DepthwiseConv | WindowPool, padding: str | Borders) -> bool:
    """Whether a window covers a pixel at every index, as programs have it."""
    kernel = layer.kernel_size
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    dilation = (1, 1) if isinstance(layer, DepthwiseConv) else layer.dilation
    spans = [_span(k, d) for k, d in zip(kernel, dilation, strict=True)]
    return isinstance(padding, str) or all(
        0 <= side < span for sides, span in zip(padding, spans, strict=True) for side in sides
    )


def _span(kernel: int, dilation: int) -> int:
    """Pixels from the first to the last tap."""
    return (kernel - 1) * dilation + 1


@dataclass(frozen=True)
class Tensor:
    """A sum of terms, each over some or all of the channels, and its size in pixels."""

    terms: tuple[Term, ...]
    channels: int
    size: tuple[int, int]

    @property
    def disjoint(self) -> bool:
        """Whether no two terms add to the same channel."""
        return sum(len(term.channels) for term in self.terms) == self.channels

    @property
    def whole(self) -> bool:
        """Whether each term covers all channels."""
        return all(len(term.channels) == self.channels for term in self.terms)


@dataclass
class _Lowering:
    """Turns a segment's layers into values and steps."""

    segment: Segment
    size: tuple[int, int]
    values: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[wire.Step] = field(default_factory=list)
    norms: list[BatchNorm] = field(default_factory=list)
    norm_pixels: list[int] = field(default_factory=list)
    masks: list[Dropout] = field(default_factory=list)
    copies: dict[Term, Term] = field(default_factory=dict)
    normed: set[tuple[int, int]] = field(default_factory=set)
    """(norm, channel) of what has been read so far."""

    def finish(self, weight_layout: WeightLayout) -> Program:
        """All layers, as a program."""
        tensors = {self.segment.input: self._store(self.segment.input_channels, self.size)}
        paddings: dict[str, ZeroPad] = {}
        for layer in self.segment.layers:
            if isinstance(layer, ZeroPad):
                paddings[layer.name] = layer
                tensors[layer.name] = tensors[layer.inputs[0]]
            else:
                inputs = [tensors[name] for name in layer.inputs]
                tensors[layer.name] = self._layer(layer, inputs, paddings.get(layer.inputs[0]))
        output = tensors[self.segment.name]
        if output != self._stored(len(self.values) - 1):
            self._copy(output)
        if len(self.normed) < sum(norm.channels for norm in self.norms):
            raise UnfitError("nobody reads some channels of a batch norm, whose statistics count")
        read = {term.value for step in self.steps for term in step.terms}
        read |= {term.gate for step in self.steps for term in step.terms}
        if not read.issuperset(range(len(self.values) - 1)):
            raise UnfitError("nobody reads what one of the layers computes")
        norms = (wire.Norm(norm.channels, norm.epsilon, norm.scale) for norm in self.norms)
        code = wire.Code(
            weight_layout,
            True,
            len(self.masks),
            tuple(self.values),
            tuple(norms),
            tuple(self.steps),
            self.segment.recompute,
        )
        return Program(
            self.segment,
            code.encode(),
            tuple(self.segment.parameters),
            tuple(self.norms),
            tuple(self.norm_pixels),
            tuple(self.masks),
            self.values[-1],
        )

    def _layer(self, layer: Layer, inputs: list[Tensor], padding: ZeroPad | None) -> Tensor:
        x = inputs[0]
        match layer:
            case Conv():
                window = wire.Window(layer.kernel_size, layer.strides, layer.dilation)
                y = self._conv(layer, x, padding, window, layer.groups)
                return self._interleave(y, layer.interleave) if layer.interleave > 1 else y
            case DepthwiseConv():
                size, stride = layer.kernel_size, layer.strides
                window = wire.Window((size, size), (stride, stride))
                return self._conv(layer, x, padding, window, layer.in_channels)
            case BatchNorm():
                return self._norm(layer, x)
            case Activation():
                x = self._linear(x)
                code = ACTIVATIONS[layer.kind].code
                assert code is not None
                function = wire.Function(code, layer.parameters)
                return _each(x, lambda term: replace(term, activation=function))
            case Dropout():
                if any(term.mask != -1 for term in x.terms):
                    x = self._copy(x)
                self.masks.append(layer)
                mask = len(self.masks) - 1
                return _each(x, lambda term: replace(term, mask=mask))
            case Multiply():
                self._one_pixel(layer, inputs[1])
                return self._gate(x, inputs[1])
            case Interleave():
                return self._interleave(x, layer.step)
            case CopyChannels():
                return _narrow(x, layer.start, layer.count)
            case FoldHalves():
                half = x.channels // 2
                if 2 * half < x.channels:  # the last channel would be read by nobody
                    x = self._copy(x)
                return self._sum([_narrow(x, 0, half), _narrow(x, half, half)])
            case Concat():
                self._same_size(layer, inputs)
                return _concat(inputs)
            case Add():
                self._same_size(layer, inputs)
                return self._sum(inputs)
            case GlobalPool():
                return self._step(wire.Mean(), x, x.channels, (1, 1))
            case Pool():
                return self._pool(layer, x)
            case WindowPool():
                return self._window_pool(layer, x)
            case ChannelScale():
                return self._scale(x)
            case PReLU():
                x = self._linear(x)
                negative, positive = (wire.Function(_CLIP, low_high) for low_high in _SIGNS)
                scaled = self._scale(_each(x, lambda term: replace(term, activation=negative)))
                kept = _each(x, lambda term: replace(term, activation=positive))
                return self._sum([kept, scaled])
            case Reshape() | Flatten():
                self._one_pixel(layer, x)
                return x
            case _:  # Identity
                return x

    def _same_size(self, layer: Layer, xs: Sequence[Tensor]) -> None:
        if len(sizes := {x.size for x in xs}) > 1:
            raise UnfitError(f"layer {layer.name!r} joins tensors of the sizes {sorted(sizes)}")

    def _one_pixel(self, layer: Layer, x: Tensor) -> None:
        if x.size != (1, 1):
            raise UnfitError(f"layer {layer.name!r} reads {x.size} pixels, expected one")

    def _interleave(self, x: Tensor, step: int) -> Tensor:
        if not x.whole:
            x = self._copy(x)
        order = interleave_order(x.channels, step)
        return _each(x, lambda term: replace(term, channels=tuple(term.channels[i] for i in order)))

    def _conv(
        self,
        layer: Conv | DepthwiseConv,
        x: Tensor,
        padding: ZeroPad | None,
        window: wire.Window,
        groups: int,
    ) -> Tensor:
        borders = _borders(padding.padding if padding else layer.padding, x.size, window)
        window, size = _placed(window, borders, x.size)
        convolution = wire.Convolution(window, groups, layer.use_bias)
        return self._step(convolution, x, layer.channels, size)

    def _scale(self, x: Tensor) -> Tensor:
        """Each channel times a parameter: a convolution of one channel a group."""
        convolution = wire.Convolution(wire.Window((1, 1)), x.channels, False)
        return self._step(convolution, x, x.channels, x.size)

    def _linear(self, x: Tensor) -> Tensor:
        """The tensor so that an activation can be applied to its terms."""
        linear = x.disjoint and all(term.linear for term in x.terms)
        return x if linear else self._copy(x)

    def _pool(self, layer: Pool, x: Tensor) -> Tensor:
        window = wire.Window((layer.pool_size,) * 2, (layer.strides,) * 2)
        window, size = _placed(window, _borders(layer.padding, x.size, window), x.size)
        kind = wire.MaxPool(window) if layer.kind == "max" else wire.MeanPool(window)
        return self._step(kind, x, x.channels, size)

    def _window_pool(self, layer: WindowPool, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = layer.padding
        window = wire.Window(layer.kernel_size, layer.strides, layer.dilation, (top, left))
        counted = (bottom, right) if layer.count_include_pad else None
        kind = wire.MaxPool(window) if layer.kind == "max" else wire.MeanPool(window, counted)
        return self._step(kind, x, x.channels, layer.size(x.size))

    def _norm(self, layer: BatchNorm, x: Tensor) -> Tensor:
        if not x.disjoint:
            x = self._copy(x)
        x = replace(x, terms=tuple(self._plain(term, x.size) for term in x.terms))
        self.norms.append(layer)
        self.norm_pixels.append(x.size[0] * x.size[1])
        norm = len(self.norms) - 1
        return _each(x, lambda term: replace(term, norm=norm, norm_offset=term.offset or 0))

    def _plain(self, term: Term, size: tuple[int, int]) -> Term:
        """The term as a batch norm can read it: a stored value's channels as they are.

        What is stored for this is stored once: a dense block's layers read it again and again.
        """
        if term.linear and term.norm == -1 and term.offset is not None:
            return term
        alone = replace(term, start=0)
        if alone not in self.copies:
            copy = self._copy(Tensor((alone,), len(term.channels), size))
            self.copies[alone] = copy.terms[0]
        return replace(self.copies[alone], start=term.start)

    def _gate(self, x: Tensor, gate: Tensor) -> Tensor:
        if any(term.gate != -1 or term.offset is None for term in x.terms):
            x = self._copy(x)
        if len(gate.terms) > 1 or gate != self._stored(gate.terms[0].value):
            gate = self._copy(gate)
        value = gate.terms[0].value
        return _each(x, lambda term: replace(term, gate=value, gate_offset=term.offset or 0))

    def _sum(self, xs: Sequence[Tensor]) -> Tensor:
        terms = tuple(term for x in xs for term in x.terms)
        total = replace(xs[0], terms=terms)
        return total if len(terms) <= _MAX_TERMS else self._copy(total)

    def _copy(self, x: Tensor) -> Tensor:
        return self._step(wire.Copy(), x, x.channels, x.size)

    def _step(self, kind: wire.Kind, x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
        x = self._separate(x)
        for term in x.terms:
            if term.norm != -1:
                self.normed |= {(term.norm, c + term.norm_offset) for c in term.channels}
        self.steps.append(wire.Step(kind, x.terms))
        return self._store(channels, size)

    def _separate(self, x: Tensor) -> Tensor:
        """Stores copies for terms that would bring the same channel to two places.

        Gradients of different channels are computed in parallel, so they must not meet.
        """
        places: dict[tuple[int, int], int] = {}
        terms = []
        for term in x.terms:
            here = {(term.value, c): term.start + i for i, c in enumerate(term.channels)}
            if any(places.get(read, place) != place for read, place in here.items()):
                alone = Tensor((replace(term, start=0),), len(term.channels), x.size)
                terms.append(replace(self._copy(alone).terms[0], start=term.start))
            else:
                places |= here
                terms.append(term)
        return replace(x, terms=tuple(terms))

    def _store(self, channels: int, size: tuple[int, int]) -> Tensor:
        if min(size) < 1:
            height, width = self.size
            raise UnfitError(f"images of {height}x{width} pixels leave {size[0]}x{size[1]}")
        self.values.append((channels, *size))
        return self._stored(len(self.values) - 1)

    def _stored(self, value: int) -> Tensor:
        channels, height, width = self.values[value]
        return Tensor((Term(0, tuple(range(channels)), value),), channels, (height, width))


def _borders(padding: str | Borders, size: tuple[int, int], window: wire.Window) -> Borders:
    """Zeros ((top, bottom), (left, right)) around an image of a size."""
    if padding == "valid":
        return _NO_BORDERS
    if not isinstance(padding, str):
        return padding
    rows, columns = (
        same_padding(n, _span(k, dilation), stride)
        for n, k, stride, dilation in zip(
            size, window.kernel, window.stride, window.dilation, strict=True
        )
    )
    return rows, columns


def _placed(
    window: wire.Window, borders: Borders, size: tuple[int, int]
) -> tuple[wire.Window, tuple[int, int]]:
    """The window with its zeros before, and the result's size."""
    height, width = (
        (n + sum(sides) - _span(k, dilation)) // stride + 1
        for n, sides, k, stride, dilation in zip(
            size, borders, window.kernel, window.stride, window.dilation, strict=True
        )
    )
    return replace(window, before=(borders[0][0], borders[1][0])), (height, width)


def _each(x: Tensor, change: object) -> Tensor:
    assert callable(change)
    return replace(x, terms=tuple(change(term) for term in x.terms))


def _narrow(x: Tensor, start: int, count: int) -> Tensor:
    terms = []
    for term in x.terms:
        first = max(start - term.start, 0)
        channels = term.channels[first : max(start + count - term.start, 0)]
        if channels:
            place = term.start + first - start
            terms.append(replace(term, start=place, channels=channels))
    return replace(x, terms=tuple(terms), channels=count)


def _concat(xs: Sequence[Tensor]) -> Tensor:
    terms: list[Term] = []
    channels = 0
    for x in xs:
        terms += (replace(term, start=term.start + channels) for term in x.terms)
        channels += x.channels
    return replace(xs[0], terms=tuple(terms), channels=channels)
