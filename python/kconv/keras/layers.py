"""Keras 3 layers on kconv's kernels, drop-in for Keras's own.

The convolutions *are* Keras's convolutions, with another computation: same arguments, same weights
(names, shapes and order), same configuration. So weights move between both by ``set_weights``.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kconv._geometry import interleave_order
from kconv.keras._native import LAYOUTS, SUPPORTS_JIT, is_dense, native

__all__ = [
    "CopyChannels",
    "DepthwiseConv2D",
    "InterleaveChannels",
    "PointwiseConv2D",
    "SumIntoHalfChannels",
]

Tensor = Any
Shape = tuple[int | None, ...]

_serializable = keras.saving.register_keras_serializable(package="kconv")


FLOATS = ("float32", "float64", "bfloat16", "float16")


@_serializable
class PointwiseConv2D(keras.layers.Conv2D):
    """1x1 convolution in groups, its output channels interleaved in the same pass (V1).

    What the kernels do not compute, such as a dilation, and complex or whole numbers, Keras's own
    operator does; so the layer always gives what ``keras.layers.Conv2D`` gives, interleaved.

    Example:
        >>> layer = PointwiseConv2D(24, groups=4, interleave=6)
        >>> layer(keras.ops.ones((2, 8, 8, 16))).shape, [w.shape for w in layer.weights]
        ((2, 8, 8, 24), [(1, 1, 4, 24), (24,)])

    Args:
        filters: channels of the output.
        groups: number of groups; divides the channels of input and output.
        interleave: step of the interleave that follows the convolution; 1 keeps the order.
        **kwargs: the other arguments of ``keras.layers.Conv2D``: strides, use_bias, ...

    Input: (N, H, W, C_in), or (N, C_in, H, W) with ``data_format="channels_first"``.
    Output: the same with ``filters`` channels and 1/strides of the pixels a side, rounded up.
    Weights: ``kernel`` (1, 1, C_in/groups, filters) and ``bias`` (filters,), as in Keras.

    Raises:
        ValueError: if the groups do not divide the channels, or a size is below 1.
    """

    def __init__(self, filters: int, groups: int = 1, interleave: int = 1, **kwargs: Any) -> None:
        super().__init__(filters, kernel_size=1, groups=groups, **kwargs)
        if interleave < 1:
            raise ValueError(f"interleave={interleave} must be at least 1")
        self.interleave = interleave
        self.supports_jit = SUPPORTS_JIT

    def call(self, inputs: Tensor) -> Tensor:
        """Convolve; see the class for the shapes."""
        if self._has_kernel(inputs):
            outputs = native.pointwise_conv(
                self._subsampled(inputs),
                ops.convert_to_tensor(self.kernel),
                ops.convert_to_tensor(self.bias) if self.use_bias else None,
                groups=inputs.shape[self._channel_axis] // self.kernel.shape[2],
                interleave=self.interleave,
                layout=LAYOUTS[self.data_format],
                weight_layout="IO",
            )
        elif self.interleave == 1:
            return super().call(inputs)
        else:
            outputs = self.convolution_op(inputs, self.kernel)
            if self.use_bias:
                shape = [-1 if axis == self._channel_axis else 1 for axis in range(4)]
                outputs = ops.add(outputs, ops.reshape(self.bias, shape))
            outputs = _interleaved(outputs, self.interleave, self._channel_axis)
        return outputs if self.activation is None else self.activation(outputs)

    @property
    def _channel_axis(self) -> int:
        return 3 if self.data_format == "channels_last" else 1

    def _has_kernel(self, inputs: Tensor) -> bool:
        own_operator = self.convolution_op.__func__ is not keras.layers.Conv2D.convolution_op
        channels = inputs.shape[self._channel_axis]
        return (
            _takes(self, inputs)
            and not own_operator  # Keras's hook for a convolution of one's own
            and tuple(self.kernel.shape[:2]) == (1, 1)
            and _is_pair(self.strides)
            and channels is not None
            and channels % self.kernel.shape[2] == 0
        )

    def _subsampled(self, inputs: Tensor) -> Tensor:
        """The pixels that a strided convolution reads, at any padding."""
        height, width = self.strides
        if height == width == 1:
            return inputs
        rows, columns = slice(None, None, height), slice(None, None, width)
        if self.data_format == "channels_last":
            return inputs[:, rows, columns]
        return inputs[:, :, rows, columns]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        config = super().get_config()
        del config["kernel_size"]
        return {**config, "interleave": self.interleave}


@_serializable
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Depthwise convolution; takes the arguments of ``keras.layers.DepthwiseConv2D``.

    Square kernels of 3, 5 or 7 at stride 1 or 2 run on kconv's kernels; whatever else Keras's layer
    can do (a depth multiplier, dilation, ...) it does here too.

    Example:
        >>> layer = DepthwiseConv2D(3, strides=2, padding="same")
        >>> layer(keras.ops.ones((2, 9, 9, 16))).shape, [w.shape for w in layer.weights]
        ((2, 5, 5, 16), [(3, 3, 16, 1), (16,)])

    Input: (N, H, W, C), or (N, C, H, W) with ``data_format="channels_first"``.
    Output: (N, H_out, W_out, C * depth_multiplier), or (N, C * depth_multiplier, H_out, W_out).
    Weights: ``kernel`` (k, k, C, depth_multiplier) and ``bias``, as in Keras.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_jit = SUPPORTS_JIT

    def call(self, inputs: Tensor) -> Tensor:
        """Convolve; see the class for the shapes."""
        if not self._has_kernel(inputs):
            return super().call(inputs)
        outputs = native.depthwise_conv(
            inputs,
            ops.convert_to_tensor(self.kernel),
            ops.convert_to_tensor(self.bias) if self.use_bias else None,
            stride=self.strides[0],
            padding=self.padding,
            layout=LAYOUTS[self.data_format],
            weight_layout="IO",
        )
        return outputs if self.activation is None else self.activation(outputs)

    def _has_kernel(self, inputs: Tensor) -> bool:
        height, width, _, multiplier = self.kernel.shape
        return (
            _takes(self, inputs)
            and height == width
            and height in (3, 5, 7)
            and multiplier == 1
            and _is_pair(self.strides)
            and set(self.strides) in ({1}, {2})
        )


def _takes(layer: Any, inputs: Tensor) -> bool:
    """Whether the kernels take these images and a convolution's weights, as it is set up now."""
    if not is_dense(inputs):
        return False
    dtype = keras.backend.standardize_dtype(inputs.dtype)
    return (
        len(inputs.shape) == 4
        and dtype in FLOATS
        and keras.backend.standardize_dtype(layer.kernel.dtype) == dtype
        and layer.padding in ("valid", "same")
        and layer.data_format in LAYOUTS
        and layer.dilation_rate in (1, (1, 1), [1, 1])
    )


def _is_pair(strides: Any) -> bool:
    return isinstance(strides, tuple | list) and len(strides) == 2 and min(strides) >= 1


def _interleaved(x: Tensor, step: int, axis: int) -> Tensor:
    """Channels s, s + step, ... for s = 0 .. step - 1 in turn, of any dtype."""
    if keras.backend.standardize_dtype(x.dtype) in FLOATS:
        return native.interleave(x, step, layout="NHWC" if axis == 3 else "NCHW")
    return ops.take(x, interleave_order(x.shape[axis], step), axis=axis)


class _ChannelLayer(keras.layers.Layer):
    """A layer without weights that rearranges channels.

    Args:
        data_format: "channels_last" or "channels_first"; None means Keras's setting.
        **kwargs: the arguments of every Keras layer.
    """

    def __init__(self, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_format = data_format or keras.config.image_data_format()
        if self.data_format not in LAYOUTS:
            known = " or ".join(map(repr, LAYOUTS))
            raise ValueError(f"data_format={data_format!r}, expected {known}")
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_jit = SUPPORTS_JIT

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 3 if self.data_format == "channels_last" else 1

    def _channels(self, inputs: Tensor, start: int, count: int) -> Tensor:
        """Channels ``start`` to ``start + count - 1``."""
        return inputs[(slice(None),) * self.axis + (slice(start, start + count),)]

    def _with_channels(self, shape: Shape, channels: int | None) -> Shape:
        return (*shape[: self.axis], channels, *shape[self.axis + 1 :])

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "data_format": self.data_format}


@_serializable
class InterleaveChannels(_ChannelLayer):
    """Channels s, s + step_size, s + 2 step_size, ... for s = 0 .. step_size - 1 in turn (V1).

    Example:
        >>> layer = InterleaveChannels(2)
        >>> ops.ravel(layer(ops.reshape(ops.arange(5.0), (1, 1, 1, 5)))).tolist()
        [0.0, 2.0, 4.0, 1.0, 3.0]

    Args:
        step_size: distance of the channels that become neighbours; below 2 nothing changes.
        **kwargs: ``data_format`` ("channels_last" or "channels_first"; None means Keras's
            setting) and the arguments of every Keras layer.

    Input and output: (N, H, W, C), or (N, C, H, W).
    """

    def __init__(self, step_size: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step_size = step_size

    def call(self, inputs: Tensor) -> Tensor:
        """Permute the channels."""
        return inputs if self.step_size < 2 else _interleaved(inputs, self.step_size, self.axis)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "step_size": self.step_size}


@_serializable
class CopyChannels(_ChannelLayer):
    """The channels ``channel_start`` to ``channel_start + channel_count - 1``.

    Example:
        >>> CopyChannels(2, 3)(keras.ops.ones((1, 4, 4, 8))).shape
        (1, 4, 4, 3)

    Args:
        channel_start: the first channel.
        channel_count: how many.
        **kwargs: as for :class:`InterleaveChannels`.

    Input: (N, H, W, C), or (N, C, H, W). Output: the same with ``channel_count`` channels.
    """

    def __init__(self, channel_start: int = 0, channel_count: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channel_start = channel_start
        self.channel_count = channel_count

    def _check(self, channels: int | None) -> None:
        stop = self.channel_start + self.channel_count
        if self.channel_start < 0 or self.channel_count < 1 or stop > (channels or stop):
            raise ValueError(
                f"channel_start={self.channel_start} and channel_count={self.channel_count} "
                f"do not lie in the input's {channels} channels"
            )

    def build(self, input_shape: Shape) -> None:
        """Check that there are such channels."""
        self._check(input_shape[self.axis])

    def call(self, inputs: Tensor) -> Tensor:
        """Take the channels."""
        self._check(inputs.shape[self.axis])
        return self._channels(inputs, self.channel_start, self.channel_count)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's with ``channel_count`` channels."""
        self._check(input_shape[self.axis])
        return self._with_channels(input_shape, self.channel_count)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        config = {"channel_start": self.channel_start, "channel_count": self.channel_count}
        return {**super().get_config(), **config}


@_serializable
class SumIntoHalfChannels(_ChannelLayer):
    """The first half of the channels plus the second; an odd last channel is dropped.

    Example:
        >>> layer = SumIntoHalfChannels()
        >>> ops.ravel(layer(ops.reshape(ops.arange(4.0), (1, 1, 1, 4)))).tolist()
        [2.0, 4.0]

    Args:
        **kwargs: as for :class:`InterleaveChannels`.

    Input: (N, H, W, C), or (N, C, H, W). Output: the same with C // 2 channels.
    """

    def call(self, inputs: Tensor) -> Tensor:
        """Add the halves."""
        half = ops.shape(inputs)[self.axis] // 2
        return self._channels(inputs, 0, half) + self._channels(inputs, half, half)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's with half the channels."""
        channels = input_shape[self.axis]
        return self._with_channels(input_shape, None if channels is None else channels // 2)
