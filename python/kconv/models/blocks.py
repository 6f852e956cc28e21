"""Blocks of layers that networks and front ends share: convolution units and MBConv.

Example:
    >>> g = GraphBuilder("unit", (9, 9, 8))
    >>> x = conv_unit(g, "stem_", g.input, 16, kernel_size=3, strides=2, activation="swish")
    >>> g.shape(x), [layer.name for layer in g.build(x).layers]
    ((5, 5, 16), ['input', 'stem_conv', 'stem_bn', 'stem_activation'])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from kconv import ktypes
from kconv.models import options
from kconv.models.activations import ActivationName
from kconv.models.builder import GraphBuilder
from kconv.models.graph import Graph, Initializer, Padding

__all__ = [
    "Pointwise",
    "Role",
    "conv_unit",
    "conv_unit_graph",
    "grouped",
    "mbconv",
    "mbconv_graph",
    "plain",
]

Role = Literal["expand", "se_reduce", "se_expand", "project", "top"]
Pointwise = Callable[[str, Role, str, int], str]
"""Adds what stands for a pointwise convolution: (name's prefix, role, input, filters) -> output."""


def conv_unit(
    g: GraphBuilder,
    prefix: str,
    x: str,
    filters: int,
    kernel_size: int = 1,
    strides: int = 1,
    *,
    groups: int = 1,
    activation: ActivationName | None = None,
    interleave: int = 1,
    residual: bool = False,
    padding: Padding = "same",
    initializer: Initializer = "glorot_uniform",
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    conv_name: str = "conv",
) -> str:
    """Convolution, batch norm, activation, interleave and the sum with the input.

    Args:
        g: takes the layers.
        prefix: what their names begin with.
        x: the input.
        filters: output channels.
        kernel_size: height and width of the kernel.
        strides: in both directions.
        groups: of the convolution; as many as channels make a depthwise one.
        activation: None for none.
        interleave: step of the interleave after the activation; 1 for none.
        residual: whether the input is added at the end.
        padding: of the convolution.
        initializer: of the convolution.
        epsilon: of the batch norm.
        momentum: of the batch norm, in Keras's sense.
        conv_name: the convolution's name after the prefix.

    Returns:
        The name of the unit's output.
    """
    source, channels = x, g.channels(x)
    name = f"{prefix}{conv_name}"
    if groups == channels > 1 and kernel_size > 1 and filters % channels == 0:
        x = g.depthwise_conv(
            name,
            x,
            kernel_size,
            strides,
            padding=padding,
            depth_multiplier=filters // channels,
            initializer=initializer,
        )
    else:
        x = g.conv(
            name,
            x,
            filters,
            kernel_size,
            strides,
            padding=padding,
            groups=groups,
            initializer=initializer,
        )
    x = g.batch_norm(f"{prefix}bn", x, epsilon=epsilon, momentum=momentum)
    if activation:
        x = g.activation(f"{prefix}activation", x, activation)
    if interleave > 1:
        x = g.interleave(f"{prefix}interleave", x, interleave)
    return g.add(f"{prefix}add", [x, source]) if residual else x


def mbconv(
    g: GraphBuilder,
    prefix: str,
    x: str,
    filters: int,
    pointwise: Pointwise,
    *,
    kernel_size: int = 3,
    strides: int = 1,
    expand_ratio: float = 6,
    se_ratio: float = 0.25,
    activation: ActivationName | None = "swish",
    drop_connect: float = 0.0,
    explicit_padding: bool = False,
) -> str:
    """Mobile inverted bottleneck with squeeze and excite.

    Args:
        g: takes the layers.
        prefix: what their names begin with.
        x: the input.
        filters: output channels.
        pointwise: adds the pointwise convolutions: :func:`plain` or :func:`grouped`.
        kernel_size: of the depthwise convolution.
        strides: of the depthwise convolution.
        expand_ratio: inner channels for each of the input's; 1 for no expansion.
        se_ratio: channels of squeeze and excite for each of the input's; 0 for none.
        activation: of the depthwise convolution; None for none.
        drop_connect: rate at which the residual branch is dropped.
        explicit_padding: whether a strided convolution has its padding as a layer of its own.

    Returns:
        The name of the block's output.
    """
    source, filters_in = x, g.channels(x)
    inner = int(filters_in * expand_ratio)
    if expand_ratio != 1:
        x = pointwise(prefix, "expand", x, inner)
    explicit_padding = explicit_padding and strides > 1
    if explicit_padding:
        x = g.zero_pad(f"{prefix}dwconv_pad", x, kernel_size)
    x = conv_unit(
        g,
        prefix,
        x,
        inner,
        kernel_size,
        strides,
        groups=inner,
        activation=activation,
        padding="valid" if explicit_padding else "same",
        initializer="conv_normal",
        conv_name="dwconv",
    )
    if se_ratio:
        gate = g.global_pool(f"{prefix}se_squeeze", x)
        gate = g.reshape(f"{prefix}se_reshape", gate)
        gate = pointwise(prefix, "se_reduce", gate, max(1, int(filters_in * se_ratio)))
        gate = pointwise(prefix, "se_expand", gate, inner)
        x = g.multiply(f"{prefix}se_excite", x, gate)
    x = pointwise(prefix, "project", x, filters)
    if strides == 1 and filters == filters_in:
        if drop_connect > 0:
            x = g.dropout(f"{prefix}drop", x, drop_connect, per_sample=True)
        x = g.add(f"{prefix}add", [x, source])
    return x


def plain(
    g: GraphBuilder,
    activation: ActivationName | None,
    prefix: str,
    role: Role,
    x: str,
    filters: int,
) -> str:
    """A :data:`Pointwise` of an ordinary pointwise convolution."""
    if role in ("se_reduce", "se_expand"):
        return g.conv(
            f"{prefix}{role}",
            x,
            filters,
            use_bias=True,
            initializer="conv_normal",
            activation="sigmoid" if role == "se_expand" else activation,
        )
    return conv_unit(
        g,
        f"{prefix}{role}_",
        x,
        filters,
        activation=None if role == "project" else activation,
        initializer="conv_normal",
    )


def grouped(
    g: GraphBuilder,
    ktype: ktypes.KType | str | int,
    activation: ActivationName | None,
    prefix: str,
    role: Role,
    x: str,
    filters: int,
) -> str:
    """A :data:`Pointwise` of what a kType puts in the place of a pointwise convolution."""
    squeeze_excite = role in ("se_reduce", "se_expand")
    activations: dict[Role, ActivationName | None] = {
        "expand": activation,
        "se_reduce": activation,
        "se_expand": "sigmoid",
    }
    return g.pointwise(
        f"{prefix}{role}_conv" if role in ("project", "top") else f"{prefix}{role}",
        x,
        filters,
        ktype,
        activation=activations.get(role),
        batch_norm=not squeeze_excite,
        use_bias=squeeze_excite,
    )


def conv_unit_graph(
    in_channels: int,
    filters: int,
    kernel_size: int,
    strides: int,
    groups: int,
    activation: ActivationName | None,
    interleave: int,
    residual: bool,
    epsilon: float,
    momentum: float,
) -> Graph:
    """A :func:`conv_unit` alone, of images of any size.

    Raises:
        ValueError: if one of the options has no meaning.
        TypeError: if one of them is of the wrong type.
    """
    _check_sizes(in_channels, filters, kernel_size, strides)
    _check(options.Whole, "groups", groups)
    _check(options.Whole, "interleave", interleave)
    _check_activation(activation)
    if residual and (strides != 1 or filters != in_channels):
        raise ValueError(
            f"residual=True needs the input's shape, not {in_channels} to {filters} channels "
            f"with a stride of {strides}"
        )
    g = GraphBuilder("conv_unit", (None, None, in_channels))
    output = conv_unit(
        g,
        "",
        g.input,
        filters,
        kernel_size,
        strides,
        groups=groups,
        activation=activation,
        interleave=interleave,
        residual=residual,
        epsilon=epsilon,
        momentum=momentum,
    )
    return g.build(output)


def mbconv_graph(
    in_channels: int,
    filters: int,
    kernel_size: int,
    strides: int,
    expand_ratio: float,
    se_ratio: float,
    ktype: ktypes.KType | str | int | None,
    activation: ActivationName | None,
    drop_connect: float,
) -> Graph:
    """An :func:`mbconv` alone, of images of any size; without a ktype of plain convolutions.

    Raises:
        ValueError: if one of the options has no meaning.
        TypeError: if one of them is of the wrong type.
    """
    _check_sizes(in_channels, filters, kernel_size, strides)
    _check(options.Factor, "expand_ratio", expand_ratio)
    if se_ratio:
        _check(options.Factor, "se_ratio", se_ratio)
    _check_activation(activation)
    _check(options.Rate, "drop_connect", drop_connect)
    g = GraphBuilder("mbconv", (None, None, in_channels))
    pointwise = (
        partial(plain, g, activation) if ktype is None else partial(grouped, g, ktype, activation)
    )
    output = mbconv(
        g,
        "",
        g.input,
        filters,
        pointwise,
        kernel_size=kernel_size,
        strides=strides,
        expand_ratio=expand_ratio,
        se_ratio=se_ratio,
        activation=activation,
        drop_connect=drop_connect,
    )
    return g.build(output)


def _check_sizes(in_channels: int, filters: int, kernel_size: int, strides: int) -> None:
    _check(options.Whole, "in_channels", in_channels)
    _check(options.Whole, "filters", filters)
    _check(options.Whole, "kernel_size", kernel_size)
    _check(options.Whole, "strides", strides)


def _check_activation(activation: str | None) -> None:
    if activation is not None:
        _check(options.Elementwise, "activation", activation)


def _check(kind: Any, name: str, value: Any) -> None:
    get_args(kind)[1](name, value)  # an option's type carries its check
