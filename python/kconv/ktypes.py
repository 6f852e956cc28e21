"""The technique's rules: what replaces a pointwise convolution, before any framework.

A *kType* says how the 1x1 convolution of ``c_in`` to ``c_out`` channels is split into groups;
:func:`plan` turns it into the steps of the block that takes the convolution's place. Version 1
(``D6``) is from MENDEL 28(1), 2022; version 2 (``D6v3``) lifts its divisibility constraints
(Entropy 24(9):1264, 2022).

Example:
    >>> for step in plan("D6_16ch", 144, 24, name="project"):
    ...     print(type(step).__name__, step.name, step.channels)
    Unit project 24
    Interleave project_group_interleaved 24
    Unit project_group_interconn 24
    Add project_inter_group_add 24
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from kconv._geometry import interleave_order
from kconv._names import did_you_mean

__all__ = [
    "INPUT",
    "KTYPES",
    "Add",
    "Concat",
    "CopyChannels",
    "FoldHalves",
    "Interleave",
    "KType",
    "Plan",
    "Step",
    "Unit",
    "group_conv",
    "interleave_index",
    "plan",
    "resolve",
]

T = TypeVar("T")

Scheme = Literal["conv", "K", "K+interleave", "D6", "D6+kT3", "D10", "D8", "D6v3", "kT3v3"]

INPUT = "<input>"
"""What a step's ``inputs`` name where it reads the input of the block."""


@dataclass(frozen=True)
class KType:
    """A kType: its name, the original's number for it, its scheme and its channels per group.

    Attributes:
        name: for instance "D6_16ch".
        number: the number the original implementation uses.
        scheme: the shape of the block: an ordinary convolution, the grouped one alone (K), ...
        channels: the minimum number of input channels per group (0 for the ordinary convolution).
    """

    name: str
    number: int
    scheme: Scheme
    channels: int


def _family(prefix: str, scheme: Scheme, numbers: dict[int, int]) -> list[KType]:
    return [KType(f"{prefix}_{ch}ch", number, scheme, ch) for ch, number in numbers.items()]


KTYPES: tuple[KType, ...] = (
    KType("conv", 0, "conv", 0),
    KType("grouped_interleaved", 1, "K+interleave", 16),
    KType("D6_16ch_kT3", 4, "D6+kT3", 16),
    KType("D10", 5, "D10", 16),
    KType("D8", 6, "D8", 16),
    *_family("D6", "D6", {4: 15, 8: 14, 12: 40, 16: 2, 24: 41, 32: 13, 64: 24, 128: 26}),
    *_family("kT3", "K", {16: 3, 32: 23, 64: 25, 128: 27}),
    *_family("D6v3", "D6v3", {2: 46, 4: 45, 8: 44, 12: 42, 16: 32, 24: 43}),
    *_family("D6v3", "D6v3", {32: 33, 64: 34, 128: 35}),
    *_family("kT3v3", "kT3v3", {4: 47, 8: 48, 16: 36, 32: 37, 64: 38, 128: 39}),
)
"""Every known kType."""

_BY_KEY: dict[str | int, KType] = {key: k for k in KTYPES for key in (k.name, k.number)}


def resolve(ktype: KType | str | int) -> KType:
    """The kType of a name or of the original's number.

    Example:
        >>> resolve(32).name, resolve("D6_16ch").number
        ('D6v3_16ch', 2)

    Args:
        ktype: a name such as "D6_16ch", a number such as 2, or a :class:`KType`.

    Returns:
        The :class:`KType`.

    Raises:
        ValueError: if there is no such kType; the message lists the known ones.
        TypeError: if it is neither a name nor a number.
    """
    if isinstance(ktype, KType):
        return ktype
    if isinstance(ktype, bool) or not isinstance(ktype, str | int):
        raise TypeError(f"ktype={ktype!r} is neither a kType's name nor its number")
    if ktype not in _BY_KEY:
        known = ", ".join(f"{k.name} ({k.number})" for k in KTYPES)
        close = did_you_mean(ktype, [k.name for k in KTYPES]) if isinstance(ktype, str) else ""
        raise ValueError(f"unknown ktype={ktype!r}{close}; known are {known}")
    return _BY_KEY[ktype]


def interleave_index(channels: int, step: int) -> tuple[int, ...]:
    """The source channel of each channel that an interleave by ``step`` puts out.

    Channels s, s + step, s + 2 * step, ... for s = 0, 1, ..., step - 1: a permutation for every
    step, also where it does not divide the channels.

    Example:
        >>> interleave_index(7, 3)
        (0, 3, 6, 1, 4, 2, 5)

    Args:
        channels: how many channels there are.
        step: the distance of neighbours; 1 is the identity.

    Returns:
        A tuple of ``channels`` source channels.

    Raises:
        ValueError: if ``step`` is below 1.
    """
    return tuple(interleave_order(channels, step))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a block.

    Attributes:
        name: the original's name; a step that the original leaves to Keras's automatic names has
            the name Keras gives it in a model of its own, and ``auto`` set.
        inputs: names of the steps it reads, :data:`INPUT` for the block's input.
        channels: channels it puts out.
        auto: whether the original leaves the name to Keras.
    """

    name: str
    inputs: tuple[str, ...]
    channels: int
    auto: bool = False


@dataclass(frozen=True, kw_only=True)
class Unit(Step):
    """Pointwise convolution, then batch norm and activation where the block has them.

    ``padding`` is what the original's layer says; it has no effect on a 1x1 convolution.
    """

    in_channels: int
    groups: int = 1
    padding: Literal["same", "valid"] = "same"

    @property
    def conv_name(self) -> str:
        """Name of the convolution."""
        return _join(self.name, "conv")

    @property
    def bn_name(self) -> str:
        """Name of the batch norm."""
        return _join(self.name, "bn")

    @property
    def activation_name(self) -> str:
        """Name of the activation: the unit's own."""
        return self.name or "activation"


@dataclass(frozen=True, kw_only=True)
class Interleave(Step):
    """The channels in the order of :func:`interleave_index`."""

    step: int


@dataclass(frozen=True, kw_only=True)
class CopyChannels(Step):
    """The channels ``start`` to ``start + channels - 1``."""

    start: int = 0


@dataclass(frozen=True, kw_only=True)
class FoldHalves(Step):
    """First half of the channels plus the second half; an odd last channel is dropped."""


@dataclass(frozen=True, kw_only=True)
class Concat(Step):
    """Concatenation over the channels."""


@dataclass(frozen=True, kw_only=True)
class Add(Step):
    """Elementwise sum."""


@dataclass(frozen=True)
class Plan:
    """The block that replaces one pointwise convolution; iterating yields its steps in order.

    Attributes:
        ktype: the kType it follows.
        in_channels: channels of the block's input.
        steps: the steps, each after those it reads; the last gives the block's output.
    """

    ktype: KType
    in_channels: int
    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def out_channels(self) -> int:
        """Channels of the block's output (type D8 drops an odd last one)."""
        return self.steps[-1].channels

    @property
    def output(self) -> str:
        """Name of the step whose result is the block's."""
        return self.steps[-1].name

    @property
    def units(self) -> tuple[Unit, ...]:
        """The steps that hold parameters."""
        return tuple(step for step in self.steps if isinstance(step, Unit))

    @property
    def first_units(self) -> tuple[Unit, ...]:
        """The units that read the block's input, all of it or some of its channels."""
        unconvolved = {INPUT}
        for step in self.steps:
            if not isinstance(step, Unit) and unconvolved.issuperset(step.inputs):
                unconvolved.add(step.name)
        return tuple(unit for unit in self.units if unconvolved.issuperset(unit.inputs))

    def walk(self, x: T, apply: Callable[[Step, list[T]], T]) -> T:
        """What the block makes of its input.

        Example:
            >>> plan("D6_16ch", 32, 48, "a").walk("x", lambda step, xs: f"{step.name}({xs[0]})")
            'a_group_interleaved(a(x))'

        Args:
            x: the block's input: a tensor, a name, or whatever ``apply`` takes.
            apply: the result of a step, from those of the steps that it reads.

        Returns:
            The last step's result.
        """
        results = {INPUT: x}
        for step in self.steps:
            results[step.name] = apply(step, [results[name] for name in step.inputs])
        return results[self.output]


def plan(ktype: KType | str | int, c_in: int, c_out: int, name: str = "") -> Plan:
    """The steps that replace a pointwise convolution of ``c_in`` to ``c_out`` channels.

    The rules are those of MENDEL 28(1), 2022 for ``D6`` and of Entropy 24(9):1264, 2022 for
    ``D6v3``.

    Example:
        >>> [(unit.conv_name, unit.groups) for unit in plan("D6v3_16ch", 40, 24).units]
        [('c1_m3_conv', 3), ('c2_m2_conv', 2)]

    Args:
        ktype: a kType, its name or its number.
        c_in: channels of the input.
        c_out: channels (filters) of the convolution.
        name: the name of the convolution, with which the steps' names begin.

    Returns:
        The :class:`Plan`.

    Raises:
        ValueError: if the kType is unknown or a channel count is below 1; the message names the
            convolution.
        TypeError: if an argument is of the wrong type.
    """
    ktype = resolve(ktype)
    layer = f"layer {name!r}: " if name else ""
    c_in, c_out = _positive(f"{layer}c_in", c_in), _positive(f"{layer}c_out", c_out)
    builder = _Builder(c_in)
    if ktype.scheme in ("D6v3", "kT3v3"):
        _plan_v2(builder, ktype, c_in, c_out, name)
    else:
        _plan_v1(builder, ktype, c_in, c_out, name)
    return Plan(ktype, c_in, tuple(builder.steps))


def group_conv(c_in: int, c_out: int, channels: int, name: str = "") -> Plan:
    """The steps of one grouped convolution of any numbers of channels (V2).

    Example:
        >>> [(unit.conv_name, unit.groups) for unit in group_conv(50, 36, 16).units]
        [('m4_conv', 4)]

    Args:
        c_in: channels of the input.
        c_out: channels (filters) of the convolution.
        channels: input channels of each group.
        name: with which the steps' names begin.

    Raises:
        ValueError: if a channel count is below 1.
        TypeError: if a channel count is not a whole number.
    """
    c_in, c_out = _positive("c_in", c_in), _positive("c_out", c_out)
    builder = _Builder(c_in)
    _group_conv(builder, INPUT, c_out, _positive("channels", channels), name, "same")
    ktype = KType(f"kT3v3_{channels}ch", -1, "kT3v3", channels)
    return Plan(ktype, c_in, tuple(builder.steps))


def _positive(what: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}={value!r} is not a whole number") from None
    if number < 1:
        raise ValueError(f"{what}={number}: a convolution needs at least one channel")
    return number


def _join(*parts: str) -> str:
    return "_".join(part for part in parts if part)


class _Builder:
    """Collects steps; every method returns the name of the step it appends."""

    def __init__(self, in_channels: int) -> None:
        self.steps: list[Step] = []
        self._channels = {INPUT: in_channels}
        self._auto: dict[str, int] = {}

    def channels(self, source: str) -> int:
        return self._channels[source]

    def _append(self, step: Step) -> str:
        self.steps.append(step)
        self._channels[step.name] = step.channels
        return step.name

    def _auto_name(self, kind: str) -> str:
        number = self._auto[kind] = self._auto.get(kind, -1) + 1
        return f"{kind}_{number}" if number else kind

    def unit(
        self,
        name: str,
        source: str,
        filters: int,
        groups: int = 1,
        padding: Literal["same", "valid"] = "same",
    ) -> str:
        return self._append(
            Unit(
                name=name,
                inputs=(source,),
                channels=filters,
                in_channels=self.channels(source),
                groups=groups,
                padding=padding,
            )
        )

    def interleave(self, name: str, source: str, step: int) -> str:
        channels = self.channels(source)
        return self._append(Interleave(name=name, inputs=(source,), channels=channels, step=step))

    def first_channels(self, source: str, count: int) -> str:
        name = self._auto_name("copy_channels")
        return self._append(CopyChannels(name=name, inputs=(source,), channels=count, auto=True))

    def fold(self, source: str) -> str:
        name = self._auto_name("sum_into_half_channels")
        half = self.channels(source) // 2
        return self._append(FoldHalves(name=name, inputs=(source,), channels=half, auto=True))

    def add(self, name: str, *sources: str) -> str:
        channels = self.channels(sources[0])
        return self._append(Add(name=name, inputs=sources, channels=channels))

    def concat(self, name: str, *sources: str) -> str:
        channels = sum(map(self.channels, sources))
        auto = not name
        name = name or self._auto_name("concatenate")
        return self._append(Concat(name=name, inputs=sources, channels=channels, auto=auto))


def _group_count(c_in: int, c_out: int, channels: int) -> int:
    """The largest common divisor of both counts that leaves ``channels`` input channels a group."""
    most = c_in // channels
    return next((g for g in range(most, 1, -1) if c_in % g == c_out % g == 0), 1)


def _plan_v1(b: _Builder, ktype: KType, c_in: int, c_out: int, name: str) -> None:
    """MENDEL 28(1), 2022: K, interleave, L, and the sum of both.

    L reads the interleaved output of K but is added to K's output as it was before.
    """
    groups = 1 if ktype.scheme == "conv" else _group_count(c_in, c_out, ktype.channels)
    k = mixed = b.unit(name, INPUT, c_out, groups)
    if groups > 1 and ktype.scheme != "K":
        if c_out > groups:
            mixed = b.interleave(_join(name, "group_interleaved"), k, c_out // groups)
        if c_in >= c_out and ktype.scheme != "K+interleave":
            mixed = _connect_groups(b, ktype, k, mixed, groups, name)
    if ktype.scheme == "D6+kT3":
        groups = _group_count(c_out, c_out, ktype.channels)
        b.unit(_join("e", name), mixed, c_out, groups)


def _connect_groups(b: _Builder, ktype: KType, k: str, mixed: str, groups: int, name: str) -> str:
    """The second convolution L and what joins its result to K's."""
    second = b.unit(_join(name, "group_interconn"), mixed, b.channels(k), groups)
    if ktype.scheme == "D8":
        return b.concat(_join(name, "inter_group_concat"), b.fold(second), b.fold(k))
    skip = mixed if ktype.scheme == "D10" else k
    return b.add(_join(name, "inter_group_add"), second, skip)


def _plan_v2(b: _Builder, ktype: KType, c_in: int, c_out: int, name: str) -> None:
    """Entropy 24(9):1264, 2022: two grouped convolutions without divisibility rules."""
    ch = ktype.channels
    if not (c_in > 2 * ch or (c_out > c_in > ch)):
        b.unit(_join(name, "um"), INPUT, c_out)
        return
    c1, groups = _group_conv(b, INPUT, c_out, ch, _join(name, "c1"), "same")
    if ktype.scheme == "kT3v3" or groups == 1 or c_in < c_out:
        return
    step = c_out // ch
    mixed = b.interleave(_join(name, f"i{step}"), c1, step) if step > 1 else c1
    c2, _ = _group_conv(b, mixed, c_out, ch, _join(name, "c2"), "valid")
    b.add(_join(name, "iga"), c2, c1)


def _group_conv(
    b: _Builder, source: str, filters: int, ch: int, name: str, padding: Literal["same", "valid"]
) -> tuple[str, int]:
    """A convolution with ``ch`` input channels per group, whatever the counts.

    The input is extended by copies of its first channels until the groups are full; filters that
    do not share out evenly make a second path over the first channels, one group each.

    Returns:
        The name of the result and the number of groups.
    """
    c_in = b.channels(source)
    groups = min(-(-c_in // ch), filters)
    if groups == 1:
        return b.unit(_join(name, "dum"), source, filters, padding=padding), 1
    group_in = max(ch, -(-c_in // groups))  # more than ch where the filters limit the groups
    missing = groups * group_in - c_in
    if missing > 0:
        source = b.concat("", source, b.first_channels(source, missing))
    rest = filters % groups
    if rest == 0:
        return b.unit(_join(name, f"m{groups}"), source, filters, groups, padding), groups
    path1 = b.unit(_join(name, f"p1_{groups}"), source, filters - rest, groups, padding)
    head = b.first_channels(source, group_in * rest)
    path2 = b.unit(_join(name, "p2"), head, rest, rest, padding)
    return b.concat(_join(name, "dc"), path1, path2), groups
