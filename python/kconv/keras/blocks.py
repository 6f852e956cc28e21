"""The papers' replacement of a pointwise convolution, as Keras layers (V1 and V2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from kconv import ktypes
from kconv.keras.layers import (
    CopyChannels,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)

Tensor = Any


def kPointwiseConv2D(  # noqa: N802 - the original's name
    last_tensor: Tensor,
    filters: int = 32,
    channel_axis: int = 3,
    name: str | None = None,
    activation: str | Callable[[Tensor], Tensor] | None = None,
    has_batch_norm: bool = True,
    has_batch_scale: bool = True,
    use_bias: bool = True,
    kType: str | int = 2,  # noqa: N803 - the original's name
) -> Tensor:
    """Grouped convolutions in the place of a 1x1 convolution, with far fewer parameters.

    Example:
        >>> x = keras.Input((32, 32, 144))
        >>> y = kPointwiseConv2D(x, 24, name="project", activation="swish", use_bias=False)
        >>> y.shape, keras.Model(x, y).count_params()
        ((None, 32, 32, 24), 696)

    Args:
        last_tensor: (N, H, W, C), or (N, C, H, W) with ``channel_axis=1``.
        filters: channels of the result.
        channel_axis: 3 or 1.
        name: what the layers' names begin with; None leaves the naming to Keras.
        activation: what follows each convolution (and batch norm); None for nothing.
        has_batch_norm: whether a batch norm follows each convolution.
        has_batch_scale: whether the batch norms have a gamma.
        use_bias: whether the convolutions have a bias.
        kType: which replacement: a name such as "D6_16ch", or the original's number.

    Returns:
        Like ``last_tensor``, with ``filters`` channels.

    Raises:
        ValueError: an unknown kType, or sizes below 1.
        TypeError: ``last_tensor`` is no tensor.
    """
    if not hasattr(last_tensor, "shape"):
        raise TypeError(
            f"last_tensor={last_tensor!r}, expected a tensor, as this is a function and no layer"
        )
    if channel_axis not in (1, 3):
        raise ValueError(f"channel_axis={channel_axis} is neither 1 nor 3")
    data_format = data_format_of(channel_axis)
    plan = ktypes.plan(kType, last_tensor.shape[channel_axis], filters, name or "")

    def named(layer_name: str) -> str | None:
        return layer_name.replace("/", "_") if name else None

    def unit(step: ktypes.Unit, x: Tensor) -> Tensor:
        x = PointwiseConv2D(
            step.channels,
            groups=step.groups,
            use_bias=use_bias,
            data_format=data_format,
            name=named(step.conv_name),
        )(x)
        options = (activation, has_batch_norm, has_batch_scale)
        return norm_and_activation(x, step, channel_axis, *options, named)

    return apply_plan(plan, last_tensor, unit, data_format, named)


def data_format_of(channel_axis: int) -> str:
    """Keras's name of a layout, of which the channels' axis is 3 or 1."""
    return "channels_last" if channel_axis == 3 else "channels_first"


def norm_and_activation(
    x: Tensor,
    step: ktypes.Unit,
    channel_axis: int,
    activation: str | Callable[[Tensor], Tensor] | None,
    has_batch_norm: bool,
    has_batch_scale: bool,
    named: Callable[[str], str | None],
) -> Tensor:
    """What follows a block's convolution.

    Args:
        x: the convolution's output.
        step: its step, which names the layers.
        channel_axis: 3 or 1.
        activation: None for none.
        has_batch_norm: whether there is one.
        has_batch_scale: whether it has a gamma.
        named: from a step's name to a layer's.

    Returns:
        Like ``x``.
    """
    if has_batch_norm:
        x = keras.layers.BatchNormalization(
            axis=channel_axis, scale=has_batch_scale, name=named(step.bn_name)
        )(x)
    if activation is not None:
        x = keras.layers.Activation(activation, name=named(step.activation_name))(x)
    return x


def apply_plan(
    plan: ktypes.Plan,
    x: Tensor,
    unit: Callable[[ktypes.Unit, Tensor], Tensor],
    data_format: str,
    named: Callable[[str], str | None],
) -> Tensor:
    """The output of a block.

    Args:
        plan: the block.
        x: (N, H, W, C), or (N, C, H, W).
        unit: applies one of the block's convolutions, with what follows it.
        data_format: "channels_last" or "channels_first".
        named: from a step's name to a layer's.

    Returns:
        Like ``x``, with the channels of the block's last step.
    """

    def apply(step: ktypes.Step, inputs: list[Tensor]) -> Tensor:
        options = {"name": None if step.auto else named(step.name)}
        of_images = {**options, "data_format": data_format}
        match step:
            case ktypes.Unit():
                return unit(step, *inputs)
            case ktypes.Interleave():
                return InterleaveChannels(step.step, **of_images)(*inputs)
            case ktypes.CopyChannels():
                return CopyChannels(step.start, step.channels, **of_images)(*inputs)
            case ktypes.FoldHalves():
                return SumIntoHalfChannels(**of_images)(*inputs)
            case ktypes.Concat():
                axis = 3 if data_format == "channels_last" else 1
                return keras.layers.Concatenate(axis=axis, **options)(inputs)
            case ktypes.Add():
                return keras.layers.Add(**options)(inputs)
        raise TypeError(f"step {step.name!r}: a {type(step).__name__} has no Keras layer")

    return plan.walk(x, apply)
