"""The original's ``layers``: its kTypes, its layers, and its convolutions."""
# ruff: noqa: N802, N816 - the original's names

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kconv import ktypes
from kconv.cai._convolutions import (
    Activation,
    Tensor,
    kConv2D,
    kConv2DType0,
    kConv2DType1,
    kConv2DType2,
    kConv2DType3,
    kConv2DType4,
    kConv2DType5,
    kConv2DType6,
    kConv2DType7,
    kConv2DType8,
    kConv2DType9,
    kConv2DType10,
    kGroupConv2D,
    kPointwiseConv2D,
)
from kconv.keras import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    Network,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.keras._model import channel_axis
from kconv.keras.blocks import data_format_of

__all__ = [
    "ConcatNegation",
    "CopyChannels",
    "D6_4ch",
    "D6_8ch",
    "D6_12ch",
    "D6_16ch",
    "D6_24ch",
    "D6_32ch",
    "D6_64ch",
    "D6_128ch",
    "D6v3_2ch",
    "D6v3_4ch",
    "D6v3_8ch",
    "D6v3_12ch",
    "D6v3_16ch",
    "D6v3_24ch",
    "D6v3_32ch",
    "D6v3_64ch",
    "D6v3_128ch",
    "EnforceEvenChannelCount",
    "FitChannelCountTo",
    "GetChannelAxis",
    "GetClasses",
    "GlobalAverageMaxPooling2D",
    "HardSigmoid",
    "HardSwish",
    "InterleaveChannels",
    "Negate",
    "SumIntoHalfChannels",
    "conv2d_bn",
    "kConv2D",
    "kConv2DType0",
    "kConv2DType1",
    "kConv2DType2",
    "kConv2DType3",
    "kConv2DType4",
    "kConv2DType5",
    "kConv2DType6",
    "kConv2DType7",
    "kConv2DType8",
    "kConv2DType9",
    "kConv2DType10",
    "kGroupConv2D",
    "kPointwiseConv2D",
    "kT3_16ch",
    "kT3_32ch",
    "kT3_64ch",
    "kT3_128ch",
    "kT3v3_4ch",
    "kT3v3_8ch",
    "kT3v3_16ch",
    "kT3v3_32ch",
    "kT3v3_64ch",
    "kT3v3_128ch",
]

_serializable = keras.saving.register_keras_serializable(package="kconv")


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
    """Append copies of the channels, the last one cut, up to ``next_channel_count``.

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

    Raises:
        ValueError: if that is below 1.
    """
    if next_channel_count < 1:
        raise ValueError(f"next_channel_count={next_channel_count!r} is below 1")
    data_format = data_format_of(channel_axis)
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

    Raises:
        ValueError: if ``padding`` is neither.
    """
    if padding not in ("same", "valid"):
        raise ValueError(f"padding={padding!r} is not 'same' or 'valid'")
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
