"""MobileNet V3 Large and Small, and kMobileNet V3 with grouped pointwise convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kconv.models.activations import ActivationName
from kconv.models.builder import GraphBuilder, round_filters
from kconv.models.graph import Graph
from kconv.models.options import Factor, KTypeOption, ModelSize, Rate
from kconv.models.spec import Spec, register

__all__ = ["KMobileNetV3", "MobileNetV3"]

MOMENTUM = 0.999
"""Of the network's own batch norms; those of the replaced convolutions have the usual 0.99."""


class Block(NamedTuple):
    """One row of MobileNet V3's tables.

    ``plain`` blocks have relu, the others hard swish.
    """

    expansion: float
    filters: int
    kernel_size: int
    strides: int
    squeeze_excite: bool
    plain: bool


LARGE = (
    Block(1, 16, 3, 1, squeeze_excite=False, plain=True),
    Block(4, 24, 3, 2, squeeze_excite=False, plain=True),
    Block(3, 24, 3, 1, squeeze_excite=False, plain=True),
    Block(3, 40, 5, 2, squeeze_excite=True, plain=True),
    Block(3, 40, 5, 1, squeeze_excite=True, plain=True),
    Block(3, 40, 5, 1, squeeze_excite=True, plain=True),
    Block(6, 80, 3, 2, squeeze_excite=False, plain=False),
    Block(2.5, 80, 3, 1, squeeze_excite=False, plain=False),
    Block(2.3, 80, 3, 1, squeeze_excite=False, plain=False),
    Block(2.3, 80, 3, 1, squeeze_excite=False, plain=False),
    Block(6, 112, 3, 1, squeeze_excite=True, plain=False),
    Block(6, 112, 3, 1, squeeze_excite=True, plain=False),
    Block(6, 160, 5, 2, squeeze_excite=True, plain=False),
    Block(6, 160, 5, 1, squeeze_excite=True, plain=False),
    Block(6, 160, 5, 1, squeeze_excite=True, plain=False),
)
SMALL = (
    Block(1, 16, 3, 2, squeeze_excite=True, plain=True),
    Block(72 / 16, 24, 3, 2, squeeze_excite=False, plain=True),
    Block(88 / 24, 24, 3, 1, squeeze_excite=False, plain=True),
    Block(4, 40, 5, 2, squeeze_excite=True, plain=False),
    Block(6, 40, 5, 1, squeeze_excite=True, plain=False),
    Block(6, 40, 5, 1, squeeze_excite=True, plain=False),
    Block(3, 48, 5, 1, squeeze_excite=True, plain=False),
    Block(3, 48, 5, 1, squeeze_excite=True, plain=False),
    Block(6, 96, 5, 2, squeeze_excite=True, plain=False),
    Block(6, 96, 5, 1, squeeze_excite=True, plain=False),
    Block(6, 96, 5, 1, squeeze_excite=True, plain=False),
)


@dataclass(frozen=True, kw_only=True)
class MobileNetV3(Spec):
    """MobileNet V3 (Howard et al., 2019).

    Attributes:
        size: "large" or "small".
        alpha: factor on all filters, which are rounded to multiples of 8.
        minimalistic: without squeeze and excite, hard swish and 5x5 kernels.
        dropout: rate before the classifier.
    """

    size: ModelSize = "large"
    alpha: Factor = 1.0
    minimalistic: bool = False
    dropout: Rate = 0.2

    def graph(self) -> Graph:
        """The network's layers."""
        g = GraphBuilder(self.name, self.input_shape)
        activation = self._activation(plain=False)
        x = g.zero_pad("Conv_pad", g.input, 3)
        x = g.conv("Conv", x, 16, 3, 2, padding="valid")
        x = g.batch_norm("Conv/BatchNorm", x, momentum=MOMENTUM)
        x = g.activation(None, x, activation)
        for number, block in enumerate(LARGE if self.size == "large" else SMALL):
            prefix = f"expanded_conv_{number}/" if number else "expanded_conv/"
            x = self._block(g, x, prefix, block)
        x = self._pointwise(g, "Conv_1", x, round_filters(6 * g.channels(x)), activation)
        if self.pooling:
            x = g.global_pool(None, x, self.pooling)
        if self.include_top:
            filters = 1280 if self.size == "large" else 1024
            x = g.reshape(None, x)
            x = self._pointwise(
                g,
                "Conv_2",
                x,
                round_filters(filters * max(1.0, self.alpha)),
                activation,
                batch_norm=False,
            )
            if self.dropout:
                x = g.dropout(None, x, self.dropout)
            x = g.conv("Logits", x, self.classes, use_bias=True)
            x = g.flatten(None, x)
            x = g.activation("Predictions/Softmax", x, "softmax")
        return g.build(x)

    def _block(self, g: GraphBuilder, x: str, prefix: str, block: Block) -> str:
        """Inverted residual with or without squeeze and excite."""
        source, filters_in = x, g.channels(x)
        activation = self._activation(block.plain)
        kernel_size = 3 if self.minimalistic else block.kernel_size
        filters = round_filters(block.filters * self.alpha)
        if block.expansion != 1:
            expanded = round_filters(filters_in * block.expansion)
            x = self._pointwise(g, f"{prefix}expand", x, expanded, activation)
        if block.strides == 2:
            x = g.zero_pad(f"{prefix}depthwise/pad", x, kernel_size)
        x = g.depthwise_conv(
            f"{prefix}depthwise",
            x,
            kernel_size,
            block.strides,
            padding="valid" if block.strides == 2 else "same",
        )
        x = g.batch_norm(f"{prefix}depthwise/BatchNorm", x, momentum=MOMENTUM)
        x = g.activation(None, x, activation)
        if block.squeeze_excite and not self.minimalistic:
            x = self._squeeze_excite(g, x, f"{prefix}squeeze_excite/")
        x = self._pointwise(g, f"{prefix}project", x, filters, None)
        if block.strides == 1 and filters == filters_in:
            x = g.add(f"{prefix}Add", [source, x])
        return x

    def _squeeze_excite(self, g: GraphBuilder, x: str, prefix: str) -> str:
        channels = g.channels(x)
        gate = g.global_pool(f"{prefix}AvgPool", x)
        gate = g.reshape(None, gate)
        gate = self._pointwise(
            g,
            f"{prefix}Conv",
            gate,
            round_filters(channels / 4),
            "relu",
            batch_norm=False,
            activation_name=f"{prefix}Relu",
        )
        gate = self._pointwise(
            g, f"{prefix}Conv_1", gate, channels, "hard_sigmoid", batch_norm=False
        )
        return g.multiply(f"{prefix}Mul", x, gate)

    def _activation(self, plain: bool) -> ActivationName:
        return "relu" if plain or self.minimalistic else "hard_swish"

    def _pointwise(
        self,
        g: GraphBuilder,
        name: str,
        x: str,
        filters: int,
        activation: ActivationName | None,
        *,
        batch_norm: bool = True,
        activation_name: str | None = None,
    ) -> str:
        """A pointwise convolution with batch norm or bias."""
        x = g.conv(name, x, filters, use_bias=not batch_norm)
        if batch_norm:
            x = g.batch_norm(f"{name}/BatchNorm", x, momentum=MOMENTUM)
        return g.activation(activation_name, x, activation) if activation else x


@dataclass(frozen=True, kw_only=True)
class KMobileNetV3(MobileNetV3):
    """kMobileNet V3: grouped pointwise convolutions (MENDEL 28(1), 2022).

    Attributes:
        ktype: the kType of all pointwise convolutions but the classifier.
    """

    ktype: KTypeOption = "D6_16ch"

    def _pointwise(
        self,
        g: GraphBuilder,
        name: str,
        x: str,
        filters: int,
        activation: ActivationName | None,
        *,
        batch_norm: bool = True,
        activation_name: str | None = None,
    ) -> str:
        return g.pointwise(
            name,
            x,
            filters,
            self.ktype,
            activation=activation,
            batch_norm=batch_norm,
            use_bias=not batch_norm,
        )


register("mobilenet_v3_large", MobileNetV3, size="large")
register("mobilenet_v3_small", MobileNetV3, size="small")
register("kmobilenet_v3_large", KMobileNetV3, size="large")
register("kmobilenet_v3_small", KMobileNetV3, size="small")
