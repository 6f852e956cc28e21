"""DenseNet-BC for small images, and kDenseNet-BC with grouped pointwise convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from kconv.models.builder import GraphBuilder
from kconv.models.graph import Graph
from kconv.models.options import (
    Elementwise,
    Factor,
    ImageShape,
    KTypeOption,
    OptionalKType,
    Rate,
    Whole,
)
from kconv.models.spec import Spec, register

__all__ = ["DenseNet", "KDenseNet"]

EPSILON = 1.001e-5
"""Of all batch norms."""


@dataclass(frozen=True, kw_only=True)
class DenseNet(Spec):
    """DenseNet-BC (Huang et al., 2017): three dense blocks with transitions between them.

    Attributes:
        blocks: layers of each dense block: (depth - 4) / 6.
        growth_rate: channels that each of them adds.
        bottleneck: channels of its pointwise convolution.
        compression: factor on the channels at transitions.
        first_conv_filters: channels of the first convolution.
        dropout: rate after each convolution but the first.
        activation: of the network.
    """

    input_shape: ImageShape = (32, 32, 3)
    blocks: Whole = 16
    growth_rate: Whole = 12
    bottleneck: Whole = 48
    compression: Factor = 0.5
    first_conv_filters: Whole = 24
    dropout: Rate = 0.0
    activation: Elementwise = "relu"

    def graph(self) -> Graph:
        """The network's layers."""
        g = GraphBuilder(self.name, self.input_shape)
        x = g.conv(None, g.input, self.first_conv_filters, 3, use_bias=True)
        for block in (1, 2, 3):
            for number in range(1, self.blocks + 1):
                y = self._layer(g, x, f"dn{block}_b{number}")
                x = g.concat(None, [x, self._dropout(g, y)])
            if block < 3:
                x = self._transition(g, x, f"dntransition{block}")
                x = g.pool(None, self._dropout(g, x), "avg", pool_size=2, strides=2)
        x = g.batch_norm("bn", x, epsilon=EPSILON)
        x = g.activation("relu", x, self.activation)
        if self.pooling:
            x = g.global_pool(f"last_{self.pooling}_pool", x, self.pooling)
        if self.include_top:
            x = g.dense("softmax", x, self.classes)
        return g.build(x)

    def _layer(self, g: GraphBuilder, x: str, name: str) -> str:
        """The channels that a layer of a dense block adds."""
        x = g.batch_norm(None, x, epsilon=EPSILON)
        x = g.activation(None, x, self.activation)
        x = g.conv(None, x, self.bottleneck, padding="valid")
        x = g.batch_norm(None, x, epsilon=EPSILON)
        x = g.activation(None, x, self.activation)
        return g.conv(None, x, self.growth_rate, 3)

    def _transition(self, g: GraphBuilder, x: str, name: str) -> str:
        """The compression between two dense blocks."""
        filters = int(self.compression * g.channels(x))
        x = g.batch_norm(f"{name}_bn", x, epsilon=EPSILON)
        x = g.activation(None, x, self.activation)
        return g.conv(None, x, filters, padding="valid")

    def _dropout(self, g: GraphBuilder, x: str) -> str:
        return g.dropout(None, x, self.dropout) if self.dropout else x


@dataclass(frozen=True, kw_only=True)
class KDenseNet(DenseNet):
    """kDenseNet-BC: grouped pointwise convolutions (MENDEL 28(1), 2022).

    Attributes:
        ktype: the kType in the dense blocks.
        ktype_transition: the kType at the transitions, by default the same.
        interleave_at_transition: whether the channels that the layers of a block have added are
            interleaved (by the growth rate) before its transition.
    """

    ktype: KTypeOption = "D6_16ch"
    ktype_transition: OptionalKType = None
    interleave_at_transition: bool = True
    activation: Elementwise = "swish"

    def _layer(self, g: GraphBuilder, x: str, name: str) -> str:
        x = g.batch_norm(None, x, epsilon=EPSILON)
        x = g.pointwise(
            f"{name}_k",
            x,
            self.bottleneck,
            self.ktype,
            activation=self.activation,
            batch_norm=False,
        )
        x = g.batch_norm(None, x, epsilon=EPSILON)
        return g.conv(None, x, self.growth_rate, 3, activation="relu")

    def _transition(self, g: GraphBuilder, x: str, name: str) -> str:
        if self.interleave_at_transition and self.growth_rate > 1:
            x = g.interleave(f"{name}_inter", x, self.growth_rate)
        x = g.batch_norm(f"{name}_bn", x, epsilon=EPSILON)
        return g.pointwise(
            name,
            x,
            int(self.compression * g.channels(x)),
            self.ktype if self.ktype_transition is None else self.ktype_transition,
            activation=self.activation,
            batch_norm=False,
        )


register("densenet_bc_l100", DenseNet, blocks=16)
register("kdensenet_bc_l100", KDenseNet, blocks=16)
