"""Building a layer graph one call at a time, with shapes inferred and checked.

Example:
    >>> g = GraphBuilder("tiny", (8, 8, 3))
    >>> x = g.conv("stem_conv", g.input, filters=4, kernel_size=3, strides=2)
    >>> x = g.activation("stem", x, "swish")
    >>> g.shape(x)
    (4, 4, 4)
    >>> [layer.name for layer in g.build(x).layers]
    ['input', 'stem_conv', 'stem']
"""

from __future__ import annotations

from typing import Literal

from kconv import ktypes
from kconv.models.activations import ActivationName
from kconv.models.graph import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    CopyChannels,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    FoldHalves,
    GlobalPool,
    Graph,
    Initializer,
    Input,
    Interleave,
    Layer,
    Multiply,
    Padding,
    Pool,
    Reshape,
    Shape,
    Size,
    ZeroPad,
)


class GraphBuilder:
    """Collects the layers of a graph; each method adds one (or a few) and returns its name.

    A ``name`` of None stands for Keras's own: the layer's type in snake case, numbered in the
    order of creation ("conv2d", "conv2d_1", ...).

    Args:
        name: the model's name.
        input_shape: (H, W, channels) of the image; H and W may be None.
    """

    input = "input"

    def __init__(self, name: str, input_shape: Shape) -> None:
        self._name = name
        self._layers: dict[str, Layer] = {}
        self._counters: dict[str, int] = {}
        self._append(Input(name=self.input, inputs=(), shape=input_shape))

    def shape(self, x: str) -> Shape:
        """Shape of a layer's output."""
        return self._layers[x].shape

    def channels(self, x: str) -> int:
        """Channels of a layer's output."""
        return self._layers[x].channels

    def build(self, output: str) -> Graph:
        """The graph of all layers added so far, ending in ``output``."""
        return Graph(self._name, tuple(self._layers.values()), output)

    # Layers with parameters.

    def conv(
        self,
        name: str | None,
        x: str,
        filters: int,
        kernel_size: int | tuple[int, int] = 1,
        strides: int = 1,
        *,
        padding: Padding = "same",
        groups: int = 1,
        use_bias: bool = False,
        initializer: Initializer = "glorot_uniform",
        activation: ActivationName | None = None,
    ) -> str:
        """A convolution; an ``activation`` makes a layer ``<name>_activation`` of its own."""
        name = name or self._auto_name("conv2d")
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        in_channels = self.channels(x)
        if filters < 1:
            raise ValueError(f"layer {name!r}: filters={filters}, a convolution needs at least 1")
        if in_channels % groups or filters % groups:
            raise ValueError(
                f"layer {name!r}: {in_channels} to {filters} channels are not divisible "
                f"by groups={groups}"
            )
        conv = self._append(
            Conv(
                name=name,
                inputs=(x,),
                shape=(*self._window(name, x, kernel, strides, padding), filters),
                filters=filters,
                in_channels=in_channels,
                kernel_size=kernel,
                strides=(strides, strides),
                padding=padding,
                groups=groups,
                use_bias=use_bias,
                initializer=initializer,
            )
        )
        return self.activation(f"{name}_activation", conv, activation) if activation else conv

    def depthwise_conv(
        self,
        name: str,
        x: str,
        kernel_size: int,
        strides: int = 1,
        *,
        padding: Padding = "same",
        depth_multiplier: int = 1,
        initializer: Initializer = "glorot_uniform",
    ) -> str:
        """A depthwise convolution without bias."""
        channels = self.channels(x)
        if depth_multiplier < 1:
            raise ValueError(f"layer {name!r}: depth_multiplier={depth_multiplier} is below 1")
        window = self._window(name, x, (kernel_size, kernel_size), strides, padding)
        return self._append(
            DepthwiseConv(
                name=name,
                inputs=(x,),
                shape=(*window, channels * depth_multiplier),
                in_channels=channels,
                kernel_size=kernel_size,
                strides=strides,
                padding=padding,
                depth_multiplier=depth_multiplier,
                initializer=initializer,
            )
        )

    def batch_norm(
        self,
        name: str | None,
        x: str,
        *,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        scale: bool = True,
    ) -> str:
        """Batch normalization."""
        return self._append(
            BatchNorm(
                name=name or self._auto_name("batch_normalization"),
                inputs=(x,),
                shape=self.shape(x),
                epsilon=epsilon,
                momentum=momentum,
                scale=scale,
            )
        )

    def dense(
        self, name: str, x: str, units: int, *, initializer: Initializer = "glorot_uniform"
    ) -> str:
        """A fully connected layer with softmax."""
        (features,) = self.shape(x)
        assert features is not None
        return self._append(
            Dense(
                name=name,
                inputs=(x,),
                shape=(units,),
                units=units,
                in_features=features,
                activation="softmax",
                initializer=initializer,
            )
        )

    def pointwise(
        self,
        name: str,
        x: str,
        filters: int,
        ktype: ktypes.KType | str | int,
        *,
        activation: ActivationName | None,
        batch_norm: bool = True,
        scale: bool = True,
        use_bias: bool = False,
    ) -> str:
        """The block that a kType puts in the place of a pointwise convolution.

        Args:
            name: the name with which those of the block's layers begin.
            x: the input.
            filters: output channels.
            ktype: a kType, its name or its number.
            activation: what follows each unit's batch norm, None for nothing.
            batch_norm: whether the units have one.
            scale: whether the batch norms have a gamma.
            use_bias: whether the convolutions have a bias.

        Returns:
            The name of the block's output.
        """
        plan = ktypes.plan(ktype, self.channels(x), filters, name)

        def unit(step: ktypes.Unit, source: str) -> str:
            y = self.conv(
                step.conv_name,
                source,
                step.channels,
                groups=step.groups,
                padding=step.padding,
                use_bias=use_bias,
            )
            if batch_norm:
                y = self.batch_norm(step.bn_name, y, scale=scale)
            return self.activation(step.activation_name, y, activation) if activation else y

        def apply(step: ktypes.Step, inputs: list[str]) -> str:
            name = None if step.auto else step.name
            match step:
                case ktypes.Unit():
                    return unit(step, inputs[0])
                case ktypes.Interleave():
                    return self.interleave(name, inputs[0], step.step)
                case ktypes.CopyChannels():
                    return self.copy_channels(name, inputs[0], step.start, step.channels)
                case ktypes.FoldHalves():
                    return self.fold_halves(name, inputs[0])
                case ktypes.Concat():
                    return self.concat(name, inputs)
                case ktypes.Add():
                    return self.add(name, inputs)
            raise TypeError(f"step {step.name!r}: a {type(step).__name__} has no layer")

        return plan.walk(x, apply)

    # Channels.

    def interleave(self, name: str | None, x: str, step: int) -> str:
        """The channels s, s + step, s + 2 * step, ... for s = 0 to step - 1."""
        name = name or self._auto_name("interleave_channels")
        return self._append(Interleave(name=name, inputs=(x,), shape=self.shape(x), step=step))

    def copy_channels(self, name: str | None, x: str, start: int, count: int) -> str:
        """``count`` channels from ``start`` on."""
        name = name or self._auto_name("copy_channels")
        shape = (*self.shape(x)[:-1], count)
        return self._append(
            CopyChannels(name=name, inputs=(x,), shape=shape, start=start, count=count)
        )

    def fold_halves(self, name: str | None, x: str) -> str:
        """First half of the channels plus the second half."""
        name = name or self._auto_name("sum_into_half_channels")
        shape = (*self.shape(x)[:-1], self.channels(x) // 2)
        return self._append(FoldHalves(name=name, inputs=(x,), shape=shape))

    def concat(self, name: str | None, xs: list[str]) -> str:
        """Concatenation over the channels."""
        name = name or self._auto_name("concatenate")
        shape = (*self.shape(xs[0])[:-1], sum(map(self.channels, xs)))
        return self._append(Concat(name=name, inputs=tuple(xs), shape=shape))

    # Elementwise.

    def activation(self, name: str | None, x: str, kind: ActivationName) -> str:
        """An activation."""
        name = name or self._auto_name("activation")
        return self._append(Activation(name=name, inputs=(x,), shape=self.shape(x), kind=kind))

    def add(self, name: str | None, xs: list[str]) -> str:
        """Elementwise sum."""
        name = name or self._auto_name("add")
        return self._append(Add(name=name, inputs=tuple(xs), shape=self.shape(xs[0])))

    def multiply(self, name: str, x: str, gate: str) -> str:
        """Elementwise product; ``gate`` may be (1, 1, C)."""
        return self._append(Multiply(name=name, inputs=(x, gate), shape=self.shape(x)))

    def dropout(self, name: str | None, x: str, rate: float, *, per_sample: bool = False) -> str:
        """Dropout, or drop-connect with ``per_sample``."""
        name = name or self._auto_name("dropout")
        if not 0 <= rate < 1:
            raise ValueError(f"layer {name!r}: rate={rate:.3g} is not from 0 to below 1")
        return self._append(
            Dropout(name=name, inputs=(x,), shape=self.shape(x), rate=rate, per_sample=per_sample)
        )

    # Pixels.

    def zero_pad(self, name: str, x: str, kernel_size: int) -> str:
        """The padding before a "valid" strided convolution of this (odd) kernel size.

        (k//2 - 1 + size mod 2, k//2) at each side, where an unknown size counts as even: with
        stride 2 an even size halves.
        """
        height, width, channels = self.shape(x)
        k = kernel_size // 2
        top, left = (k - 1 + (size or 0) % 2 for size in (height, width))
        shape = (_grown(height, top + k), _grown(width, left + k), channels)
        padding = ((top, k), (left, k))
        return self._append(ZeroPad(name=name, inputs=(x,), shape=shape, padding=padding))

    def pool(
        self,
        name: str | None,
        x: str,
        kind: Literal["max", "avg"],
        pool_size: int,
        strides: int,
        padding: Padding = "valid",
    ) -> str:
        """Maximum or average pooling."""
        name = name or self._auto_name(f"{_POOLING[kind]}_pooling2d")
        window = self._window(name, x, (pool_size, pool_size), strides, padding)
        return self._append(
            Pool(
                name=name,
                inputs=(x,),
                shape=(*window, self.channels(x)),
                kind=kind,
                pool_size=pool_size,
                strides=strides,
                padding=padding,
            )
        )

    def global_pool(self, name: str | None, x: str, kind: Literal["max", "avg"] = "avg") -> str:
        """(H, W, C) to (C,)."""
        name = name or self._auto_name(f"global_{_POOLING[kind]}_pooling2d")
        return self._append(
            GlobalPool(name=name, inputs=(x,), shape=(self.channels(x),), kind=kind)
        )

    def reshape(self, name: str | None, x: str) -> str:
        """(C,) to (1, 1, C)."""
        name = name or self._auto_name("reshape")
        return self._append(Reshape(name=name, inputs=(x,), shape=(1, 1, self.channels(x))))

    def flatten(self, name: str | None, x: str) -> str:
        """(1, 1, C) to (C,)."""
        name = name or self._auto_name("flatten")
        return self._append(Flatten(name=name, inputs=(x,), shape=(self.channels(x),)))

    def _auto_name(self, kind: str) -> str:
        number = self._counters[kind] = self._counters.get(kind, -1) + 1
        return f"{kind}_{number}" if number else kind

    def _append(self, layer: Layer) -> str:
        if layer.name in self._layers:
            raise ValueError(f"there are two layers {layer.name!r} in {self._name!r}")
        self._layers[layer.name] = layer
        return layer.name

    def _window(
        self, name: str, x: str, kernel: tuple[int, int], stride: int, padding: Padding
    ) -> tuple[Size, Size]:
        """Height and width after a sliding window."""
        height, width, _ = self.shape(x)

        def slide(size: Size, k: int) -> Size:
            if size is None:
                return None
            if padding == "same":
                return -(-size // stride)
            if size < k:
                raise ValueError(
                    f"layer {name!r}: its {kernel[0]}x{kernel[1]} window does not fit into "
                    f"{height}x{width} pixels; the image is too small for this network"
                )
            return (size - k) // stride + 1

        return slide(height, kernel[0]), slide(width, kernel[1])


def round_filters(filters: float, divisor: int = 8) -> int:
    """The nearest multiple of a divisor, not zero, that is not below 90 % of ``filters``.

    Example:
        >>> round_filters(16.4), round_filters(11), round_filters(11, divisor=4)
        (16, 16, 12)
    """
    rounded = max(divisor, int(filters + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * filters else rounded


_POOLING = {"max": "max", "avg": "average"}


def _grown(size: Size, by: int) -> Size:
    return None if size is None else size + by
