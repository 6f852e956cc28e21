"""The original's ``layers``: its kTypes, its layers, and its convolutions."""
# ruff: noqa: N802, N803, N816 - the original's names

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import keras
from keras import ops

from kconv import ktypes
from kconv.keras import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    Network,
    PointwiseConv2D,
    SumIntoHalfChannels,
    blocks,
)
from kconv.keras._model import channel_axis

Tensor = Any
Activation = str | Callable[[Tensor], Tensor] | None

_serializable = keras.saving.register_keras_serializable(package="kconv")

LEFT_OUT = (*range(7, 13), *range(16, 23), *range(28, 32))
"""Numbers of the original's experimental kTypes, which kconv does not have."""


def _number(name: str) -> Callable[[], int]:
    """The function that gives a kType's number."""

    def number() -> int:
        return ktypes.resolve(name).number

    number.__name__ = number.__qualname__ = name
    number.__doc__ = f"The number of the kType {name}."
    return number


D6_4ch = _number("D6_4ch")
D6_8ch = _number("D6_8ch")
D6_12ch = _number("D6_12ch")
D6_16ch = _number("D6_16ch")
D6_24ch = _number("D6_24ch")
D6_32ch = _number("D6_32ch")
D6_64ch = _number("D6_64ch")
D6_128ch = _number("D6_128ch")
D6v3_2ch = _number("D6v3_2ch")
D6v3_4ch = _number("D6v3_4ch")
D6v3_8ch = _number("D6v3_8ch")
D6v3_12ch = _number("D6v3_12ch")
D6v3_16ch = _number("D6v3_16ch")
D6v3_24ch = _number("D6v3_24ch")
D6v3_32ch = _number("D6v3_32ch")
D6v3_64ch = _number("D6v3_64ch")
D6v3_128ch = _number("D6v3_128ch")
kT3_16ch = _number("kT3_16ch")
kT3_32ch = _number("kT3_32ch")
kT3_64ch = _number("kT3_64ch")
kT3_128ch = _number("kT3_128ch")
kT3v3_4ch = _number("kT3v3_4ch")
kT3v3_8ch = _number("kT3v3_8ch")
kT3v3_16ch = _number("kT3v3_16ch")
kT3v3_32ch = _number("kT3v3_32ch")
kT3v3_64ch = _number("kT3v3_64ch")
kT3v3_128ch = _number("kT3v3_128ch")


def check_ktype(kType: Any) -> Any:
    """A kType, or a list of them, as it is; raises for those that are left out.

    Raises:
        NotImplementedError: for one of the original's experimental kTypes.
    """
    for number in kType if isinstance(kType, list | tuple) else [kType]:
        if number in LEFT_OUT:
            raise _left_out(number)
    return kType


def _left_out(number: int) -> NotImplementedError:
    return NotImplementedError(f"kType {number} of the original is not in kconv")


@_serializable
class Negate(keras.layers.Layer):
    """-x.

    Example:
        >>> float(Negate()(ops.ones((1,)))[0])
        -1.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Negate, whatever the shape."""
        return -inputs


@_serializable
class ConcatNegation(keras.layers.Layer):
    """x and -x, concatenated over the channels, the last axis.

    Example:
        >>> ConcatNegation()(ops.ones((1, 4, 4, 3))).shape
        (1, 4, 4, 6)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """(..., C) to (..., 2 C)."""
        return ops.concatenate([inputs, -inputs], axis=-1)


@_serializable
def HardSigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6.

    Example:
        >>> float(HardSigmoid(ops.zeros(())))
        0.5
    """
    return ops.relu6(x + 3.0) * (1.0 / 6.0)


@_serializable
def HardSwish(x: Tensor) -> Tensor:
    """X times its hard sigmoid.

    Example:
        >>> float(HardSwish(ops.ones(()) * 3))
        3.0
    """
    return x * HardSigmoid(x)


def GlobalAverageMaxPooling2D(previous_layer: Tensor, name: str | None = None) -> Tensor:
    """Global average and global maximum pooling, concatenated.

    Example:
        >>> GlobalAverageMaxPooling2D(keras.Input((8, 8, 3))).shape
        (None, 6)

    Args:
        previous_layer: (N, H, W, C).
        name: of the concatenation.

    Returns:
        (N, 2 C).
    """
    average = keras.layers.GlobalAveragePooling2D()(previous_layer)
    maximum = keras.layers.GlobalMaxPooling2D()(previous_layer)
    return keras.layers.Concatenate(axis=1, name=name)([average, maximum])


def FitChannelCountTo(
    last_tensor: Tensor,
    next_channel_count: int,
    has_interleaving: bool = False,
    channel_axis: int = 3,
) -> Tensor:
    """Append copies of the channels, the last one cut, until there are so many.

    Example:
        >>> FitChannelCountTo(keras.Input((8, 8, 3)), 7).shape
        (None, 8, 8, 7)

    Args:
        last_tensor: (N, H, W, C), or (N, C, H, W) with ``channel_axis=1``.
        next_channel_count: channels of the result.
        has_interleaving: whether copy number i (the input is number 0) is interleaved by
            (i + 1) mod C.
        channel_axis: 3 or 1.

    Returns:
        Like ``last_tensor``, with ``next_channel_count`` channels.
    """
    data_format = _data_format(channel_axis)
    channels = last_tensor.shape[channel_axis]
    copies = []
    for number, start in enumerate(range(0, next_channel_count, channels)):
        copy = last_tensor
        if has_interleaving and number:
            copy = InterleaveChannels((number + 1) % channels, data_format=data_format)(copy)
        if next_channel_count - start < channels:
            copy = CopyChannels(0, next_channel_count - start, data_format=data_format)(copy)
        copies.append(copy)
    return copies[0] if len(copies) == 1 else keras.layers.Concatenate(channel_axis)(copies)


def EnforceEvenChannelCount(last_tensor: Tensor, channel_axis: int = 3) -> Tensor:
    """Append a copy of the first channel where the number of channels is odd.

    Example:
        >>> EnforceEvenChannelCount(keras.Input((8, 8, 3))).shape
        (None, 8, 8, 4)
    """
    channels = last_tensor.shape[channel_axis]
    return FitChannelCountTo(last_tensor, channels + channels % 2, channel_axis=channel_axis)


def GetChannelAxis() -> int:
    """The axis of the channels in Keras's setting of the data format.

    Example:
        >>> GetChannelAxis()
        3
    """
    return channel_axis()


def GetClasses() -> dict[str, Any]:
    """The layers and functions by the names under which the original's files know them.

    Example:
        >>> GetClasses()["CopyChannels"]
        <class 'kconv.keras.layers.CopyChannels'>
    """
    return {
        "CopyChannels": CopyChannels,
        "Negate": Negate,
        "ConcatNegation": ConcatNegation,
        "InterleaveChannels": InterleaveChannels,
        "SumIntoHalfChannels": SumIntoHalfChannels,
        "HardSigmoid": HardSigmoid,
        "HardSwish": HardSwish,
        "PointwiseConv2D": PointwiseConv2D,
        "DepthwiseConv2D": DepthwiseConv2D,
        "Network": Network,
    }


def conv2d_bn(
    x: Tensor,
    filters: int,
    num_row: int,
    num_col: int,
    padding: str = "same",
    strides: tuple[int, int] = (1, 1),
    name: str | None = None,
    use_bias: bool = False,
    activation: Activation = "relu",
    has_batch_norm: bool = True,
    has_batch_scale: bool = False,
    groups: int = 0,
    kernel_initializer: Any = "glorot_uniform",
    kernel_regularizer: Any = None,
) -> Tensor:
    """Convolution (``<name>_conv``), batch norm (``<name>_bn``) and activation (``<name>``).

    Example:
        >>> conv2d_bn(keras.Input((8, 8, 4)), 6, 3, 3, groups=2).shape
        (None, 8, 8, 6)

    Args:
        x: (N, H, W, C).
        filters: channels of the result.
        num_row: height of the kernel.
        num_col: its width.
        padding: "same" or "valid".
        strides: (vertical, horizontal).
        name: what the layers' names begin with; None leaves the naming to Keras.
        use_bias: whether the convolution has a bias.
        activation: None for none.
        has_batch_norm: whether there is a batch norm.
        has_batch_scale: whether it has a gamma.
        groups: of the convolution; 0 and 1 are the same.
        kernel_initializer: as in Keras.
        kernel_regularizer: as in Keras.

    Returns:
        (N, H', W', filters).
    """
    arguments = {
        "groups": max(1, groups),
        "use_bias": use_bias,
        "kernel_initializer": kernel_initializer,
        "kernel_regularizer": kernel_regularizer,
        "name": name and f"{name}_conv",
    }
    if (num_row, num_col, *strides) == (1, 1, 1, 1):
        x = PointwiseConv2D(filters, **arguments)(x)
    else:
        convolution = keras.layers.Conv2D(
            filters, (num_row, num_col), strides, padding=padding, **arguments
        )
        x = convolution(x)
    if has_batch_norm:
        x = keras.layers.BatchNormalization(
            axis=GetChannelAxis(), scale=has_batch_scale, name=name and f"{name}_bn"
        )(x)
    return x if activation is None else keras.layers.Activation(activation, name=name)(x)


def kPointwiseConv2D(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kType: int | str = 2,
) -> Tensor:
    """:func:`kconv.keras.kPointwiseConv2D`.

    Example:
        >>> kPointwiseConv2D(keras.Input((8, 8, 64)), 32, kType=D6_16ch()).shape
        (None, 8, 8, 32)

    Raises:
        NotImplementedError: for one of the original's experimental kTypes.
    """
    return blocks.kPointwiseConv2D(
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        check_ktype(kType),
    )


def kConv2D(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
    kType: int | str = 2,
) -> Tensor:
    """A convolution as the kType replaces it.

    A kernel beyond 1x1 and a stride are those of the convolutions that read the input; the ones
    that mix the groups afterwards stay pointwise.

    Example:
        >>> kConv2D(keras.Input((8, 8, 64)), 32, kernel_size=3, stride_size=2).shape
        (None, 4, 4, 32)

    Args:
        last_tensor: (N, H, W, C), or (N, C, H, W) with ``channel_axis=1``.
        filters: channels of the result.
        channel_axis: 3 or 1.
        name: what the layers' names begin with; None leaves the naming to Keras.
        activation: what follows each convolution (and batch norm); None for nothing.
        has_batch_norm: whether a batch norm follows each convolution.
        has_batch_scale: whether the batch norms have a gamma.
        use_bias: whether the convolutions have a bias.
        kernel_size: height and width of the kernel.
        stride_size: vertical and horizontal stride.
        padding: "same" or "valid".
        kType: which replacement: the original's number, or a name such as "D6_16ch".

    Returns:
        (N, H', W', filters), or (N, filters, H', W').

    Raises:
        NotImplementedError: for one of the original's experimental kTypes.
        ValueError: an unknown kType, or sizes below 1.
    """
    return _kconv(
        check_ktype(kType),
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType0(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> Tensor:
    """:func:`kConv2D` with kType 0, the ordinary convolution."""
    return _kconv(
        0,
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType1(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> Tensor:
    """:func:`kConv2D` with kType 1: grouped and interleaved."""
    return _kconv(
        1,
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType2(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    min_channels_per_group: int = 16,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> Tensor:
    """:func:`kConv2D` of the kind D6 (V1), with any number of channels per group."""
    return _kconv(
        _ktype("D6", min_channels_per_group),
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType3(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
    min_channels_per_group: int = 16,
) -> Tensor:
    """:func:`kConv2D` of the kind kT3: grouped alone."""
    return _kconv(
        _ktype("K", min_channels_per_group),
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType4(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> Tensor:
    """:func:`kConv2D` with kType 4: D6_16ch, then kT3_16ch."""
    return _kconv(
        4,
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType5(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> Tensor:
    """:func:`kConv2D` with kType 5: as D6_16ch, with the skip connection after the interleave."""
    return _kconv(
        5,
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType6(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> Tensor:
    """:func:`kConv2D` with kType 6: as D6_16ch, both halves folded and concatenated."""
    return _kconv(
        6,
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kConv2DType7(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    bin_conv_count: int = 4,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> NoReturn:
    """Not in kconv.

    Raises:
        NotImplementedError: always.
    """
    raise _left_out(7)


def kConv2DType8(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    min_channels_per_group: int = 16,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
    always_intergroup: bool = False,
) -> NoReturn:
    """Not in kconv.

    Raises:
        NotImplementedError: always.
    """
    raise _left_out(8)


def kConv2DType9(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    min_channels_per_group: int = 16,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
    always_intergroup: bool = False,
) -> NoReturn:
    """Not in kconv.

    Raises:
        NotImplementedError: always.
    """
    raise _left_out(9)


def kConv2DType10(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    min_channels_per_group: int = 16,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
    never_intergroup: bool = False,
) -> Tensor:
    """:func:`kConv2D` of the kind D6v3 (V2), or kT3v3 with ``never_intergroup``."""
    return _kconv(
        _ktype("kT3v3" if never_intergroup else "D6v3", min_channels_per_group),
        last_tensor,
        filters,
        channel_axis,
        name,
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        kernel_size,
        stride_size,
        padding,
    )


def kGroupConv2D(
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    channels_per_group: int = 16,
    name: str | None = None,
    activation: Activation = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kernel_size: int = 1,
    stride_size: int = 1,
    padding: str = "same",
) -> tuple[Tensor, int]:
    """A grouped convolution of any numbers of channels and filters (V2).

    Example:
        >>> y, groups = kGroupConv2D(keras.Input((8, 8, 50)), 36)
        >>> y.shape, groups
        ((None, 8, 8, 36), 4)

    Args:
        last_tensor: as in :func:`kConv2D`, and so are the other arguments.
        filters: channels of the result.
        channel_axis: 3 or 1.
        channels_per_group: channels of the input that each group reads.
        name: what the layers' names begin with.
        activation: what follows each convolution (and batch norm).
        has_batch_norm: whether a batch norm follows each convolution.
        has_batch_scale: whether the batch norms have a gamma.
        use_bias: whether the convolutions have a bias.
        kernel_size: height and width of the kernel.
        stride_size: vertical and horizontal stride.
        padding: "same" or "valid".

    Returns:
        The result, like ``last_tensor`` with ``filters`` channels, and the number of groups.
    """
    block = ktypes._Builder(last_tensor.shape[channel_axis])
    _, groups = ktypes._group_conv(
        block, ktypes.INPUT, filters, channels_per_group, name or "", "same"
    )
    unit = partial(
        _unit,
        channel_axis=channel_axis,
        activation=activation,
        has_batch_norm=has_batch_norm,
        has_batch_scale=has_batch_scale,
        use_bias=use_bias,
        window=(kernel_size, stride_size, padding),
    )
    return _assemble(block.steps, last_tensor, channel_axis, bool(name), unit), groups


def _ktype(scheme: ktypes.Scheme, channels: int) -> ktypes.KType:
    """A kType that may have no number of its own."""
    return ktypes.KType(f"{scheme}_{channels}ch", -1, scheme, channels)


def _data_format(channel_axis: int) -> str:
    return "channels_last" if channel_axis == 3 else "channels_first"


def _kconv(
    ktype: Any,
    last_tensor: Tensor,
    filters: int,
    channel_axis: int,
    name: str | None,
    activation: Activation,
    has_batch_norm: bool,
    has_batch_scale: bool,
    use_bias: bool,
    kernel_size: int,
    stride_size: int,
    padding: str,
) -> Tensor:
    if kernel_size == stride_size == 1:
        return blocks.kPointwiseConv2D(
            last_tensor,
            filters,
            channel_axis,
            name,
            activation,
            has_batch_norm,
            has_batch_scale,
            use_bias,
            ktype,
        )
    unit = partial(
        _unit,
        channel_axis=channel_axis,
        activation=activation,
        has_batch_norm=has_batch_norm,
        has_batch_scale=has_batch_scale,
        use_bias=use_bias,
        window=(kernel_size, stride_size, padding),
    )
    plan = ktypes.plan(ktype, last_tensor.shape[channel_axis], filters, name or "")
    return _assemble(plan, last_tensor, channel_axis, bool(name), unit)


def _unit(
    step: ktypes.Unit,
    x: Tensor,
    reads_input: bool,
    named: bool,
    *,
    channel_axis: int,
    activation: Activation,
    has_batch_norm: bool,
    has_batch_scale: bool,
    use_bias: bool,
    window: tuple[int, int, str],
) -> Tensor:
    """A convolution unit; only the first ones have a window of more than a pixel."""
    kernel_size, strides, padding = window if reads_input else (1, 1, "same")
    x = keras.layers.Conv2D(
        step.channels,
        kernel_size,
        strides,
        padding=padding,
        groups=step.groups,
        use_bias=use_bias,
        data_format=_data_format(channel_axis),
        name=step.conv_name if named else None,
    )(x)
    if has_batch_norm:
        x = keras.layers.BatchNormalization(
            axis=channel_axis, scale=has_batch_scale, name=step.bn_name if named else None
        )(x)
    if activation is not None:
        name = step.activation_name if named else None
        x = keras.layers.Activation(activation, name=name)(x)
    return x


def _assemble(
    steps: Iterable[ktypes.Step],
    last_tensor: Tensor,
    channel_axis: int,
    named: bool,
    unit: Callable[[ktypes.Unit, Tensor, bool, bool], Tensor],
) -> Tensor:
    """The layers of a block's steps, of which ``unit`` makes the convolutions."""
    data_format = _data_format(channel_axis)
    results, unconvolved = {ktypes.INPUT: last_tensor}, {ktypes.INPUT}
    y = last_tensor
    for step in steps:
        inputs = [results[source] for source in step.inputs]
        name = step.name if named and not step.auto else None
        reads_input = unconvolved.issuperset(step.inputs)
        match step:
            case ktypes.Unit():
                y = unit(step, inputs[0], reads_input, named)
            case ktypes.Interleave():
                y = InterleaveChannels(step.step, data_format=data_format, name=name)(inputs[0])
            case ktypes.CopyChannels():
                y = CopyChannels(step.start, step.channels, data_format=data_format, name=name)(
                    inputs[0]
                )
            case ktypes.FoldHalves():
                y = SumIntoHalfChannels(data_format=data_format, name=name)(inputs[0])
            case ktypes.Concat():
                y = keras.layers.Concatenate(axis=channel_axis, name=name)(inputs)
            case ktypes.Add():
                y = keras.layers.Add(name=name)(inputs)
        if reads_input and not isinstance(step, ktypes.Unit):
            unconvolved.add(step.name)
        results[step.name] = y
    return y
