"""kconv as layers of Flax (``flax.nnx``), channels last.

The convolutions *are* ``nnx.Conv``, with another computation: the same parameters, of the same
names, shapes and initial values.

Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kconv.jax.nnx import DepthwiseConv, PointwiseConv
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...     PointwiseConv(64, 96, groups=4, interleave=24, rngs=rngs),
    ...     DepthwiseConv(96, 3, strides=2, rngs=rngs),
    ... )
    >>> model(jnp.ones((8, 32, 32, 64))).shape
    (8, 16, 16, 96)
"""

from __future__ import annotations

from typing import Any

import flax
import jax
from flax import nnx

from kconv._versions import warn_of_version
from kconv.jax import ops

__all__ = ["DepthwiseConv", "InterleaveChannels", "PointwiseConv"]

warn_of_version("flax", flax.__version__)


class PointwiseConv(nnx.Conv):
    """1x1 convolution in groups, its output channels interleaved in the same pass (V1).

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
        **options: the other arguments of ``nnx.Conv``: use_bias, dtype, kernel_init, ...

    Input: (..., H, W, C_in). Output: (..., H, W, C_out).

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
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if groups < 1 or features % groups:
                raise ValueError(f"{name}={features} is not divisible by groups={groups}")
        if interleave < 1:
            raise ValueError(f"interleave={interleave} must be at least 1")
        options["feature_group_count"] = groups
        super().__init__(in_features, out_features, (1, 1), rngs=rngs, **options)
        self.interleave = interleave

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolve; see the class for the shapes."""
        x, kernel, bias = _promoted(self, inputs)
        y = ops.pointwise_conv(
            x.reshape(-1, *x.shape[-3:]),
            kernel,
            bias,
            groups=self.feature_group_count,
            interleave=self.interleave,
            layout="NHWC",
            weight_layout="IO",
        )
        return y.reshape(*x.shape[:-3], *y.shape[1:])


class DepthwiseConv(nnx.Conv):
    """Depthwise convolution: every channel with its own k x k kernel.

    Example:
        >>> layer = DepthwiseConv(16, 3, strides=2, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 9, 9, 16))).shape, layer.kernel.shape
        ((2, 5, 5, 16), (3, 3, 1, 16))

    Args:
        features: C, of input and output.
        kernel_size: k: 3, 5 or 7.
        strides: 1 or 2.
        padding: "SAME" (TensorFlow's, asymmetric at stride 2), "VALID", the pixels added on every
            side, or ((top, bottom), (left, right)).
        rngs: the keys for the initial values.
        **options: the other arguments of ``nnx.Conv``: use_bias, dtype, kernel_init, ...

    Input: (..., H, W, C). Output: (..., H_out, W_out, C).

    Raises:
        ValueError: if the kernels do not compute such a convolution.
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        strides: int = 1,
        padding: ops.Padding = "same",
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if kernel_size not in (3, 5, 7):
            raise ValueError(f"kernel_size={kernel_size}, expected 3, 5 or 7")
        if strides not in (1, 2):
            raise ValueError(f"strides={strides}, expected 1 or 2")
        options["feature_group_count"] = features
        size = (kernel_size, kernel_size)
        super().__init__(features, features, size, strides, padding=padding, rngs=rngs, **options)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolve; see the class for the shapes."""
        x, kernel, bias = _promoted(self, inputs)
        padding: Any = self.padding.lower() if isinstance(self.padding, str) else self.padding
        y = ops.depthwise_conv(
            x.reshape(-1, *x.shape[-3:]),
            kernel[:, :, 0],
            bias,
            stride=self.strides,
            padding=padding,
            layout="NHWC",
            weight_layout="IO",
        )
        return y.reshape(*x.shape[:-3], *y.shape[1:])


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
        images = inputs.reshape(-1, *inputs.shape[-3:])
        return ops.interleave(images, self.step, layout="NHWC").reshape(inputs.shape)


def _promoted(layer: nnx.Conv, inputs: jax.Array) -> Any:
    """The input, the kernel and the bias in the dtype that the layer computes in."""
    bias = None if layer.bias is None else layer.bias[...]
    return layer.promote_dtype((inputs, layer.kernel[...], bias), dtype=layer.dtype)
