"""The wire format of fused programs: what :mod:`kconv.models.fusion` writes, as types.

A program is sent to the extension as integers. :meth:`Code.encode` writes them and
:meth:`Code.decode` reads them; the Rust module ``fused::reader`` describes their order. A new kind
of step is one class here, and one entry there.

Example:
    >>> step = Step(Copy(), (Term(0, (0, 1), 0),))
    >>> code = Code("IO", True, 0, ((2, 4, 4), (2, 4, 4)), (), (step,))
    >>> Code.decode(code.encode()) == code
    True
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from kconv import _kconv

__all__ = [
    "FORMAT",
    "IDENTITY",
    "Code",
    "Convolution",
    "Copy",
    "Function",
    "Kind",
    "MaxPool",
    "Mean",
    "MeanPool",
    "Norm",
    "Step",
    "Term",
    "WeightLayout",
    "Window",
    "weight_layout",
    "with_input_grad",
]

FORMAT = 2
"""The version of the format: the first integer of every program.

Programs of the first version began with 0 or 1.
"""

if (_found := getattr(_kconv.FusedProgram, "FORMAT", 1)) != FORMAT:
    raise ImportError(
        f"kconv's extension reads programs of format {_found}, expected {FORMAT}: it is of another "
        "version than the Python part; install kconv again"
    )

_INPUT_GRAD, _RECOMPUTE = 1, 2
"""Flags of a program: see :class:`Code`."""
WeightLayout = Literal["OI", "IO"]
Pair = tuple[int, int]
"""Of rows and of columns."""


@dataclass(frozen=True)
class Function:
    """An activation: its code, and its parameters."""

    code: int
    parameters: tuple[float, ...] = ()


IDENTITY = Function(0)


@dataclass(frozen=True)
class Term:
    """Channels of a stored value as a reader sees them: ``activation(norm(value)) * gate * mask``.

    Attributes:
        start: the tensor's channel that the first of them adds to.
        channels: the value's channels.
        value: the stored value.
        norm: the batch norm, which sees channel c of the value as its channel c + norm_offset.
        activation: the function.
        gate: the value that scales each image's channel, likewise.
        mask: the factors of images.
    """

    start: int
    channels: tuple[int, ...]
    value: int
    norm: int = -1
    norm_offset: int = 0
    activation: Function = IDENTITY
    gate: int = -1
    gate_offset: int = 0
    mask: int = -1

    @property
    def offset(self) -> int | None:
        """What to add to a channel of the value for the tensor's, if the same for all."""
        offset = self.start - self.channels[0]
        same = all(c + offset == self.start + i for i, c in enumerate(self.channels))
        return offset if same else None

    @property
    def linear(self) -> bool:
        """Whether neither activation nor factors have been applied."""
        return self.activation == IDENTITY and self.gate == self.mask == -1

    def integers(self) -> list[int]:
        """The term, its channels as runs of equal distances."""
        runs = _runs(self.channels)
        parameters = [_bits(parameter) for parameter in self.activation.parameters]
        numbers = [self.value, self.norm, self.norm_offset, self.activation.code]
        numbers += [len(parameters), *parameters]
        numbers += [self.gate, self.gate_offset, self.mask, self.start, len(runs)]
        return numbers + [number for run in runs for number in run]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Term:
        """What :meth:`integers` wrote."""
        value, norm, norm_offset, code = (next(numbers) for _ in range(4))
        function = Function(code, tuple(_real(bits) for bits in _list(numbers)))
        gate, gate_offset, mask, start = (next(numbers) for _ in range(4))
        runs = [(next(numbers), next(numbers), next(numbers)) for _ in range(next(numbers))]
        channels = tuple(first + i * step for count, first, step in runs for i in range(count))
        return cls(start, channels, value, norm, norm_offset, function, gate, gate_offset, mask)


@dataclass(frozen=True)
class Window:
    """What one pixel of a result sees of the source, along rows and columns.

    Attributes:
        kernel: height and width.
        stride: pixels from one window to the next.
        dilation: pixels from one tap to the next.
        before: zeros above and at the left; those below and at the right follow from the sizes.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)

    def integers(self) -> list[int]:
        """The window."""
        return [*self.kernel, *self.stride, *self.dilation, *self.before]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Window:
        """What :meth:`integers` wrote."""
        pairs = cast("list[Pair]", [tuple(numbers[i : i + 2]) for i in range(0, 8, 2)])
        return cls(*pairs)

    def after(self, source: Pair, result: Pair) -> Pair:
        """Zeros below and at the right of a source of one size for a result of another."""
        rows, columns = (
            max((out - 1) * stride + (k - 1) * dilation + 1 - before - n, 0)
            for out, stride, k, dilation, before, n in zip(
                result, self.stride, self.kernel, self.dilation, self.before, source, strict=True
            )
        )
        return rows, columns


@dataclass(frozen=True)
class Convolution:
    """A convolution in groups."""

    window: Window
    groups: int
    use_bias: bool

    def attributes(self) -> list[int]:
        """What of this is sent."""
        return [*self.window.integers(), self.groups, int(self.use_bias)]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Convolution:
        """What :meth:`attributes` wrote."""
        return cls(Window.of(numbers), numbers[8], bool(numbers[9]))


@dataclass(frozen=True)
class Copy:
    """The source as it is."""

    def attributes(self) -> list[int]:
        """Nothing."""
        return []

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Copy:
        """Nothing is sent."""
        return cls()


@dataclass(frozen=True)
class Mean:
    """The mean over the pixels."""

    def attributes(self) -> list[int]:
        """Nothing."""
        return []

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Mean:
        """Nothing is sent."""
        return cls()


@dataclass(frozen=True)
class MeanPool:
    """The means over windows.

    Attributes:
        window: of dilation 1.
        counted: zeros below and at the right that count, as all before then do; None where only
            pixels count.
    """

    window: Window
    counted: Pair | None = None

    def attributes(self) -> list[int]:
        """What of this is sent."""
        return [*self.window.integers(), int(self.counted is not None), *(self.counted or (0, 0))]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> MeanPool:
        """What :meth:`attributes` wrote."""
        return cls(Window.of(numbers), (numbers[9], numbers[10]) if numbers[8] else None)


@dataclass(frozen=True)
class MaxPool:
    """The maxima over windows."""

    window: Window

    def attributes(self) -> list[int]:
        """What of this is sent."""
        return self.window.integers()

    @classmethod
    def read(cls, numbers: Sequence[int]) -> MaxPool:
        """What :meth:`attributes` wrote."""
        return cls(Window.of(numbers))


Kind = Convolution | Copy | Mean | MeanPool | MaxPool
_KINDS: tuple[type[Kind], ...] = (Convolution, Copy, Mean, MeanPool, MaxPool)
"""By their codes."""


@dataclass(frozen=True)
class Step:
    """What makes a value of a sum of terms."""

    kind: Kind
    terms: tuple[Term, ...]

    @property
    def channels(self) -> int:
        """Channels of the source."""
        return max(term.start + len(term.channels) for term in self.terms)

    def integers(self) -> list[int]:
        """The step: its kind with its attributes, and its source."""
        attributes = self.kind.attributes()
        numbers = [_KINDS.index(type(self.kind)), len(attributes), *attributes, len(self.terms)]
        return numbers + [number for term in self.terms for number in term.integers()]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Step:
        """What :meth:`integers` wrote."""
        kind = _KINDS[next(numbers)].read(_list(numbers))
        return cls(kind, tuple(Term.read(numbers) for _ in range(next(numbers))))


@dataclass(frozen=True)
class Norm:
    """A batch norm; ``scale`` tells whether it has a gamma."""

    channels: int
    epsilon: float
    scale: bool


@dataclass(frozen=True)
class Code:
    """A program.

    Attributes:
        weight_layout: "OI" or "IO", of all convolutions.
        input_grad: whether the backward pass computes the gradient by the input.
        masks: how many sets of factors of images there are.
        values: (channels, height, width) of the input and of what each step makes.
        norms: the batch norms.
        steps: one for each value but the input.
        recompute: whether the backward pass computes values anew that need not be kept.
    """

    weight_layout: WeightLayout
    input_grad: bool
    masks: int
    values: tuple[tuple[int, int, int], ...]
    norms: tuple[Norm, ...]
    steps: tuple[Step, ...]
    recompute: bool = False

    def encode(self) -> tuple[int, ...]:
        """The integers that the extension reads."""
        flags = int(self.input_grad) + _RECOMPUTE * self.recompute
        numbers = [FORMAT, int(self.weight_layout == "IO"), flags, self.masks]
        numbers += [len(self.values), *(size for value in self.values for size in value)]
        numbers.append(len(self.norms))
        for norm in self.norms:
            numbers += [norm.channels, _bits(norm.epsilon), int(norm.scale)]
        numbers += [number for step in self.steps for number in step.integers()]
        return tuple(numbers)

    @classmethod
    def decode(cls, integers: Iterable[int]) -> Code:
        """What :meth:`encode` wrote.

        Raises:
            ValueError: if the program is of another format.
        """
        numbers = iter(integers)
        if (found := next(numbers)) != FORMAT:
            raise ValueError(f"the program has format {found}, expected {FORMAT}")
        layout: WeightLayout = "IO" if next(numbers) else "OI"
        flags, masks = next(numbers), next(numbers)
        count = next(numbers)
        values = tuple((next(numbers), next(numbers), next(numbers)) for _ in range(count))
        norms = tuple(
            Norm(next(numbers), _real(next(numbers)), bool(next(numbers)))
            for _ in range(next(numbers))
        )
        steps = tuple(Step.read(numbers) for _ in range(count - 1))
        input_grad, recompute = bool(flags & _INPUT_GRAD), bool(flags & _RECOMPUTE)
        return cls(layout, input_grad, masks, values, norms, steps, recompute)


def weight_layout(integers: Sequence[int]) -> WeightLayout:
    """The weight layout of an encoded program."""
    return "IO" if integers[1] else "OI"


def with_input_grad(integers: tuple[int, ...], wanted: bool) -> tuple[int, ...]:
    """The encoded program whose backward pass computes the gradient by the input, or does not."""
    flags = integers[2] & ~_INPUT_GRAD | _INPUT_GRAD * wanted
    return (*integers[:2], flags, *integers[3:])


def _bits(value: float) -> int:
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def _real(bits: int) -> float:
    value: float = struct.unpack("d", struct.pack("q", bits))[0]
    return value


def _list(numbers: Iterator[int]) -> list[int]:
    return [next(numbers) for _ in range(next(numbers))]


def _runs(channels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(count, first, distance) of each run, whose distance is not negative."""
    runs: list[tuple[int, int, int]] = []
    for channel in channels:
        if runs:
            count, first, distance = runs[-1]
            if count == 1 and channel >= first:
                runs[-1] = (2, first, channel - first)
                continue
            if count > 1 and channel == first + count * distance:
                runs[-1] = (count + 1, first, distance)
                continue
        runs.append((1, channel, 0))
    return runs
