"""The layer graph: an architecture as a list of plain layers, before any framework.

A model spec expands into a :class:`Graph`; the front ends walk it and make one framework layer of
each :class:`Layer`. Names are those of the original implementation (``k_block2a__0expand_conv``),
so weights move between the original's checkpoints and every front end by name.

Shapes are ``(H, W, C)`` for images and ``(C,)`` for vectors; an unknown ``H`` or ``W`` is ``None``.

Example:
    >>> conv = Conv(name="stem_conv", inputs=("input",), shape=(8, 8, 4), filters=4, in_channels=3)
    >>> conv.is_pointwise, conv.weights()
    (True, {'kernel': (1, 1, 3, 4)})
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kconv.models.activations import ActivationName

Size = int | None
Shape = tuple[Size, ...]
Padding = Literal["same", "valid"]
Borders = tuple[tuple[int, int], tuple[int, int]]
"""Zeros ((top, bottom), (left, right))."""
Initializer = Literal["glorot_uniform", "conv_normal", "dense_uniform"]
"""``conv_normal`` and ``dense_uniform`` are EfficientNet's VarianceScaling initializers:
(scale 2, fan_out, truncated normal) and (scale 1/3, fan_out, uniform)."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its name, the names of its inputs, and the shape of its output.

    One of exactly this class is something that no other class here describes.
    """

    name: str
    inputs: tuple[str, ...]
    shape: Shape

    @property
    def channels(self) -> int:
        """Channels of the output, which are known in every finished graph."""
        channels = self.shape[-1]
        assert channels is not None
        return channels

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's weights by the original's (Keras's) names, kernels as HWIO."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Input(Layer):
    """The image; ``shape`` is (H, W, channels)."""


@dataclass(frozen=True, kw_only=True)
class ZeroPad(Layer):
    """Zero padding."""

    padding: Borders


@dataclass(frozen=True, kw_only=True)
class Identity(Layer):
    """The input as it is."""


@dataclass(frozen=True, kw_only=True)
class Conv(Layer):
    """Convolution k x k with groups. ``kernel_size`` and ``strides`` are (height, width).

    ``interleave`` is the step by which the output's channels are interleaved; 1 for none.
    """

    filters: int
    in_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: Padding | Borders = "same"
    groups: int = 1
    use_bias: bool = False
    interleave: int = 1
    dilation: tuple[int, int] = (1, 1)
    initializer: Initializer = "glorot_uniform"

    @property
    def is_pointwise(self) -> bool:
        """Whether kconv's pointwise kernel computes this layer."""
        return self.kernel_size == (1, 1) and self.strides == (1, 1)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """A kernel and, where it is used, a bias."""
        kernel = (*self.kernel_size, self.in_channels // self.groups, self.filters)
        return {"kernel": kernel} | _bias(self.use_bias, self.filters)


@dataclass(frozen=True, kw_only=True)
class DepthwiseConv(Layer):
    """Depthwise convolution: each input channel gives ``depth_multiplier`` output channels."""

    in_channels: int
    kernel_size: int
    strides: int = 1
    padding: Padding = "same"
    depth_multiplier: int = 1
    use_bias: bool = False
    initializer: Initializer = "glorot_uniform"

    def weights(self) -> dict[str, tuple[int, ...]]:
        """A depthwise kernel and, where it is used, a bias."""
        k, c = self.kernel_size, self.in_channels
        kernel = (k, k, c, self.depth_multiplier)
        return {"depthwise_kernel": kernel} | _bias(self.use_bias, c * self.depth_multiplier)


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Layer):
    """Batch normalization; ``momentum`` in Keras's sense (PyTorch's is 1 - momentum)."""

    epsilon: float = 1e-3
    momentum: float = 0.99
    scale: bool = True

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Gamma (with ``scale``), beta and the moving statistics, which are not trained."""
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return {name: (self.channels,) for name in names if self.scale or name != "gamma"}


@dataclass(frozen=True, kw_only=True)
class Activation(Layer):
    """An elementwise activation (softmax: over the channels).

    ``parameters`` are those of the function, in the order of
    :attr:`~kconv.models.activations.ActivationFunction.parameters`.
    """

    kind: ActivationName
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Interleave(Layer):
    """Interleave of the channels by ``step`` (see kconv.ktypes)."""

    step: int


@dataclass(frozen=True, kw_only=True)
class CopyChannels(Layer):
    """Channels ``start`` to ``start + count - 1``."""

    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class FoldHalves(Layer):
    """First half of the channels plus the second half (an odd last channel is dropped)."""


@dataclass(frozen=True, kw_only=True)
class Concat(Layer):
    """Concatenation over the channels."""


@dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """Elementwise sum."""


@dataclass(frozen=True, kw_only=True)
class Multiply(Layer):
    """Elementwise product; a (1, 1, C) input broadcasts over the pixels."""


@dataclass(frozen=True, kw_only=True)
class Pool(Layer):
    """Maximum or average pooling (averages do not count padded pixels)."""

    kind: Literal["max", "avg"]
    pool_size: int
    strides: int
    padding: Padding = "valid"


@dataclass(frozen=True, kw_only=True)
class WindowPool(Layer):
    """Maximum or average pooling with any window; pairs are (height, width).

    ``ceil_mode`` keeps a last window that is not whole if it begins inside the borders before and
    the image. With ``count_include_pad``, averages count the zeros of the borders.
    """

    kind: Literal["max", "avg"]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: Borders = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True

    def size(self, image: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the result of an image of a size."""
        height, width = (self._length(image[axis], axis) for axis in (0, 1))
        return height, width

    def _length(self, n: int, axis: int) -> int:
        before, after = self.padding[axis]
        stride = self.strides[axis]
        rest = n + before + after - (self.kernel_size[axis] - 1) * self.dilation[axis] - 1
        if not self.ceil_mode:
            return rest // stride + 1
        length = -(-rest // stride) + 1
        return length - ((length - 1) * stride >= n + before)


@dataclass(frozen=True, kw_only=True)
class ChannelScale(Layer):
    """Each channel times a weight: LayerScale."""

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The factors."""
        return {"scale": (self.channels,)}


@dataclass(frozen=True, kw_only=True)
class PReLU(Layer):
    """``x``, below 0 times a weight of the channel."""

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The derivatives below 0."""
        return {"alpha": (self.channels,)}


@dataclass(frozen=True, kw_only=True)
class GlobalPool(Layer):
    """Mean (or maximum) over the pixels: (H, W, C) to (C,), or (1, 1, C) with ``keepdims``."""

    kind: Literal["avg", "max"] = "avg"
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class Reshape(Layer):
    """(C,) to (1, 1, C)."""


@dataclass(frozen=True, kw_only=True)
class Flatten(Layer):
    """(1, 1, C) to (C,)."""


@dataclass(frozen=True, kw_only=True)
class Dropout(Layer):
    """Dropout of elements or, with ``per_sample``, of a sample's whole branch (drop-connect)."""

    rate: float
    per_sample: bool = False


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """Fully connected layer with bias."""

    units: int
    in_features: int
    activation: Literal["softmax"] | None = None
    initializer: Initializer = "glorot_uniform"

    def weights(self) -> dict[str, tuple[int, ...]]:
        """A kernel and a bias."""
        return {"kernel": (self.in_features, self.units), "bias": (self.units,)}


@dataclass(frozen=True)
class Graph:
    """Layers in topological order; the first is the :class:`Input`, ``output`` names the last."""

    name: str
    layers: tuple[Layer, ...]
    output: str

    @property
    def input_shape(self) -> Shape:
        """(H, W, channels) of the image."""
        return self.layers[0].shape

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


def _bias(use_bias: bool, filters: int) -> dict[str, tuple[int, ...]]:
    return {"bias": (filters,)} if use_bias else {}
