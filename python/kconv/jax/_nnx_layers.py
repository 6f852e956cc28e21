"""Flax's convolutions on kconv's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kconv._geometry import interleave_order
from kconv.jax import ops

__all__ = ["DepthwiseConv", "InterleaveChannels", "PointwiseConv"]


class PointwiseConv(nnx.Conv):
    """1x1 convolution in groups, its output channels interleaved in the same pass (V1).

    What the kernels do not compute, such as an input dilation, padding, or complex numbers, is
    computed by ``nnx.Conv``; so the layer always gives what that gives, interleaved.

    Example:
        >>> layer = PointwiseConv(16, 24, groups=4, interleave=6, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 8, 8, 16))).shape, layer.kernel.shape, layer.bias.shape
        ((2, 8, 8, 24), (1, 1, 4, 24), (24,))

    Args:
        in_features: C_in.
        out_features: C_out.
        groups: number of groups; divides C_in and C_out.
        interleave: step of the interleave that follows the convolution; 1 keeps the order.
        rngs: the keys for the initial values.
        **options: the other arguments of ``nnx.Conv``: strides, use_bias, mask, dtype, ...

    Input: (..., H, W, C_in). Output: (..., H_out, W_out, C_out).

    Raises:
        ValueError: if the groups do not divide the channels, or the step is below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 1,
        interleave: int = 1,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        count = options.pop("feature_group_count", groups)
        if groups not in (1, count):
            raise ValueError(f"feature_group_count={count} is not groups={groups}")
        groups = count
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if groups < 1 or features % groups:
                raise ValueError(f"{name}={features} is not divisible by groups={groups}")
        if interleave < 1:
            raise ValueError(f"interleave={interleave} must be at least 1")
        super().__init__(
            in_features, out_features, (1, 1), feature_group_count=groups, rngs=rngs, **options
        )
        self.interleave = interleave

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolve; see the class for the shapes."""
        strides, padding = _pair(self.strides), _padding(self.padding)
        operands = _operands(self, inputs)
        # Neither the input's own pixels nor zeros are added for a kernel of 1x1.
        unpadded = padding in ("SAME", "VALID", "CIRCULAR", "REFLECT", ((0, 0), (0, 0)))
        if (
            not operands
            or not strides
            or not unpadded
            or out_sharding
            or self.kernel_size != (1, 1)
        ):
            y = _by_flax(self, inputs, out_sharding)
            return y if self.interleave == 1 else _interleaved(y, self.interleave)
        images, kernel, bias = operands
        if strides != (1, 1):  # the pixels that the convolution reads
            images = images[:, :: strides[0], :: strides[1]]
        y = ops.pointwise_conv(
            images,
            kernel,
            bias,
            groups=self.feature_group_count,
            interleave=self.interleave,
            layout="NHWC",
            weight_layout="IO",
        )
        return _like(inputs, y)


class DepthwiseConv(nnx.Conv):
    """Depthwise convolution: every channel with its own k x k kernel.

    What the kernels do not compute, such as a dilation, "CIRCULAR" padding, or complex numbers, is
    computed by ``nnx.Conv``.

    Example:
        >>> layer = DepthwiseConv(16, 3, strides=2, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 9, 9, 16))).shape, layer.kernel.shape
        ((2, 5, 5, 16), (3, 3, 1, 16))

    Args:
        features: C, of input and output.
        kernel_size: k: 3, 5 or 7.
        strides: 1 or 2, or one for each direction.
        padding: "SAME" (TensorFlow's, asymmetric at stride 2), "VALID", "CIRCULAR", "REFLECT", the
            pixels added on every side, or ((top, bottom), (left, right)).
        rngs: the keys for the initial values.
        **options: the other arguments of ``nnx.Conv``: use_bias, mask, kernel_dilation, dtype, ...

    Input: (..., H, W, C). Output: (..., H_out, W_out, C).

    Raises:
        ValueError: if a size or the padding is none of these.
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        strides: int | Sequence[int] | None = 1,
        padding: Any = "SAME",
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if kernel_size not in (3, 5, 7):
            raise ValueError(f"kernel_size={kernel_size}, expected 3, 5 or 7")
        if not set(_pair(strides) or (0,)) <= {1, 2}:
            raise ValueError(f"strides={strides}, expected 1 or 2, or one for each direction")
        if options.pop("feature_group_count", features) != features:
            raise ValueError(f"feature_group_count is not features={features}")
        super().__init__(
            features,
            features,
            (kernel_size, kernel_size),
            1 if strides is None else strides,
            padding=padding,
            feature_group_count=features,
            rngs=rngs,
            **options,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolve; see the class for the shapes."""
        strides, padding = _pair(self.strides), _padding(self.padding)
        operands = _operands(self, inputs)
        if (
            not operands
            or strides not in ((1, 1), (2, 2))
            or padding in ("CIRCULAR", "REFLECT", None)
            or self.kernel_shape not in [(k, k, 1, self.in_features) for k in (3, 5, 7)]
            or out_sharding
        ):
            return _by_flax(self, inputs, out_sharding)
        images, kernel, bias = operands
        borders: Any = padding.lower() if isinstance(padding, str) else padding
        y = ops.depthwise_conv(
            images,
            kernel[:, :, 0],
            bias,
            stride=strides[0],
            padding=borders,
            layout="NHWC",
            weight_layout="IO",
        )
        return _like(inputs, y)


class InterleaveChannels(nnx.Module):
    """Channels s, s + step, s + 2 step, ... for s = 0 .. step - 1 in turn (V1).

    Example:
        >>> InterleaveChannels(2)(jax.numpy.arange(5.0).reshape(1, 1, 1, 5)).ravel()
        Array([0., 2., 4., 1., 3.], dtype=float32)

    Args:
        step: the distance of channels that become neighbours; 1 changes nothing.

    Input and output: (..., H, W, C).

    Raises:
        ValueError: if the step is below 1.
    """

    def __init__(self, step: int) -> None:
        if step < 1:
            raise ValueError(f"step={step} must be at least 1")
        self.step = step

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Permute the channels."""
        return _interleaved(inputs, self.step)


def _interleaved(x: jax.Array, step: int) -> jax.Array:
    """x: (..., C) of any dtype."""
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.take(x, jnp.array(interleave_order(x.shape[-1], step)), axis=-1)
    return _like(x, ops.interleave(_images(x), step, layout="NHWC"))


def _images(x: jax.Array) -> jax.Array:
    """(..., H, W, C) -> (N, H, W, C)."""
    return x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:])


def _like(inputs: jax.Array, y: jax.Array) -> jax.Array:
    """Undoes :func:`_images` for a result of it."""
    return y if inputs.ndim == 4 else y.reshape(*inputs.shape[:-3], *y.shape[1:])


def _operands(layer: nnx.Conv, inputs: jax.Array) -> tuple[jax.Array, ...] | None:
    """Images, kernel and bias as ``nnx.Conv`` would convolve them.

    None if the kernels do not compute what the layer is set up for; strides, padding and the size
    of the kernel are not looked at.
    """
    kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
    mask = layer.mask
    if (
        inputs.ndim < 3
        or inputs.shape[-1] != layer.in_features
        or kernel.shape != layer.kernel_shape
        or (mask is not None and mask.shape != layer.kernel_shape)
        or layer.use_bias != (bias is not None)
        or _pair(layer.kernel_dilation) != (1, 1)
        or _pair(layer.input_dilation) != (1, 1)
        or layer.conv_general_dilated is not jax.lax.conv_general_dilated
        or not (layer.precision is None or isinstance(layer.precision, jax.lax.Precision))
    ):
        return None
    if mask is not None:
        kernel = kernel * mask
    images, kernel, bias = layer.promote_dtype((inputs, kernel, bias), dtype=layer.dtype)
    dtypes = {x.dtype for x in (images, kernel, bias) if x is not None}
    if len(dtypes) > 1 or not dtypes <= _FLOATS:
        return None
    if layer.preferred_element_type not in (None, images.dtype):
        return None
    return _images(images), kernel, bias


_FLOATS = {jnp.dtype(name) for name in ("float16", "bfloat16", "float32", "float64")}


def _by_flax(layer: nnx.Conv, inputs: jax.Array, out_sharding: Any) -> jax.Array:
    """``nnx.Conv`` itself, which takes an ``out_sharding`` in newer versions only."""
    options = {} if out_sharding is None else {"out_sharding": out_sharding}
    return nnx.Conv.__call__(layer, inputs, **options)


def _pair(value: Any) -> tuple[int, ...] | None:
    """One number for both directions, two, or None for 1; None if it is something else."""
    if value is None:
        return (1, 1)
    if isinstance(value, int):
        return (value, value)
    pair = tuple(value)
    return pair if len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) else None


_PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


def _padding(value: Any) -> Any:
    """A padding as "SAME", "VALID", "CIRCULAR", "REFLECT" or pairs of pixels; None for others."""
    if isinstance(value, str):
        if value.upper() not in _PADDINGS:
            raise ValueError(f"padding={value!r}, expected one of {', '.join(_PADDINGS)}")
        # nnx.Conv knows its own two in capitals only.
        known = value in ("CIRCULAR", "REFLECT") or value.upper() in ("SAME", "VALID")
        return value.upper() if known else None
    if isinstance(value, int):
        value = (value, value)
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    sides = tuple((n, n) if isinstance(n, int) else n for n in value)
    fit = all(isinstance(pair, tuple) and len(pair) == 2 and min(pair) >= 0 for pair in sides)
    return sides if fit else None
