"""The original's convolutions by kTypes, which :mod:`kconv.cai.layers` offers."""
# ruff: noqa: N802, N803, N816 - the original's names

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import keras

from kconv import ktypes
from kconv.keras import blocks

Tensor = Any
Activation = str | Callable[[Tensor], Tensor] | None

LEFT_OUT = (*range(7, 13), *range(16, 23), *range(28, 32))
"""Numbers of the original's experimental kTypes, which kconv does not have."""


def check_ktype(kType: Any) -> Any:
    """A kType, or a list of them, as it is; raises for those that are left out.

    Raises:
        NotImplementedError: for one of the original's experimental kTypes.
    """
    for number in kType if isinstance(kType, list | tuple) else [kType]:
        if number in LEFT_OUT:
            raise left_out(number)
    return kType


def left_out(number: int) -> NotImplementedError:
    return NotImplementedError(f"kType {number} of the original is not in kconv")


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
        >>> kPointwiseConv2D(keras.Input((8, 8, 64)), 32, kType=2).shape
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


_SHARED = {
    "filters": 32,
    "channel_axis": 3,
    "name": None,
    "activation": None,
    "has_batch_norm": True,
    "has_batch_scale": True,
    "use_bias": True,
}
_WINDOW = {"kernel_size": 1, "stride_size": 1, "padding": "same"}
_GROUP = {"min_channels_per_group": 16}


def _number(number: int) -> Callable[[], int]:
    return lambda: number


def _missing(number: int) -> Callable[..., NoReturn]:
    def raises(**options: Any) -> NoReturn:
        raise left_out(number)

    return raises


def _channels(scheme: ktypes.Scheme) -> Callable[[int], ktypes.KType]:
    """A kType that may have no number of its own."""
    return lambda min_channels_per_group: ktypes.KType(
        f"{scheme}_{min_channels_per_group}ch", -1, scheme, min_channels_per_group
    )


def _v2(min_channels_per_group: int, never_intergroup: bool) -> ktypes.KType:
    return _channels("kT3v3" if never_intergroup else "D6v3")(min_channels_per_group)


# By number: the arguments after the shared ones, the kType from those that are not the window's,
# and what the function is.
_TYPES: dict[int, tuple[dict[str, Any], Callable[..., Any], str]] = {
    0: (_WINDOW, _number(0), "the ordinary convolution"),
    1: (_WINDOW, _number(1), "grouped and interleaved"),
    2: (_GROUP | _WINDOW, _channels("D6"), "D6 (V1), with any number of channels per group"),
    3: (_WINDOW | _GROUP, _channels("K"), "kT3, grouped alone"),
    4: (_WINDOW, _number(4), "D6_16ch, then kT3_16ch"),
    5: (_WINDOW, _number(5), "as D6_16ch, with the skip connection after the interleave"),
    6: (_WINDOW, _number(6), "as D6_16ch, both halves folded and concatenated"),
    7: ({"bin_conv_count": 4} | _WINDOW, _missing(7), ""),
    8: (_GROUP | _WINDOW | {"always_intergroup": False}, _missing(8), ""),
    9: (_GROUP | _WINDOW | {"always_intergroup": False}, _missing(9), ""),
    10: (
        _GROUP | _WINDOW | {"never_intergroup": False},
        _v2,
        "D6v3 (V2), or kT3v3 with ``never_intergroup``",
    ),
}


def _of_type(number: int) -> Callable[..., Tensor]:
    """The original's function of a kType, with its arguments in their order."""
    own, ktype, what = _TYPES[number]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    tensor = inspect.Parameter("last_tensor", kind)
    rest = [inspect.Parameter(n, kind, default=v) for n, v in (_SHARED | own).items()]
    signature = inspect.Signature([tensor, *rest])

    def convolution(*args: Any, **kwargs: Any) -> Tensor:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"kConv2DType{number}() {error}") from None
        bound.apply_defaults()
        options = bound.arguments
        of_ktype = {name: options.pop(name) for name in own if name not in _WINDOW}
        return _kconv(ktype(**of_ktype), **options)

    convolution.__name__ = convolution.__qualname__ = f"kConv2DType{number}"
    convolution.__signature__ = signature  # type: ignore[attr-defined]
    convolution.__doc__ = f":func:`kConv2D` with kType {number}: {what}."
    if not what:
        convolution.__doc__ = "Not in kconv.\n\nRaises:\n    NotImplementedError: always.\n"
    return convolution


kConv2DType0 = _of_type(0)
kConv2DType1 = _of_type(1)
kConv2DType2 = _of_type(2)
kConv2DType3 = _of_type(3)
kConv2DType4 = _of_type(4)
kConv2DType5 = _of_type(5)
kConv2DType6 = _of_type(6)
kConv2DType7 = _of_type(7)
kConv2DType8 = _of_type(8)
kConv2DType9 = _of_type(9)
kConv2DType10 = _of_type(10)


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
    plan = ktypes.group_conv(
        last_tensor.shape[channel_axis], filters, channels_per_group, name or ""
    )
    y = _apply(
        plan,
        last_tensor,
        channel_axis,
        bool(name),
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        (kernel_size, stride_size, padding),
    )
    return y, plan.units[0].groups


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
    if padding not in ("same", "valid"):
        raise ValueError(f"padding={padding!r} is not 'same' or 'valid'")
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
    plan = ktypes.plan(ktype, last_tensor.shape[channel_axis], filters, name or "")
    return _apply(
        plan,
        last_tensor,
        channel_axis,
        bool(name),
        activation,
        has_batch_norm,
        has_batch_scale,
        use_bias,
        (kernel_size, stride_size, padding),
    )


def _apply(
    plan: ktypes.Plan,
    last_tensor: Tensor,
    channel_axis: int,
    has_name: bool,
    activation: Activation,
    has_batch_norm: bool,
    has_batch_scale: bool,
    use_bias: bool,
    window: tuple[int, int, str],
) -> Tensor:
    """A block whose first convolutions have a window (kernel size, strides, padding)."""
    data_format = blocks.data_format_of(channel_axis)

    def named(layer_name: str) -> str | None:
        return layer_name if has_name else None

    def unit(step: ktypes.Unit, x: Tensor) -> Tensor:
        kernel_size, strides, padding = window if step in plan.first_units else (1, 1, "same")
        x = keras.layers.Conv2D(
            step.channels,
            kernel_size,
            strides,
            padding=padding,
            groups=step.groups,
            use_bias=use_bias,
            data_format=data_format,
            name=named(step.conv_name),
        )(x)
        options = (activation, has_batch_norm, has_batch_scale)
        return blocks.norm_and_activation(x, step, channel_axis, *options, named)

    return blocks.apply_plan(plan, last_tensor, unit, data_format, named)
