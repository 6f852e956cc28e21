"""Blocks of layers as one Keras layer, which runs as one operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras

from kconv import ktypes
from kconv.keras._lift import ACTIVATION_NAMES
from kconv.keras._model import model_of
from kconv.keras._native import LAYOUTS
from kconv.models import graph
from kconv.models.activations import ActivationName
from kconv.models.blocks import conv_unit_graph, mbconv_graph

__all__ = ["Block", "ConvUnit", "MBConv"]

Tensor = Any
Shape = tuple[int | None, ...]
Activation = str | Callable[[Tensor], Tensor] | None


class Block(keras.layers.Layer):
    """A layer of layers, which are made when the input's channels are known.

    Attributes:
        network: the model that is inside; only after the first call.
    """

    def __init__(
        self, options: dict[str, Any], data_format: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._options = options
        self.data_format = data_format or keras.config.image_data_format()
        if self.data_format not in LAYOUTS:
            known = " or ".join(map(repr, LAYOUTS))
            raise ValueError(f"data_format={data_format!r}, expected {known}")
        self._axis = 3 if self.data_format == "channels_last" else 1

    _graph: Callable[..., graph.Graph]
    """The layers, from the input's channels and the options."""

    def _graph_of(self, input_shape: Shape) -> graph.Graph:
        if len(input_shape) != 4:
            raise ValueError(f"{self.name}: input of shape {input_shape}, expected 4 axes")
        channels = input_shape[self._axis]
        if channels is None:
            raise ValueError(f"{self.name}: the input's channels are unknown, in {input_shape}")
        options = {name: value for name, value in self._options.items() if name != "fused"}
        return replace(self._graph(channels, **options), name=self.name)

    def build(self, input_shape: Shape) -> None:
        """Make the layers for (N, H, W, C), or (N, C, H, W) with "channels_first"."""
        layers = self._graph_of(input_shape)
        before = keras.config.dtype_policy(), keras.config.image_data_format()
        keras.config.set_dtype_policy(self.dtype_policy)
        keras.config.set_image_data_format(self.data_format)
        try:
            self.network = model_of(layers, fused=self._options["fused"])
        finally:
            keras.config.set_dtype_policy(before[0])
            keras.config.set_image_data_format(before[1])
        if not self.trainable:
            self.network.trainable = False

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Run the layers; see the class for the shapes."""
        return self.network(inputs, training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the output for that of the input, also before the layers are made."""
        shape = list(input_shape)
        shape[self._axis] = self._graph_of(input_shape).layers[-1].channels
        pixels = [axis for axis in (1, 2, 3) if axis != self._axis]
        for axis in pixels:
            size = shape[axis]
            shape[axis] = None if size is None else -(-size // self._options["strides"])
        return tuple(shape)

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self._options.items() if name != "fused"]
        return f"<{', '.join([f'{type(self).__name__} name={self.name}', *shown])}>"

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), **self._options, "data_format": self.data_format}


@keras.saving.register_keras_serializable(package="kconv")
class ConvUnit(Block):
    """Convolution, batch norm and activation as one operation, with what often follows.

    After the activation the channels are interleaved, and the input is added, if so asked. Two
    grouped units, the first with ``interleave``, the second with ``residual``, are the papers'
    block where channels stay as many (section 3 of V1, MENDEL 28(1), 2022).

    Example:
        >>> unit = ConvUnit(48, groups=4, interleave=12, activation="swish")
        >>> unit(keras.ops.ones((2, 7, 5, 32))).shape, unit.count_params()
        ((2, 7, 5, 48), 576)
        >>> ConvUnit(48, kernel_size=3, strides=2, groups=48)(keras.ops.ones((2, 7, 5, 48))).shape
        (2, 4, 3, 48)

    Args:
        filters: channels of the output.
        kernel_size: height and width of the kernel.
        strides: in both directions; padding is "same".
        groups: divides the channels of input and output; as many as the input's channels make a
            depthwise convolution.
        activation: "swish" or another of ``kconv.models.FUSED_ACTIVATIONS``, or Keras's own
            function of these; None for none.
        interleave: step of the interleave after the activation; 1 for none.
        residual: whether the input is added at the end.
        epsilon: of the batch norm.
        momentum: of the batch norm.
        fused: whether the layers run as one operation (see :class:`kconv.keras.Network`).
        **kwargs: ``data_format`` ("channels_last" or "channels_first"; None means Keras's
            setting) and the arguments of ``keras.layers.Layer``.

    Input: (N, H, W, C_in), or (N, C_in, H, W) with ``data_format="channels_first"``.
    Output: the same with ``filters`` channels and 1/strides of the pixels a side, rounded up.

    Raises:
        ValueError: if the activation is unknown; when the layer is first called, if a size is below
            1, groups do not divide the channels, or a residual unit changes the shape.
        TypeError: if a size is not a whole number, when the layer is first called.
    """

    _graph = staticmethod(conv_unit_graph)

    def __init__(
        self,
        filters: int,
        kernel_size: int = 1,
        strides: int = 1,
        groups: int = 1,
        *,
        activation: Activation = "swish",
        interleave: int = 1,
        residual: bool = False,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        fused: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {
            "filters": filters,
            "kernel_size": kernel_size,
            "strides": strides,
            "groups": groups,
            "activation": _activation_name(activation),
            "interleave": interleave,
            "residual": residual,
            "epsilon": epsilon,
            "momentum": momentum,
            "fused": fused,
        }
        super().__init__(options, **kwargs)


@keras.saving.register_keras_serializable(package="kconv")
class MBConv(Block):
    """EfficientNet's block (Tan and Le, 2019) as one operation, with grouped convolutions.

    Expanding convolution, depthwise convolution, squeeze and excite, projecting convolution; where
    the shape stays, drop-connect and the sum with the input. The kType tells what stands for the
    pointwise convolutions (section 3 of V1, MENDEL 28(1), 2022, and of V2, Entropy 24(9):1264,
    2022).

    Example:
        >>> block = MBConv(24, kernel_size=5, strides=2, ktype="D6_16ch")
        >>> block(keras.ops.ones((2, 9, 7, 16))).shape
        (2, 5, 4, 24)

    Args:
        filters: channels of the output.
        kernel_size: of the depthwise convolution.
        strides: of the depthwise convolution.
        expand_ratio: inner channels for each of the input's; 1 for no expansion.
        se_ratio: channels of squeeze and excite for each of the input's; 0 for none.
        ktype: a kType, its name or its number; None for ordinary pointwise convolutions.
        activation: as that of :class:`ConvUnit`; the projecting convolution has none.
        drop_connect: rate at which an image's residual branch is dropped in training.
        fused: whether the layers run as one operation (see :class:`kconv.keras.Network`).
        **kwargs: ``data_format`` ("channels_last" or "channels_first"; None means Keras's
            setting) and the arguments of ``keras.layers.Layer``.

    Input: (N, H, W, C_in), or (N, C_in, H, W) with ``data_format="channels_first"``.
    Output: the same with ``filters`` channels and 1/strides of the pixels a side, rounded up.

    Raises:
        ValueError: if the kType or the activation is unknown; when the layer is first called, if a
            size is below 1, or a rate not from 0 to below 1.
        TypeError: if a size is not a whole number or a ratio not a number, when the layer is first
            called.
    """

    _graph = staticmethod(mbconv_graph)

    def __init__(
        self,
        filters: int,
        kernel_size: int = 3,
        strides: int = 1,
        expand_ratio: float = 6,
        se_ratio: float = 0.25,
        ktype: ktypes.KType | str | int | None = "D6_16ch",
        *,
        activation: Activation = "swish",
        drop_connect: float = 0.0,
        fused: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {
            "filters": filters,
            "kernel_size": kernel_size,
            "strides": strides,
            "expand_ratio": expand_ratio,
            "se_ratio": se_ratio,
            "ktype": None if ktype is None else ktypes.resolve(ktype).name,
            "activation": _activation_name(activation),
            "drop_connect": drop_connect,
            "fused": fused,
        }
        super().__init__(options, **kwargs)


def _activation_name(activation: Activation) -> ActivationName | None:
    """Kconv's name of one of Keras's activations."""
    function = keras.activations.get(activation)
    if function is keras.activations.linear:
        return None
    for known, name in ACTIVATION_NAMES.items():
        if function is known:
            return name
    names = ", ".join(ACTIVATION_NAMES.values())
    raise ValueError(f"activation={activation!r} is neither Keras's function nor one of {names}")
